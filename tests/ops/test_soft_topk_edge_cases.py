"""Inputs at the edge, forward and backward, for every implementation of both solvers."""

import pytest
import torch

from colt5dist.ops.soft_topk import soft_topk

IMPLEMENTATIONS = {
    "reference": {"implementation": "reference"},
    "scalar": {"implementation": "scalar"},
    "triton": {"implementation": "triton"},
    "newton-scalar": {"implementation": "scalar", "solver": "newton"},
    "newton-triton": {"implementation": "triton", "solver": "newton"},
}
SETTINGS = {"eps": 0.1, "eps_init": 4.0, "eps_decay": 0.4, "n_iters": 6}
"""The last two iterations are at the final temperature."""

pytestmark = [
    # NumPy's, in the interpreter: of exponentials on the side of a threshold that is not used
    pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value) encountered:RuntimeWarning"),
    pytest.mark.usefixtures("poisoned_memory", "small_blocks"),
    pytest.mark.parametrize("settings", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS),
]


@pytest.fixture
def run(result_and_gradients, settings):
    """Result and gradients, on the GPU for Triton where there is one; all finite unless said otherwise."""
    on_gpu = settings["implementation"] == "triton" and torch.cuda.is_available()

    def run(scores, k, mask=None, grad=None, finite=True, **changes):
        generator = torch.Generator().manual_seed(0)
        grad = torch.randn(scores.shape, generator=generator) if grad is None else grad
        tensors = [scores, torch.full(scores.shape[:-1], float(k)) if not torch.is_tensor(k) else k, grad]
        scores, k, grad = (tensor.cuda() if on_gpu else tensor for tensor in tensors)
        mask = mask.cuda() if on_gpu and mask is not None else mask
        results = result_and_gradients(scores, k, grad, mask=mask, **{**SETTINGS, **settings, **changes})
        if finite:
            assert all(tensor.isfinite().all() for tensor in results)
        return [tensor.cpu() for tensor in results]

    return run


def test_a_row_without_a_valid_entry_is_empty(run):
    mask = torch.tensor([[False] * 7, [True] * 7])
    result, grad_scores, grad_k = run(torch.randn(2, 7), 2.0, mask)
    assert not result[0].any() and not grad_scores[0].any() and grad_k[0] == 0
    assert result[1].sum() > 1.0


def test_one_valid_entry_takes_the_budget(run):
    mask = torch.zeros(1, 19, dtype=torch.bool)
    mask[0, 11] = True
    result, grad_scores, _ = run(torch.randn(1, 19), 0.4, mask)
    assert result[0, 11] == pytest.approx(0.4, abs=1e-6)
    assert result.count_nonzero() == 1
    assert grad_scores.abs().max() <= 1e-5  # its weight is k whatever its score is


def test_a_row_of_one(run):
    result, grad_scores, grad_k = run(torch.tensor([[3.0]]), 0.25, grad=torch.ones(1, 1))
    assert result.item() == pytest.approx(0.25, abs=1e-6)
    assert grad_scores.item() == pytest.approx(0.0, abs=1e-5)
    assert grad_k.item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("k", [8.0, 20.0])
def test_a_budget_for_everything_takes_everything(run, settings, k):
    scores = torch.randn(3, 8)
    result, grad_scores, grad_k = run(scores, k)
    assert result.sum(-1).max() <= 8
    # at k = n coordinate descent is slow: an iteration's error is (number of clipped) / k of the last one's
    if k > 8 or settings.get("solver") == "newton":
        assert result.min() == 1
        assert not grad_scores.any() and not grad_k.any()


def test_a_budget_below_one(run):
    result, _, _ = run(torch.randn(4, 21), 0.3, eps=0.5, eps_init=0.5)
    assert torch.allclose(result.sum(-1), torch.full((4,), 0.3), rtol=1e-5)


def test_a_tensor_budget_of_zero_takes_nothing(run):
    result, grad_scores, grad_k = run(torch.randn(2, 9), torch.tensor([0.0, -1.0]))
    assert result.max() < 1e-18 and grad_scores.abs().max() < 1e-16
    assert not grad_k.any()


def test_equal_scores_have_equal_weights(run):
    result, grad_scores, grad_k = run(torch.full((2, 18), -1.5), 4.5, grad=torch.ones(2, 18))
    assert torch.allclose(result, torch.full((2, 18), 0.25), rtol=1e-5)
    assert grad_scores.abs().max() <= 1e-5
    assert torch.allclose(grad_k, torch.ones(2), rtol=1e-5)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_scores_of_ten_thousand(run, scale):
    scores = torch.tensor([[1.0, 0.5, -1.0, -0.5, 0.25, 0.0]]).repeat(2, 3) * scale
    result, _, _ = run(scores, 4.0, eps=0.02)
    ranked = result.gather(-1, scores.argsort(dim=-1))
    assert (ranked.diff(dim=-1) >= 0).all() and (result <= 1).all()


