"""Admission in order, against a loop over the tokens."""

import pytest
import torch

from colt5dist.errors import ConfigError
from colt5dist.ops.admit import HISTORY, admit_in_order, trailing_mean

V, W = 12, 10


def scores(seed=0, dtype=torch.float32):
    return torch.randn(2, 3, V, W, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def naive(row, earlier, num_tokens, num_places):
    """Positions and taken places of the windows of one row (v, w)."""
    result = []
    for window in range(len(row)):
        decisive = range(max(0, window - HISTORY + 1), window + 1)
        threshold = sum(sorted(earlier[i].tolist(), reverse=True)[num_tokens - 1] for i in decisive) / len(decisive)
        admitted = [i for i, score in enumerate(row[window].tolist()) if score >= threshold][:num_places]
        result.append(admitted)
    return result


@pytest.mark.parametrize(("num_tokens", "num_places"), [(3, 3), (2, 4), (1, 1), (W, W), (4, W)])
@pytest.mark.parametrize("own_window", [False, True])
def test_equals_a_loop(num_tokens, num_places, own_window):
    rows = scores(dtype=torch.float64)
    earlier = rows if own_window else scores(1, torch.float64)
    positions, taken = admit_in_order(rows, earlier, num_tokens=num_tokens, num_places=num_places)
    for i in range(2):
        for j in range(3):
            wanted = naive(rows[i, j], earlier[i, j], num_tokens, num_places)
            got = [p[t].tolist() for p, t in zip(positions[i, j], taken[i, j], strict=True)]
            assert got == wanted
    # every place has a position of its own
    assert (positions.sort(dim=-1).values.diff(dim=-1) > 0).all()
    # taken places stand first
    assert (taken.int().diff(dim=-1) <= 0).all()


def test_what_is_no_score_is_never_admitted():
    rows = torch.full((V, W), float("-inf"))
    rows[:, 1] = float("nan")
    _, taken = admit_in_order(rows, torch.zeros(V, W), num_tokens=2)
    assert not taken.any()
    _, taken = admit_in_order(rows, rows, num_tokens=W)
    assert not taken.any()


def test_later_scores_move_no_decision():
    rows = scores()
    positions, taken = admit_in_order(rows, rows, num_tokens=3)
    for window in range(1, V):
        changed = rows.clone()
        changed[..., window:, :] = 100 * torch.randn_like(changed[..., window:, :])
        other_positions, other_taken = admit_in_order(changed, changed, num_tokens=3)
        assert torch.equal(positions[..., :window, :], other_positions[..., :window, :])
        assert torch.equal(taken[..., :window, :], other_taken[..., :window, :])


def test_trailing_mean_and_its_gradient():
    values = torch.randn(2, V, dtype=torch.float64, requires_grad=True)
    wanted = [values[:, max(0, i - HISTORY + 1) : i + 1].mean(dim=1) for i in range(V)]
    torch.testing.assert_close(trailing_mean(values), torch.stack(wanted, dim=1), rtol=0, atol=1e-14)
    torch.autograd.gradcheck(trailing_mean, (values,))


def test_operator_contract():
    rows = scores()
    torch.library.opcheck(torch.ops.colt5dist.admit_in_order, (rows, rows, 3, 5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"num_tokens": 0}, "num_tokens"), ({"num_tokens": W + 1}, "num_tokens"), ({"num_places": W + 1}, "num_places")],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        admit_in_order(scores(), scores(), **({"num_tokens": 2} | arguments))
    with pytest.raises(ConfigError, match="earlier"):
        admit_in_order(scores(), scores()[..., 1:], num_tokens=2)
