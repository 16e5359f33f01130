"""What the tests of the soft top-k operators share."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from colt5dist.ops import row_split
from colt5dist.ops.soft_topk import soft_topk


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Freshly allocated tensors hold NaN, so that an element that nothing wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def result_and_gradients() -> Callable[..., tuple[Tensor, Tensor, Tensor | None]]:
    """soft_topk's result, and for a given upstream gradient those to scores and, where it is a tensor, to k."""

    def run(scores: Tensor, k: float | Tensor, grad: Tensor, **settings) -> tuple[Tensor, Tensor, Tensor | None]:
        scores = scores.detach().requires_grad_()
        inputs = [scores]
        if isinstance(k, Tensor):
            k = k.detach().requires_grad_()
            inputs.append(k)
        result = soft_topk(scores, k, **settings)
        gradients = torch.autograd.grad(result, inputs, grad.to(result.dtype))
        return result.detach(), gradients[0], gradients[1] if len(gradients) > 1 else None

    return run


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton blocks so small that rows of tens of scores take several tiles, the last of them not full."""
    for module in ("triton", "newton_triton"):
        monkeypatch.setattr(f"colt5dist.ops.soft_topk.{module}.TILE_BLOCK", 8)
        monkeypatch.setattr(f"colt5dist.ops.soft_topk.{module}.MOST_TERMS", 4)
    monkeypatch.setattr(row_split, "LONGEST_WHOLE_ROW", 16)
    monkeypatch.setattr(row_split, "STREAMED_BLOCK", 16)
    row_split.split_rows.cache_clear()
    yield
    row_split.split_rows.cache_clear()
