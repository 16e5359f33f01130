"""solver="newton": exact on hard rows within the passes it is allowed, its gradient that of the optimum."""

import pytest
import torch

from colt5dist.ops.soft_topk import soft_topk
from colt5dist.ops.soft_topk.newton import MAX_PASSES, solve


def rows(name, n):
    generator = torch.Generator().manual_seed(n)
    normal = torch.randn(3, n, generator=generator)
    return {
        "normal": normal,
        "wide": normal * 300,
        "equal": torch.full((3, n), 0.7),
        "linear": torch.linspace(-1e4, 1e4, n).expand(3, n),
        "two-values": torch.where(normal > 0, 1e4, -1e4),
        "few-values": normal.round(),
        "geometric": 2.0 ** torch.arange(n).clamp(max=13).float().expand(3, n),
    }[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("n", [2, 19, 4001])
@pytest.mark.parametrize("name", ["normal", "wide", "equal", "linear", "two-values", "few-values", "geometric"])
def test_the_sum_is_the_budget(name, n, dtype):
    scores = rows(name, n).to(dtype)
    for eps in (0.02, 1.0):
        for k in (0.3, 1.0, 1.5, n * 9 / 64, n / 2, n - 1, n - 1e-3):
            result = soft_topk(scores, k, eps=eps, solver="newton", implementation="scalar")
            relative = (result.sum(-1, dtype=torch.float64) / k - 1).abs().max()
            assert relative <= (2e-6 if dtype == torch.float32 else 1e-9), (eps, k)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e4, 1e20, 1e38])
def test_no_finite_row_takes_more_passes_than_allowed(scale):
    for name in ("normal", "equal", "few-values"):
        for k in (0.5, 3.0, 700.25):
            _, passes = solve(rows(name, 1000).clamp(-3, 3) * scale, torch.full((3,), k).double(), None, 0.02)
            assert passes < MAX_PASSES


def test_gradcheck():
    scores = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    k = torch.tensor([1.0, 3.5, 20.0], dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 12) > 0.2
    assert torch.autograd.gradcheck(lambda s, k: soft_topk(s, k, mask=mask, eps=0.3, solver="newton"), (scores, k))


def test_it_is_what_coordinate_descent_converges_to(result_and_gradients):
    scores, grad = torch.randn(4, 40, dtype=torch.float64), torch.randn(4, 40, dtype=torch.float64)
    k, mask = torch.tensor([0.5, 2.0, 7.0, 19.0], dtype=torch.float64), torch.rand(4, 40) > 0.2
    expected = result_and_gradients(scores, k, grad, mask=mask, eps=0.3, n_iters=2000)
    actual = result_and_gradients(scores, k, grad, mask=mask, eps=0.3, solver="newton")
    for one, other in zip(actual, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", ["normal", "wide", "linear", "few-values"])
def test_triton_is_the_pytorch_version(result_and_gradients, small_blocks, poisoned_memory, name, dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scores = rows(name, 37).to(dtype)
    grad, mask = torch.randn(3, 37), torch.rand(3, 37) > 0.2
    k = torch.tensor([0.4, 5.0, 50.0], dtype=torch.float64)
    expected = result_and_gradients(
        scores.double(), k, grad, mask=mask, eps=0.1, solver="newton", implementation="scalar"
    )
    moved = (tensor.to(device) for tensor in (scores, k, grad))
    actual = result_and_gradients(*moved, mask=mask.to(device), eps=0.1, solver="newton", implementation="triton")
    tolerance = 2e-5 if dtype == torch.float32 else 1e-9
    for one, other in zip(actual, expected, strict=True):
        assert (one.cpu().double() - other.double()).norm() <= tolerance * max(other.double().norm(), 0.1)
