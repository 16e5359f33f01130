"""Gradients of the layers under ZeRO-3, as how far they are from those of plain modules; started by
test_zero3_layers.py.

    torchrun --nproc-per-node 2 tests/nn/zero3_layers.py OUTPUT
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from colt5dist.model.activation_checkpointing import run_layer
from colt5dist.nn import (
    ConditionalRoutedAutoregressiveBlock,
    ConditionalRoutedCrossAttention,
    ConditionalRoutedImageAttention,
    ConditionalRoutedTransformerBlock,
)
from colt5dist.train.ranks import finish_process_group, initialise_process_group, ranks_from_environment

D, N = 16, 64
HEADS = {"light_heads": 2, "light_dim_head": 8, "heavy_heads": 2, "heavy_dim_head": 8}
ROUTER = {"router_kwargs": {"eps": 1.0}, "router_straight_through": False}


class Layers(nn.Module):
    """Two blocks, cross-attention to what stands before them, image attention on the tokens as a map, and a decoder's
    block."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        budgets = {"num_heavy_attn_tokens_q": 8, "num_heavy_attn_tokens_kv": 16, "num_heavy_ff_tokens": 8}
        self.blocks = nn.ModuleList(
            ConditionalRoutedTransformerBlock(D, **budgets, **HEADS, **ROUTER, light_window_size=16) for _ in range(2)
        )
        self.cross = ConditionalRoutedCrossAttention(
            D, num_tokens_q=8, num_tokens_kv=8, num_sets_kv=2, dim_head=8, heads=2, **ROUTER
        )
        self.image = ConditionalRoutedImageAttention(
            D, num_heavy_tokens_q=8, num_heavy_tokens_kv=8, light_window_size=4, **HEADS, **ROUTER
        )
        self.causal = ConditionalRoutedAutoregressiveBlock(D, **budgets, **HEADS, **ROUTER, light_window_size=16)

    def forward(self, context: Tensor) -> Tensor:
        """context (b, N, D) -> (b, N, D)."""
        x = context
        for block in self.blocks:
            x = run_layer(block, x, activation_checkpointing=self.mode)
        x = x + run_layer(self.cross, x, context, activation_checkpointing=self.mode)
        # longer budgets than tokens: nothing is routed, and the null token is not used
        short = run_layer(self.blocks[0], x[:, :4], activation_checkpointing=self.mode)
        x = x + run_layer(self.image, x.unflatten(1, (8, 8)), activation_checkpointing=self.mode).flatten(1, 2)
        # a single window has no heavy branch
        for tokens in (x[:, :16], x):
            short = short.mean(1, keepdim=True) + run_layer(self.causal, tokens, activation_checkpointing=self.mode)
        return x + short


def gradients(module: nn.Module, loss: Tensor, full: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
    """The gradient of every parameter."""
    found = {name: full(parameter) for name, parameter in module.named_parameters()}
    assert loss.isfinite()
    return {name: torch.zeros(()) if grad is None else grad.detach().clone() for name, grad in found.items()}


def main(output: Path) -> None:
    """Compare, in each mode of activation checkpointing, and write the largest relative difference of a gradient."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    ranks = ranks_from_environment()
    initialise_process_group(ranks, 5)
    whole = torch.randn(2 * ranks.world_size, N, D, generator=torch.Generator().manual_seed(1))
    mine = whole[ranks.rank :: ranks.world_size]
    settings = {
        "train_micro_batch_size_per_gpu": len(mine),
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    results = {}
    for mode in ("none", "full", "full_keep_routing"):
        torch.manual_seed(0)
        with deepspeed.zero.Init(config_dict_or_path=settings):
            sharded = Layers(mode)
        engine, *_ = deepspeed.initialize(
            model=sharded, optimizer=torch.optim.SGD(sharded.parameters(), lr=0.1), config=settings
        )
        plain = Layers("none")
        weights = {name: safe_get_full_fp32_param(p) for name, p in engine.module.named_parameters()}
        plain.load_state_dict(weights, strict=True)
        loss = engine(mine).square().mean()
        engine.backward(loss)
        actual = gradients(engine.module, loss, safe_get_full_grad)
        expected_loss = plain(whole).square().mean()
        expected_loss.backward()
        expected = gradients(plain, expected_loss, lambda parameter: parameter.grad)
        results[mode] = {
            name: ((actual[name] - wanted).norm() / (wanted.norm() + 1e-12)).item() for name, wanted in expected.items()
        }
    if ranks.is_first:
        output.write_text(json.dumps(results))
    dist.barrier()
    finish_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
