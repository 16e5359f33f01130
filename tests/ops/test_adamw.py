"""AdamW in one pass over memory against torch.optim.AdamW."""

from typing import Any

import pytest
import torch
from torch import Tensor

from colt5dist.ops.adamw import adamw_
from colt5dist.ops.adamw.triton import BLOCK

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = ("reference", "triton")
NAMES = ("weights", "gradient", "exp_avg", "exp_avg_sq")
SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def gradients(size: int, steps: int, device: str) -> Tensor:
    """(steps, size) gradients of widely different magnitudes."""
    generator = torch.Generator().manual_seed(size)
    magnitudes = 10.0 ** torch.empty(size).uniform_(-6, 2, generator=generator)
    return (torch.randn(steps, size, generator=generator) * magnitudes).to(device)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected tensor; NaN anywhere gives NaN."""
    difference = torch.linalg.vector_norm(actual.double() - expected.double())
    return float(difference / torch.linalg.vector_norm(expected.double()))


def compare(size: int, weight_decay: float, scale: float, copied: torch.dtype | None, **how: Any) -> None:
    """Fifty steps of the operator and of torch.optim.AdamW, whose gradients are multiplied by `scale` before.

    The rate rises, as in a warm-up.
    """
    device = how.pop("device", DEVICE)
    settings = {**SETTINGS, "weight_decay": weight_decay}
    weights = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(device)
    exp_avg, exp_avg_sq = torch.zeros_like(weights), torch.zeros_like(weights)
    copy = None if copied is None else torch.full_like(weights, float("nan"), dtype=copied)
    expected = weights.clone().requires_grad_()
    optimizer = torch.optim.AdamW([expected], fused=True, **settings)
    for number, gradient in enumerate(gradients(size, 50, device), start=1):
        settings["lr"] = optimizer.param_groups[0]["lr"] = SETTINGS["lr"] * number / 50
        expected.grad = gradient * scale
        optimizer.step()
        given = gradient.clone()
        clear = number % 2 == 0
        adamw_(weights, given, exp_avg, exp_avg_sq, step=number, scale=scale, copy=copy, clear=clear, **settings, **how)
        assert torch.equal(given, torch.zeros_like(given) if clear else gradient)
    state = optimizer.state[expected]
    assert relative_error(weights, expected.detach()) <= 1e-6
    assert relative_error(exp_avg, state["exp_avg"]) <= 1e-6
    assert relative_error(exp_avg_sq, state["exp_avg_sq"]) <= 1e-6
    if copy is not None:
        assert torch.equal(copy, weights.to(copy.dtype))


@pytest.mark.parametrize(("weight_decay", "scale"), [(0.0, 1.0), (0.1, 0.3)])
@pytest.mark.parametrize("size", [1, 37, BLOCK, BLOCK + 37])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_fifty_steps_are_those_of_torch(implementation: str, size: int, weight_decay: float, scale: float) -> None:
    # float16, because Triton's interpreter cuts bfloat16 off instead of rounding it
    copied = torch.float16 if scale == 1 else None
    compare(size, weight_decay, scale, copied, implementation=implementation)


@pytest.mark.gpu
@pytest.mark.parametrize("copied", [torch.bfloat16, torch.float32, None], ids=str)
def test_fifty_steps_are_those_of_torch_on_a_gpu(copied: torch.dtype | None) -> None:
    """Of millions of elements: the grid is larger than the GPU, and its last block is not full."""
    compare(1000 * BLOCK + 37, 0.1, 0.3, copied, device="cuda")


@pytest.mark.gpu
def test_one_kernel_serves_all_steps_on_a_gpu() -> None:
    """Nothing is compiled anew for another step, rate or scale, also where they are 0 or 1."""
    from colt5dist.ops.adamw.triton import _adamw_kernel

    tensors = [torch.zeros(2 * BLOCK, device="cuda") for _ in NAMES]

    def num_kernels() -> int:
        return sum(len(cache[0]) for cache in _adamw_kernel.device_caches.values())

    adamw_(*tensors, step=1, **SETTINGS)
    before = num_kernels()
    assert before > 0
    for step, (lr, decay, scale) in enumerate([(0.0, 0.0, 1.0), (1.0, 1.0, 0.5), (1e-4, 0.1, 16.0)], start=2):
        adamw_(*tensors, step=step, scale=scale, **{**SETTINGS, "lr": lr, "weight_decay": decay})
    assert num_kernels() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient": torch.zeros(4, dtype=torch.bfloat16)}, "gradient: of type torch.bfloat16"),
        ({"exp_avg": torch.zeros(5)}, "exp_avg: of shape"),
        ({"exp_avg_sq": torch.zeros(8)[::2]}, "exp_avg_sq: not contiguous"),
        ({"copy": torch.zeros(3)}, "copy: of shape"),
        ({"copy": torch.zeros(4, dtype=torch.int32)}, "copy: of type torch.int32"),
        ({"step": 0}, "step: 0"),
    ],
    ids=["type", "length", "strides", "length of the copy", "type of the copy", "step"],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {name: torch.zeros(4) for name in NAMES} | {"step": 1} | SETTINGS
    adamw_(**arguments)
    with pytest.raises(ValueError, match=message):
        adamw_(**{**arguments, **change})


def test_the_weights_are_no_copy_of_themselves() -> None:
    weights, *others = (torch.zeros(4) for _ in NAMES)
    with pytest.raises(ValueError, match="copy: is the weights"):
        adamw_(weights, *others, step=1, copy=weights, **SETTINGS)
