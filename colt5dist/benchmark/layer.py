"""Time of the conditional block in bf16, compared with colt5-attention's and with a dense flash-attention block.

Forward and backward are timed together, for dimension 768: light attention with 4 heads of 64 within 64 tokens, heavy
attention with 8 heads of 64; budgets of n/16 queries, n/8 keys/values and n/16 feed-forward tokens for n tokens. Each
result is compared with that of the same layer in float32 with the same bf16 weights. `wall` includes the host's time,
`GPU` is the GPU's work only. "CUDA graphs" is `mode="reduce-overhead"` of torch.compile, which helps where the host
takes longer to launch the kernels than the GPU takes to run them.
"""

import argparse
import copy
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from colt5dist.benchmark import Row, measure, relative_error, report
from colt5dist.nn import ConditionalRoutedTransformerBlock, FeedForward, SelfAttention
from colt5dist.nn.interop import load_colt5_attention

LEFT_OUT_NAMES = ("colt5-attention", "dense", "compiled")
HEADS: dict[str, Any] = {
    "light_heads": 4,
    "light_dim_head": 64,
    "light_window_size": 128,
    "heavy_heads": 8,
    "heavy_dim_head": 64,
}


class DenseBlock(nn.Module):
    """A pre-norm Transformer block with full self-attention: the usual sizes of a dense layer of this dimension.

    Args:
        dim: width of the block, a multiple of 64; heads have 64 dimensions.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention = SelfAttention(dim, 64, dim // 64, prenorm=True)
        self.feed_forward = FeedForward(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (batch, tokens, dim) to (batch, tokens, dim)."""
        x = x + self.attention(x)
        return x + self.feed_forward(x)


class Float32Routing(nn.Module):
    """A router of colt5-attention that computes in float32: with 16 bits its scores tie and its kernels do not compile.

    Args:
        router: the router.
    """

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router
        self.route_back = router.route_back

    def forward(self, x: Tensor, **arguments: object) -> tuple:
        """Route x (batch, tokens, dim); the results have the dtype of x."""
        result = self.router(x.float(), **arguments)
        return result._replace(scores=result.scores.to(x.dtype), routed_tokens=result.routed_tokens.to(x.dtype))


def colt5_attention_block(dim: int, budgets: dict[str, Any], use_triton: bool) -> nn.Module:
    """Return colt5-attention's block in float32."""
    import colt5_attention

    return colt5_attention.ConditionalRoutedTransformerBlock(
        dim, **budgets, **HEADS, use_triton=use_triton, use_flash_attn=True
    )


def rounded(module: nn.Module) -> nn.Module:
    """Return the module with its weights rounded to bf16 and stored in float32."""
    return module.bfloat16().float()


def in_bf16(block: nn.Module) -> nn.Module:
    """Return a copy of colt5-attention's block in bf16, with its routers in float32."""
    block = copy.deepcopy(block).bfloat16()
    for owner in (block.conditional_attn, block.conditional_ff):
        for name in ("q_router", "kv_router", "router"):
            if hasattr(owner, name):
                setattr(owner, name, Float32Routing(getattr(owner, name).float()))
    return block


def step(module: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], x: Tensor) -> list[Tensor]:
    """Return the output, the gradient of x, and those of the parameters."""
    out = module(x)
    # the gradient of half the sum of squares, so that gradients have a usable size in 16 bits
    return [out, *torch.autograd.grad(out, (x, *parameters), out.detach())]


def main(arguments: list[str]) -> int:
    """Run the benchmark and return the exit status, 1 if a result is wrong."""
    parser = argparse.ArgumentParser(prog="benchmark.py layer", description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["2x16384", "1x65536"], metavar="BxN", help="samples x tokens")
    parser.add_argument("--dim", type=int, default=768, help="width of the block, a multiple of 64")
    parser.add_argument("--repeats", type=int, default=30, help="measurements, of which the median is taken")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="NAME", help=f"leave out some of: {', '.join(LEFT_OUT_NAMES)}"
    )
    parser.add_argument("--output", type=Path, help="folder for the figures as JSON and as a plot")
    options = parser.parse_args(arguments)

    if "peer" in options.without:  # the earlier name of it
        options.without.append("colt5-attention")
    if "colt5-attention" not in options.without and importlib.util.find_spec("colt5_attention") is None:
        parser.error(
            "package colt5-attention is not installed; pip install 'colt5dist[bench]', or --without colt5-attention"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = [tuple(int(number) for number in shape.split("x")) for shape in options.shapes]
    rows = chain.from_iterable(
        measure_shape(batch, n, options.dim, device, options.repeats, options.without) for batch, n in shapes
    )
    return report(f"conditional block, forward + backward, dim {options.dim}, bf16", rows, options.output)


def measure_shape(
    batch: int, n: int, dim: int, device: torch.device, repeats: int, without: list[str]
) -> Iterator[Row]:
    """Yield the lines of the table for one shape (batch samples of n tokens)."""
    torch.manual_seed(0)
    budgets: dict[str, Any] = {
        "num_heavy_attn_tokens_q": n // 16,
        "num_heavy_attn_tokens_kv": n // 8,
        "num_heavy_ff_tokens": n // 16,
    }
    x = torch.randn(batch, n, dim, device=device, dtype=torch.bfloat16).requires_grad_()
    wide_x = x.detach().float().requires_grad_()
    ours = rounded(ConditionalRoutedTransformerBlock(dim, **budgets, **HEADS))
    # name, the module in float32, the module that is timed
    candidates: list[tuple[str, nn.Module, nn.Module]] = []
    if "colt5-attention" not in without:
        theirs = rounded(colt5_attention_block(dim, budgets, use_triton=device.type == "cuda")).to(device)
        load_colt5_attention(ours, theirs.state_dict())
        candidates.append(("colt5-attention, routing in float32", theirs, in_bf16(theirs)))
    ours = ours.to(device)
    candidates.insert(0, ("conditional block", ours, copy.deepcopy(ours).bfloat16()))
    if "dense" not in without:
        dense = rounded(DenseBlock(dim)).to(device)
        candidates.append(("dense block, flash attention", dense, copy.deepcopy(dense).bfloat16()))
    for name, wide, module in candidates:
        expected = [result.detach() for result in step(wide, [], wide_x)]
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        forms: dict[str, Callable[[Tensor], Tensor]] = {name: module}
        if "compiled" not in without and "colt5-attention" not in name:
            # otherwise the second shape would be compiled with dynamic sizes
            torch.compiler.reset()
            forms[f"{name}, compiled"] = torch.compile(module, fullgraph=True)
            if device.type == "cuda":
                forms[f"{name}, compiled, CUDA graphs"] = torch.compile(module, fullgraph=True, mode="reduce-overhead")
        for form, function in forms.items():
            call = partial(step, function, parameters, x)
            for _ in range(3):
                # the first two calls are those that a CUDA graph is recorded from, the third is the graph's own
                out, grad, *_ = call()
            # for the gradient, the median row: at the routers' temperature of 0.03, the rounding of x changes some soft
            # scores, and their part of the gradient, by as much as their own size
            error = max(relative_error([out], expected[:1]), relative_error([grad], expected[1:], share=0.5))
            yield measure(form, f"{batch} x {n:,}", call, error, repeats)
