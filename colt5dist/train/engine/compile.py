"""torch.compile for the model's layers, with a cache that survives restarts."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from colt5dist.files import cache_folder
from colt5dist.model.causal_colt5 import CausalLayer
from colt5dist.model.decoder import DecoderLayer
from colt5dist.model.encoder import ConditionalEncoderLayer, DenseEncoderLayer

LAYERS = (ConditionalEncoderLayer, DenseEncoderLayer, DecoderLayer, CausalLayer)
"""Modules that are compiled, each by itself: layers of one kind are alike, so that one compilation serves them all."""
MOST_FORMS = 64
"""Compiled forms of one piece of code (lengths, with and without a mask, with random routing one a layer)."""


def compile_layers(model: nn.Module) -> None:
    """Compile every layer's forward when it is first called; one graph a layer, or an error."""
    _use_cache()
    torch._dynamo.config.recompile_limit = MOST_FORMS
    torch._dynamo.config.accumulated_recompile_limit = 16 * MOST_FORMS
    for layer in model.modules():
        if isinstance(layer, LAYERS):
            layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False)  # type: ignore


def gather_layers_whole(model: nn.Module) -> None:
    """At ZeRO stage 3, have DeepSpeed gather a layer's parameters together, not module by module.

    Its hooks then run Python once per layer, and not inside compiled code.
    """
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, sorted({type(m) for m in model.modules() if isinstance(m, LAYERS)}, key=str))


@contextmanager
def without_compiled_code() -> Iterator[None]:
    """Run compiled layers as they are written: for passes so rare that a compilation would not pay."""
    with torch.compiler.set_stance("force_eager"):
        yield


def _use_cache() -> None:
    """Keep compiled code in colt5dist's cache folder, unless the environment names another."""
    folder = cache_folder() / "compiled"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
