"""AdamW's step in one pass keeps its state as torch.optim.AdamW does."""

from typing import Any

import pytest
import torch

from colt5dist.train.optimizer import adamw
from colt5dist.train.optimizer.adamw import FlatWeights, can_step_in_one_pass, problem_of_one_pass, step_in_one_pass
from colt5dist.train.optimizer.muon import Muon

SIZES = (5, 3)


def make() -> tuple[list[torch.Tensor], torch.optim.AdamW]:
    """Weights of two groups, one of them decayed, and their optimizer."""
    masters = [torch.linspace(-1, 1, size, requires_grad=True) for size in SIZES]
    groups = [{"params": [masters[0]], "weight_decay": 0.1}, {"params": [masters[1]], "weight_decay": 0.0}]
    return masters, torch.optim.AdamW(groups, lr=0.01, fused=True)


def gradient(step: int, size: int) -> torch.Tensor:
    """That of one step."""
    return torch.randn(size, generator=torch.Generator().manual_seed(10 * step + size))


def test_steps_of_both_ways_go_on_from_each_other() -> None:
    masters, optimizer = make()
    expected, reference = make()
    for step, one_pass in enumerate((True, False, True, True)):
        parts = [gradient(step, size) for size in SIZES]
        for tensor, part in zip(expected, parts, strict=True):
            tensor.grad = part * 0.5
        reference.step()
        if one_pass:
            pairs = zip(optimizer.param_groups, masters, parts, strict=True)
            flats = [FlatWeights(group, master, part, None) for group, master, part in pairs]
            step_in_one_pass(optimizer, flats, 0.5, clear=True)
            assert not any(part.any() for part in parts)
        else:
            for tensor, part in zip(masters, parts, strict=True):
                tensor.grad = part * 0.5
            optimizer.step()
        for tensor, other in zip(masters, expected, strict=True):
            torch.testing.assert_close(tensor, other, rtol=1e-6, atol=1e-7)
            states: list[dict[str, Any]] = [optimizer.state[tensor], reference.state[other]]
            assert states[0].keys() == states[1].keys()
            for key, value in states[0].items():
                torch.testing.assert_close(value, states[1][key], rtol=1e-6, atol=1e-9)  # type and device, too


def test_a_number_of_steps_that_others_set_is_noticed() -> None:
    """As a rollback sets it; otherwise it is not read again."""
    masters, optimizer = make()
    flats = [
        FlatWeights(group, master, gradient(1, size), None)
        for group, master, size in zip(optimizer.param_groups, masters, SIZES, strict=True)
    ]
    for _ in range(3):
        step_in_one_pass(optimizer, flats, 1.0, clear=False)
    optimizer.state[masters[1]]["step"].fill_(7)
    seen: list[float] = []
    real = adamw.adamw_

    def watched(*tensors: torch.Tensor, step: float, **settings: Any) -> None:
        seen.append(step)
        real(*tensors, step=step, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adamw, "adamw_", watched)
        step_in_one_pass(optimizer, flats, 1.0, clear=False)
    assert seen == [4, 8] == [float(optimizer.state[master]["step"]) for master in masters]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_kernel_is_tried_before_it_steps(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert problem_of_one_pass(torch.device(device)) is None
    real = adamw.adamw_
    monkeypatch.setattr(adamw, "adamw_", lambda *tensors, **settings: real(*tensors, **{**settings, "clear": False}))
    assert problem_of_one_pass(torch.device(device)) is None  # both leave the gradient
    kinds = {"triton": 0.5, "reference": 0.6}
    monkeypatch.setattr(
        adamw,
        "adamw_",
        lambda *tensors, **settings: real(*tensors, **{**settings, "scale": kinds[settings["implementation"]]}),
    )
    assert "differ" in str(problem_of_one_pass(torch.device(device)))


def test_it_serves_adamw_as_the_trainer_makes_it() -> None:
    weights = [torch.ones(2, requires_grad=True)]
    assert can_step_in_one_pass(torch.optim.AdamW(weights, fused=True))
    for other in (
        torch.optim.AdamW(weights, fused=True, amsgrad=True),
        torch.optim.AdamW(weights, fused=True, maximize=True),
        torch.optim.AdamW(weights),
        torch.optim.Adam(weights, fused=True),
        torch.optim.Adafactor(weights),
        Muon([], weights, lr=0.1, momentum=0.9, weight_decay=0.0, betas=(0.9, 0.99), eps=1e-8),
    ):
        assert not can_step_in_one_pass(other)
