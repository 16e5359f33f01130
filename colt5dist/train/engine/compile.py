"""torch.compile for the model's layers, with a cache that survives restarts."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from colt5dist.files import cache_folder
from colt5dist.model.causal_colt5 import CausalLayer
from colt5dist.model.decoder import DecoderLayer
from colt5dist.model.encoder import ConditionalEncoderLayer, DenseEncoderLayer, LightEncoderLayer

LAYERS = (ConditionalEncoderLayer, DenseEncoderLayer, LightEncoderLayer, DecoderLayer, CausalLayer)
"""Modules that are compiled, each by itself: layers of one kind are alike, so that one compilation serves them all."""
LOSS_TOLERANCE = 2e-3
"""Relative."""
NORM_TOLERANCE = 0.3
"""Relative, of the norm of one parameter's gradient."""
NORM_FLOOR = 2e-3
"""Share of the norm of all gradients, by which a single one may differ besides."""
MOST_FORMS = 64
"""Compiled forms of one piece of code (lengths, with and without a mask, with random routing one a layer)."""


def compile_layers(model: nn.Module, *, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile every layer's forward when it is first called; one graph a layer, or an error.

    Args:
        model: holds the layers; each gets another `forward`.
        backend: of `torch.compile`.
    """
    torch._dynamo.config.recompile_limit = MOST_FORMS
    torch._dynamo.config.accumulated_recompile_limit = 16 * MOST_FORMS
    for layer in model.modules():
        if isinstance(layer, LAYERS):
            layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False, backend=backend)  # type: ignore


def restore_layers(model: nn.Module) -> None:
    """Undo `compile_layers`."""
    for layer in model.modules():
        if isinstance(layer, LAYERS):
            vars(layer).pop("forward", None)


@contextmanager
def without_compiled_code() -> Iterator[None]:
    """Run compiled layers as they are written: for passes so rare that a compilation would not pay."""
    with torch.compiler.set_stance("force_eager"):
        yield


@dataclass(frozen=True)
class PassNumbers:
    """What a forward and backward pass computed, to be compared with another over the same micro-batch."""

    loss: torch.Tensor
    """Sum of the token losses, a scalar on the device."""
    gradient_norms: dict[str, torch.Tensor]
    """Norm of each parameter's gradient, scalars on the device."""


def difference(fast: PassNumbers, slow: PassNumbers) -> str | None:
    """What differs by more than rounding explains, as text; None where nothing does. Waits for the device.

    A compiler that loses or repeats a gradient is noticed so before it trains: PyTorch 2.11 has lost some. In bf16 a
    near-tie of routing scores may fall the other way, which moves the loss by less than 2e-3 of it, and the norms of
    small gradients by more. Where the slow pass is not finite itself, there is nothing to compare.
    """
    names = list(slow.gradient_norms)
    ours = [float(fast.loss), *torch.stack([fast.gradient_norms[name] for name in names]).tolist()]
    theirs = [float(slow.loss), *torch.stack([slow.gradient_norms[name] for name in names]).tolist()]
    if not all(map(math.isfinite, theirs)):
        return None
    if not abs(ours[0] - theirs[0]) <= LOSS_TOLERANCE * abs(theirs[0]):
        return f"the loss is {ours[0]:g}, not {theirs[0]:g}"
    total = math.hypot(*theirs[1:])
    for name, here, there in zip(names, ours[1:], theirs[1:], strict=True):
        lost = here == 0 and there > 0
        if lost or not abs(here - there) <= NORM_TOLERANCE * max(here, there) + NORM_FLOOR * total:
            return f"the gradient of {name} has norm {here:g}, not {there:g}"
    return None


def use_cache() -> None:
    """Keep compiled code in colt5dist's cache folder, unless the environment names another."""
    folder = cache_folder() / "compiled"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
