"""The average of the weights in one process; at ZeRO stages: tests/train/engine/test_muon_and_average.py."""

import pytest
import torch

from colt5dist.train.optimizer import weight_average
from colt5dist.train.optimizer.weight_average import WeightAverage


def test_it_warms_up_to_its_decay() -> None:
    """Decays of 1/10, 2/11, then 0.2; an average that begins anew warms up again."""
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    average = WeightAverage([weight], 0.2)
    expected = 0.0
    for number, decay in enumerate((1 / 10, 2 / 11, 0.2, 0.2)):
        weight.data.fill_(number + 1.0)
        average.update()
        expected = decay * expected + (1 - decay) * (number + 1)
        assert average.averages[0].flatten().tolist() == pytest.approx([expected] * 6, rel=1e-6)
    assert average.num_updates == 4
    average.begin()
    assert average.num_updates == 0 and torch.equal(average.averages[0], weight)
    weight.data.zero_()
    average.update()
    assert average.averages[0][0, 0] == pytest.approx(4.0 / 10)


def test_weights_and_average_are_exchanged_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place, piece by piece."""
    monkeypatch.setattr(weight_average, "ELEMENTS_AT_ONCE", 4)
    weights = [torch.randn(3, 5), torch.randn(7)]
    average = WeightAverage(weights, 0.9)
    before = [weight.clone() for weight in weights]
    for weight in weights:
        weight.mul_(1.1)
    average.update()
    own, averaged = [w.clone() for w in weights], [a.clone() for a in average.averages]
    average.swap()
    assert all(map(torch.equal, weights, averaged)) and all(map(torch.equal, average.averages, own))
    average.swap()
    assert all(map(torch.equal, weights, own)) and all(map(torch.equal, average.averages, averaged))
    assert not any(map(torch.equal, before, averaged))
