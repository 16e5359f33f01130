"""Coordinate descent: reference, scalar state, Triton (interpreted without a GPU) and the published package agree."""

import pytest
import torch
from colt5_attention.coor_descent import coor_descent

from colt5dist.errors import ConfigError
from colt5dist.ops.soft_topk import soft_topk
from colt5dist.ops.soft_topk.schedule import epsilon_schedule, segment_ends

CONSTANT = {"eps": 1.0, "n_iters": 50}
SCALED = {"eps": 0.03, "eps_init": 4.0, "eps_decay": 0.7, "n_iters": 20}
SCALED_8 = {"eps": 0.1, "eps_init": 4.0, "eps_decay": 0.5, "n_iters": 8}
SHARP = {"eps": 0.1, "n_iters": 7}
ONE_ITERATION = {"eps": 0.5, "n_iters": 1, "eps_init": 2.0, "eps_decay": 0.5}
SCHEDULES = {"constant-T50": CONSTANT, "scaled-T20": SCALED, "sharp-T7": SHARP, "one-iteration": ONE_ITERATION}
SHAPES = {"R1-N1": (1, 1), "R3-N17": (3, 17), "R2x2-N33": (2, 2, 33)}
INTERPRETED_SHAPES = {"R1-N1": (1, 1), "R2-N17": (2, 17), "R2x1-N33": (2, 1, 33)}
"""Two rows tell whether rows are mixed up, and the interpreter takes its time for each."""


def case(shape, masked, dtype=torch.float64, ties=False):
    generator = torch.Generator().manual_seed(shape[-1] + masked)
    scores = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
    scores = (scores.round() if ties else scores).to(dtype)
    k = 0.2 + torch.rand(shape[:-1], generator=generator, dtype=torch.float64) * shape[-1] * 0.6
    mask = torch.rand(shape, generator=generator) > 0.3 if masked else None
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    return scores, k, mask, grad


