"""The compiled kernels on a GPU against float64: random rows, long rows, determinism, CUDA graphs."""

import math

import pytest
import torch

from colt5dist.ops.select_topk import select_topk
from colt5dist.ops.soft_topk import soft_topk
from colt5dist.ops.soft_topk.newton import soft_topk_newton_forward
from colt5dist.ops.soft_topk.scalar_state import soft_topk_scalar_forward

pytestmark = pytest.mark.gpu


def random_case(seed):
    """Rows, budget, mask, upstream gradient and settings: 1-64 rows of 2-70,000 scores, up to a million in all."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return low + (high - low) * torch.rand((), generator=generator).item()

    n = int(math.exp(uniform(math.log(2), math.log(70_000))))
    num_rows = min(int(uniform(1, 65)), 1_000_000 // n)
    scores = torch.randn(num_rows, n, generator=generator) * (1 if seed % 2 else 2**0.5)
    k = (uniform(0.01, 0.6) * n + 0.1) * (0.5 + torch.rand(num_rows, generator=generator))
    mask = torch.rand(num_rows, n, generator=generator) > uniform(0, 0.5) if seed % 3 else None
    grad = torch.randn(num_rows, n, generator=generator)
    eps = math.exp(uniform(math.log(0.02), 0))
    settings = {"eps": eps, "n_iters": int(uniform(1, 61))}
    if seed % 4:
        settings |= {"eps_init": 4.0, "eps_decay": uniform(0.5, 1.0)}
    return scores, k, mask, grad, settings


def thresholds(scores, k, mask, settings):
    """Those scores (rows, iterations) above which an iteration or, the last one, the result clips."""
    if settings["solver"] == "newton":
        return -soft_topk_newton_forward(scores, k, mask, 0.0, settings["eps"])[1].unsqueeze(-1)
    eps_init, eps_decay = settings.get("eps_init", settings["eps"]), settings.get("eps_decay", 1.0)
    n_iters = settings["n_iters"]
    schedule = (settings["eps"], eps_init, eps_decay, n_iters, n_iters)
    return -soft_topk_scalar_forward(scores, k, mask, 0.0, *schedule)[1][..., 0]


def relative_errors(run, scores, k, mask, grad, settings):
    """Errors of Triton in float32 on the GPU against float64, and how many entries were left out.

    An entry within 4 float32 ulp of a threshold may be on its other side, where its gradient is another one.
    """
    wide = [
        x if x is None else x.cuda().double() if x.is_floating_point() else x.cuda() for x in (scores, k, mask, grad)
    ]
    expected = run(wide[0], wide[1], wide[3], mask=wide[2], implementation="scalar", **settings)
    narrow_mask = None if mask is None else mask.cuda()
    actual = run(scores.cuda(), k.cuda(), grad.cuda(), mask=narrow_mask, implementation="triton", **settings)
    near = torch.zeros_like(wide[0], dtype=torch.bool)
    for threshold in thresholds(wide[0], wide[1], wide[2], settings).unbind(-1):
        near |= (wide[0] - threshold.unsqueeze(-1)).abs() <= 4 * 2**-23 * wide[0].abs()
    floors = (0.0, 1e-3 * wide[3].norm() / settings["eps"], 1e-3 * wide[3].norm() / settings["eps"])
    errors = []
    for one, other, floor in zip(actual, expected, floors, strict=True):
        difference = one.double() - other
        if one.shape == near.shape:
            difference = difference.masked_fill(near, 0.0)
        errors.append(float(difference.norm() / other.norm().clamp(min=float(floor))))
    return errors, int(near.sum())


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["coordinate_descent", "newton"])
def test_random_rows(result_and_gradients, poisoned_memory, solver):
    worst, left_out, entries = [0.0, 0.0, 0.0], 0, 0
    for seed in range(200):
        scores, k, mask, grad, settings = random_case(seed)
        settings = settings | {"solver": solver}
        errors, near = relative_errors(result_and_gradients, scores, k, mask, grad, settings)
        left_out += near
        entries += scores.numel()
        worst = [max(pair) for pair in zip(worst, errors, strict=True)]
        assert errors[0] <= 2e-6 and max(errors[1:]) <= 2e-5, (seed, errors, settings, scores.shape)
    print(f"{solver}: worst errors {worst}; {left_out} of {entries} entries left out")
    assert left_out <= entries * 1e-4


@pytest.mark.parametrize("solver", ["coordinate_descent", "newton"])
@pytest.mark.parametrize("n", [131_073, 1_048_576, 4_194_304])
def test_long_rows(result_and_gradients, poisoned_memory, n, solver):
    scores, grad = torch.randn(1, n), torch.randn(1, n)
    settings = {"eps": 0.03, "eps_init": 4.0, "eps_decay": 0.7, "n_iters": 20, "solver": solver}
    errors, _ = relative_errors(result_and_gradients, scores, torch.tensor([n * 9 / 64]), None, grad, settings)
    assert errors[0] <= 2e-6 and max(errors[1:]) <= 2e-5, errors


def test_many_rows(result_and_gradients, poisoned_memory):
    scores, grad = torch.randn(100_000, 3), torch.randn(100_000, 3)
    settings = {"eps": 0.3, "n_iters": 10, "solver": "coordinate_descent"}
    errors, _ = relative_errors(result_and_gradients, scores, torch.full((100_000,), 1.2), None, grad, settings)
    assert errors[0] <= 2e-6 and max(errors[1:]) <= 2e-5, errors


def test_gradients_are_bit_equal_for_every_number_of_segments_and_every_time(result_and_gradients):
    scores, grad = torch.randn(3, 10_001, device="cuda"), torch.randn(3, 10_001, device="cuda")
    k = torch.full((3,), 1400.0, device="cuda")
    settings = {"eps": 0.03, "eps_init": 4.0, "eps_decay": 0.7, "n_iters": 20}
    expected = result_and_gradients(scores, k, grad, **settings)
    for segments in (1, 2, 3, 7, 16, 19, 20, None):
        actual = result_and_gradients(scores, k, grad, checkpoint_segments=segments, **settings)
        for one, other in zip(actual, expected, strict=True):
            assert torch.equal(one, other), segments


@pytest.mark.parametrize("solver", ["coordinate_descent", "newton"])
def test_captured_in_a_cuda_graph(solver):
    scores = torch.randn(2, 5000, device="cuda", requires_grad=True)
    grad = torch.randn(2, 5000, device="cuda")

    def step():
        weights = soft_topk(scores, 700.0, eps=0.1, n_iters=12, solver=solver)
        positions = select_topk(scores, 625)
        return weights, torch.autograd.grad(weights, scores, grad)[0], positions

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        scores.copy_(torch.randn_like(scores))
    graph.replay()
    for one, other in zip(captured, step(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("solver", ["coordinate_descent", "newton"])
@pytest.mark.parametrize("implementation", ["scalar", "triton"])
def test_does_not_wait_for_the_gpu(result_and_gradients, solver, implementation):
    scores, grad = torch.randn(2, 3000, device="cuda"), torch.randn(2, 3000, device="cuda")
    k, mask = torch.full((2,), 300.0, device="cuda"), torch.rand(2, 3000, device="cuda") > 0.1
    settings = {"mask": mask, "n_iters": 5, "solver": solver, "implementation": implementation}
    result_and_gradients(scores, k, grad, **settings)  # compiles, loads modules
    torch.cuda.set_sync_debug_mode("error")
    try:
        result_and_gradients(scores, k, grad, checkpoint_segments=2, **settings)
        result_and_gradients(scores, 300.0, grad, **settings)
        select_topk(scores, 100, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_selection_is_that_of_the_cpu():
    for seed in range(20):
        scores, _, mask, _, _ = random_case(seed)
        scores = scores.round(decimals=seed % 4)
        num_tokens = max(1, scores.shape[-1] // 7)
        on_gpu = select_topk(scores.cuda(), num_tokens, None if mask is None else mask.cuda())
        assert torch.equal(on_gpu.cpu(), select_topk(scores, num_tokens, mask))
