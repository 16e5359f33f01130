"""The operators of a training step against their references: gradients of RMSNorm and gated GELU, the loss, sums."""

import pytest
import torch
import torch.nn.functional as F

from colt5dist.ops.accumulate import accumulate_
from colt5dist.ops.cross_entropy import vocabulary_cross_entropy
from colt5dist.ops.gated_gelu import gated_gelu
from colt5dist.ops.rms_norm import rms_norm_with_residual

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = ("reference", "triton")
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal numbers that need a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype).requires_grad_()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of the expected tensor; NaN anywhere gives NaN."""
    difference = torch.linalg.vector_norm(actual.double() - expected.double())
    return float((difference / torch.linalg.vector_norm(expected.double()).clamp(min=1e-30)).detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(3, 5, 24), (1, 1, 16), (2, 7, 100), (130, 768)], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rms_norm_with_residual(implementation: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, gamma, other = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1), random(*shape, seed=2)
    upstream = random(*shape, seed=3).detach()
    kept, normed = rms_norm_with_residual(x, gamma, 1e-6, implementation=implementation)
    out = kept + normed * other.detach().to(dtype)
    actual = torch.autograd.grad(out, (x, gamma), upstream.to(dtype))
    wide_x, wide_gamma = (t.detach().double().requires_grad_() for t in (x, gamma))
    expected_out = wide_x + F.rms_norm(wide_x, shape[-1:], wide_gamma, 1e-6) * other.detach().to(dtype).double()
    expected = torch.autograd.grad(expected_out, (wide_x, wide_gamma), upstream.to(dtype).double())
    assert relative_error(out, expected_out) < TOLERANCE[dtype]
    for one, two in zip(actual, expected, strict=True):
        assert one.dtype == dtype and relative_error(one, two) < TOLERANCE[dtype]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rms_norm_where_only_the_norm_is_used(implementation: str) -> None:
    x, gamma = random(4, 32), random(32, seed=1)
    _, normed = rms_norm_with_residual(x, gamma, 1e-6, implementation=implementation)
    actual = torch.autograd.grad(normed.square().sum(), (x, gamma))
    expected = torch.autograd.grad(F.rms_norm(x, (32,), gamma, 1e-6).square().sum(), (x, gamma))
    for one, two in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(3, 10), (2, 3, 2050), (1, 4)], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gated_gelu(implementation: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    hidden = random(*shape, dtype=dtype)
    with torch.no_grad():
        hidden.view(-1)[0] = -40.0  # whose exponential overflows float32 unless it is taken with care
    out = gated_gelu(hidden, implementation=implementation)
    upstream = random(*out.shape, seed=1).detach().to(dtype)
    (actual,) = torch.autograd.grad(out, hidden, upstream)
    wide = hidden.detach().double().requires_grad_()
    gate, value = wide.chunk(2, dim=-1)
    (expected,) = torch.autograd.grad(F.gelu(gate, approximate="tanh") * value, wide, upstream.double())
    assert relative_error(actual, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("vocabulary", [7, 4096, 5000])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vocabulary_cross_entropy(implementation: str, vocabulary: int, masked: bool, dtype: torch.dtype) -> None:
    hidden, weight = random(5, 16, dtype=dtype), random(vocabulary, 16, dtype=dtype, seed=1)
    targets = torch.tensor([0, vocabulary - 1, 3, 3, 1], device=DEVICE)
    valid = torch.tensor([True, True, False, True, False], device=DEVICE) if masked else None
    loss, normaliser = vocabulary_cross_entropy(hidden, weight, targets, valid, implementation=implementation)
    total = (loss * torch.arange(1.0, 6.0, device=DEVICE)).sum() + 0.3 * normaliser.square().sum()
    actual = torch.autograd.grad(total, (hidden, weight))
    logits = (hidden.detach() @ weight.detach().t()).double().requires_grad_()
    rows = torch.ones(5, device=DEVICE, dtype=torch.float64) if valid is None else valid.double()
    expected_loss = F.cross_entropy(logits, targets, reduction="none") * rows
    expected_total = (expected_loss * torch.arange(1.0, 6.0, device=DEVICE)).sum()
    expected_total = expected_total + 0.3 * (logits.logsumexp(-1) * rows).square().sum()
    (grad_logits,) = torch.autograd.grad(expected_total, logits)
    assert relative_error(loss, expected_loss) < 1e-5
    assert relative_error(actual[0], grad_logits @ weight.detach().double()) < TOLERANCE[dtype]
    assert relative_error(actual[1], grad_logits.t() @ hidden.detach().double()) < TOLERANCE[dtype]


def test_a_masked_row_of_nan_changes_nothing() -> None:
    hidden, weight = random(3, 16), random(50, 16, seed=1)
    with torch.no_grad():
        hidden[1] = float("nan")
    targets, valid = torch.tensor([1, 2, 3], device=DEVICE), torch.tensor([True, False, True], device=DEVICE)
    loss, normaliser = vocabulary_cross_entropy(hidden, weight, targets, valid, implementation="triton")
    assert bool(torch.isfinite(loss).all()) and bool(torch.isfinite(normaliser).all())
    assert float(loss[1]) == float(normaliser[1]) == 0.0


def test_the_loss_of_a_row_with_nan_is_nan() -> None:
    hidden, weight = random(2, 16), random(50, 16, seed=1)
    with torch.no_grad():
        hidden[1, 3] = float("nan")
    loss, _ = vocabulary_cross_entropy(hidden, weight, torch.tensor([1, 2], device=DEVICE), implementation="triton")
    assert loss.isnan().tolist() == [False, True]


def test_a_second_backward_pass_of_the_loss_is_refused() -> None:
    hidden, weight = random(2, 16), random(8, 16, seed=1)
    loss, _ = vocabulary_cross_entropy(hidden, weight, torch.tensor([1, 2], device=DEVICE))
    loss.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        loss.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1, 2048, 5001])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_accumulate(implementation: str, size: int, dtype: torch.dtype) -> None:
    total, values = random(size).detach(), random(size, dtype=dtype, seed=1).detach()
    expected = total + values.float()
    accumulate_(total, values, implementation=implementation)
    assert torch.equal(total, expected)


@pytest.mark.parametrize("num_rows", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_accumulate_rows(implementation: str, dtype: torch.dtype, num_rows: int) -> None:
    """Rows of a wider tensor, added up in float32 and in their order."""
    total, rows = random(3001).detach(), random(num_rows, 3100, dtype=dtype, seed=1).detach()[:, 57:3058]
    added = rows[0].float()
    for row in rows[1:]:
        added = added + row.float()
    expected = total + added
    accumulate_(total, rows, implementation=implementation)
    assert torch.equal(total, expected)