def assert_near(actual, expected, tolerance, grad, eps):
    """Norms of the errors relative to those of the expected values, or to a hundredth of what a gradient can be."""
    floors = {"result": 0.0, "scores' gradient": 1e-2 * grad.norm() / eps, "k's gradient": 1e-2 * grad.norm() / eps}
    for (name, floor), one, other in zip(floors.items(), actual, expected, strict=True):
        error = (one.double() - other.double()).norm() / other.double().norm().clamp(min=float(floor))
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_scalar_state_is_the_published_form_in_float64(result_and_gradients, schedule, shape, masked, ties):
    scores, k, mask, grad = case(shape, masked, ties=ties)
    expected = result_and_gradients(scores, k, grad, mask=mask, implementation="reference", **schedule)
    actual = result_and_gradients(scores, k, grad, mask=mask, implementation="scalar", **schedule)
    assert_near(actual, expected, 1e-12, grad, schedule["eps"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("shape", INTERPRETED_SHAPES.values(), ids=INTERPRETED_SHAPES)
@pytest.mark.parametrize("schedule", [SCALED_8, SHARP, ONE_ITERATION], ids=["scaled-T8", "sharp-T7", "one-iteration"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled, not interpreted, where there is a GPU")
def test_interpreted_triton_is_the_scalar_state(
    result_and_gradients, small_blocks, poisoned_memory, schedule, shape, masked, dtype
):
    scores, k, mask, grad = case(shape, masked, dtype)
    expected = result_and_gradients(scores.double(), k, grad, mask=mask, implementation="scalar", **schedule)
    actual = result_and_gradients(scores, k, grad, mask=mask, implementation="triton", **schedule)
    assert actual[0].dtype == actual[1].dtype == dtype
    assert_near(actual, expected, 1e-12 if dtype == torch.float64 else 2e-5, grad, schedule["eps"])


@pytest.mark.parametrize("implementation", ["reference", "scalar"])
def test_float32_is_near_float64(result_and_gradients, implementation):
    scores, k, mask, grad = case((4, 300), True, torch.float32)
    expected = result_and_gradients(scores.double(), k, grad, mask=mask, implementation="scalar", **SCALED)
    actual = result_and_gradients(scores, k, grad, mask=mask, implementation=implementation, **SCALED)
    # the vector form rounds its state to float32, n values a row; the scalar form keeps its state in float64
    assert_near(actual, expected, 2e-5 if implementation == "scalar" else 1e-3, grad, SCALED["eps"])


@pytest.mark.parametrize("implementation", ["reference", "scalar"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("schedule", [CONSTANT, SCALED], ids=["constant-T50", "scaled-T20"])
def test_parity_with_the_published_package(result_and_gradients, schedule, masked, implementation):
    scores, k, mask, grad = case((3, 41), masked)
    theirs_scores, theirs_k = scores.clone().requires_grad_(), k.clone().requires_grad_()
    theirs = coor_descent(theirs_scores, k=theirs_k, mask=mask, **schedule)
    expected = (theirs.detach(), *torch.autograd.grad(theirs, (theirs_scores, theirs_k), grad))
    actual = result_and_gradients(scores, k, grad, mask=mask, implementation=implementation, **schedule)
    assert_near(actual, expected, 1e-12, grad, schedule["eps"])


def test_gradcheck_of_the_scalar_state():
    scores, k, mask, _ = case((2, 9), True)
    scores.requires_grad_()
    k.requires_grad_()
    settings = {"mask": mask, "eps": 0.4, "eps_init": 2.0, "eps_decay": 0.7, "n_iters": 8, "implementation": "scalar"}
    assert torch.autograd.gradcheck(lambda scores, k: soft_topk(scores, k, **settings), (scores, k))


@pytest.mark.parametrize("implementation", ["scalar", "triton"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_gradients_are_bit_equal_for_every_number_of_segments(
    result_and_gradients, small_blocks, poisoned_memory, implementation, masked
):
    device = "cuda" if implementation == "triton" and torch.cuda.is_available() else "cpu"
    scores, k, mask, grad = (x if x is None else x.to(device) for x in case((2, 19), masked, torch.float32))
    n_iters = 3 if implementation == "triton" and device == "cpu" else 5  # segments of 1, 2 and 3 iterations, at least
    settings = {"eps": 0.2, "eps_init": 4.0, "eps_decay": 0.5, "n_iters": n_iters, "implementation": implementation}
    expected = result_and_gradients(scores, k, grad, mask=mask, **settings)
    for segments in range(1, n_iters + 1):
        actual = result_and_gradients(scores, k, grad, mask=mask, checkpoint_segments=segments, **settings)
        for one, other in zip(actual, expected, strict=True):
            assert torch.equal(one, other), segments


@pytest.mark.parametrize("segments", [1, 3, 20])
def test_saved_bytes_are_two_scalars_a_segment(segments):
    scores = torch.randn(4, 1000, requires_grad=True)
    k = torch.full((4,), 100.0, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 1000) > 0.1
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        soft_topk(scores, k, mask=mask, implementation="scalar", checkpoint_segments=segments, **SCALED)
    inputs = {scores.data_ptr(), mask.data_ptr()}
    beside = [tensor for tensor in saved if tensor.data_ptr() not in inputs and tensor.shape != k.shape]
    assert sum(tensor.nbytes for tensor in beside) == 4 * segments * 16
    # of k, its float64 form and what clamping it needs: scalars of the rows as well
    assert sum(tensor.data_ptr() in inputs for tensor in saved) == 2


@pytest.mark.parametrize(
    ("n_iters", "segments", "ends"), [(20, 4, [5, 10, 15, 20]), (7, 3, [2, 4, 7]), (3, 3, [1, 2, 3]), (5, 1, [5])]
)
def test_segment_ends(n_iters, segments, ends):
    assert segment_ends(n_iters, segments) == ends


def test_epsilon_schedule_ends_one_decay_after_the_last_iteration():
    assert epsilon_schedule(0.3, 4.0, 0.5, 3) == [4.0, 2.0, 1.0, 0.5]
    assert epsilon_schedule(0.8, 4.0, 0.5, 3) == [4.0, 2.0, 1.0, 0.8]
    assert epsilon_schedule(1.0, 0.1, 0.5, 2) == [1.0, 1.0, 1.0]


def test_a_number_k_is_a_tensor_k_that_broadcasts():
    scores, _, mask, _ = case((2, 3, 11), True)
    expected = soft_topk(scores, 2.5, mask=mask)
    for k in (torch.tensor(2.5), torch.full((3,), 2.5), torch.full((2, 1), 2.5)):
        k.requires_grad_()
        actual = soft_topk(scores, k, mask=mask)
        assert torch.equal(actual, expected)
        actual.sum().backward()
        assert k.grad.shape == k.shape


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"eps": 0.0}, "eps:"),
        ({"eps": float("inf")}, "eps:"),
        ({"eps": float("nan")}, "eps:"),
        ({"eps_init": -1.0}, "eps_init:"),
        ({"eps_init": float("inf")}, "eps_init:"),
        ({"eps_decay": 1.1}, "eps_decay:"),
        ({"n_iters": 0}, "n_iters:"),
        ({"n_iters": 4, "checkpoint_segments": 5}, "checkpoint_segments:"),
        ({"solver": "newtn"}, "solver:"),
        ({"implementation": "cuda"}, "implementation:"),
        ({"implementation": "reference", "solver": "newton"}, "implementation:"),
        ({"k": 0.0}, "k:"),
        ({"k": float("inf")}, "k:"),
        ({"k": float("nan")}, "k:"),
        ({"k": True}, "k:"),
        ({"k": torch.ones(3)}, "k:"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, "mask:"),
        ({"mask": torch.ones(2, 5)}, "mask:"),
        ({"scores": torch.ones(2, 5, dtype=torch.int64)}, "scores:"),
    ],
    ids=lambda value: value.rstrip(":") if isinstance(value, str) else "",
)
def test_wrong_arguments_are_named(change, named):
    with pytest.raises(ConfigError, match=f"^{named}"):
        soft_topk(**{"scores": torch.zeros(2, 5), "k": 1.0, **change})


def test_triton_without_a_device_says_what_to_use(monkeypatch):
    monkeypatch.setattr("colt5dist.ops.implementation.INTERPRETED", False)
    with pytest.raises(ConfigError, match=r"implementation: 'triton' needs CUDA tensors.*use 'scalar'"):
        soft_topk(torch.zeros(2, 5), 1.0, implementation="triton")