@pytest.mark.parametrize("shift", [8192.0, -8192.0])
def test_large_scores_that_differ_by_little(run, settings, shift):
    scores = shift + torch.arange(18.0).repeat(2, 1) / 64
    result, grad_scores, grad_k = run(scores, 3.0)
    expected, grad_expected, grad_k_expected = run(scores.double(), 3.0)
    # row scalars are float64 and these scores exact in float32; only the published form has to round s + a
    tolerance = 1.0 if settings["implementation"] == "reference" else 1e-5
    assert (result - expected).norm() <= tolerance * expected.norm()
    assert (grad_scores - grad_expected).norm() <= tolerance * 40
    assert (grad_k - grad_k_expected).norm() <= tolerance * 40


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3e38])
def test_what_stands_in_masked_places_does_not_matter(run, value):
    scores, mask = torch.randn(2, 20), torch.rand(2, 20) > 0.4
    grad = torch.randn(2, 20)
    expected = run(scores.masked_fill(~mask, 0.0), 3.0, mask, grad)
    actual = run(scores.masked_fill(~mask, value), 3.0, mask, grad.masked_fill(~mask, float("nan")))
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)
    assert not actual[0][~mask].any() and not actual[1][~mask].any()


def test_strides_do_not_matter(run):
    scores, mask = torch.randn(2, 18, 3), torch.rand(18, 2, 3) > 0.3
    grad = torch.randn(18, 2, 2).transpose(0, 1)
    arguments = (scores[..., 1], 2.0, mask[..., 2].transpose(0, 1), grad[..., 0])
    actual = run(*arguments)
    expected = run(*(x.contiguous() if torch.is_tensor(x) else x for x in arguments))
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)
    assert actual[0].is_contiguous()


def test_an_expanded_upstream_gradient(run):
    scores = torch.randn(3, 10)
    actual = run(scores, 2.0, grad=torch.tensor(0.5).expand(3, 10))
    expected = run(scores, 2.0, grad=torch.full((3, 10), 0.5))
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (3, 0)], ids=str)
def test_nothing_in_nothing_out(run, shape):
    result, grad_scores, grad_k = run(torch.zeros(shape), 2.0, torch.ones(shape, dtype=torch.bool))
    assert result.shape == grad_scores.shape == shape
    assert grad_k.shape == shape[:-1] and not grad_k.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(run, settings, dtype):
    scores = torch.randn(2, 23).to(dtype)
    result, grad_scores, _ = run(scores, torch.tensor([3.0, 4.0], dtype=dtype))
    expected, grad_expected, _ = run(scores.float(), torch.tensor([3.0, 4.0]))
    assert result.dtype == torch.float32 and torch.equal(result, expected)
    assert grad_scores.dtype == dtype
    # Triton's interpreter cuts bfloat16 off where the compiled kernel rounds
    cut = settings["implementation"] == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available()
    assert torch.allclose(grad_scores.float(), grad_expected.to(dtype).float(), rtol=2**-7 if cut else 0, atol=0)


@pytest.mark.parametrize("n_iters", [1, 6])
def test_nan_spoils_its_row_and_no_other(run, n_iters):
    scores, mask = torch.randn(2, 20), torch.rand(2, 20) > 0.3
    mask[1, 4] = True
    clean = run(scores, 3.0, mask, n_iters=n_iters)
    scores[1, 4] = float("nan")
    actual = run(scores, 3.0, mask, finite=False, n_iters=n_iters)
    assert torch.equal(actual[0][0], clean[0][0]) and torch.equal(actual[1][0], clean[1][0])
    assert actual[0][1][mask[1]].isnan().all() and not actual[0][1][~mask[1]].any()
    assert actual[1][1][mask[1]].isnan().all() and not actual[1][1][~mask[1]].any()


def test_a_budget_of_nan_spoils_its_row(run):
    result, grad_scores, _ = run(torch.randn(2, 9), torch.tensor([float("nan"), 2.0]), finite=False)
    assert result[0].isnan().all() and grad_scores[0].isnan().all()
    assert result[1].isfinite().all() and grad_scores[1].isfinite().all()


def test_there_is_no_second_derivative_to_be_silently_wrong(settings):
    if settings["implementation"] == "reference":
        pytest.skip("autograd goes through the reference as often as asked")
    device = "cuda" if settings["implementation"] == "triton" and torch.cuda.is_available() else "cpu"
    scores = torch.randn(2, 6, device=device, requires_grad=True)
    result = soft_topk(scores, 2.0, **SETTINGS, **settings)
    (gradient,) = torch.autograd.grad(result.square().sum(), scores, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()
