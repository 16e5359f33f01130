"""The conditional block, forward and backward in bf16, beside the package colt5-attention and a dense flash block.

Dimension 768, light attention 4 x 64 within 64 tokens, heavy attention 8 x 64; budgets n/16 queries, n/8 keys/values,
n/16 tokens of the feed-forward. Each result is compared with the same layer's in float32, of the same bf16 weights.
`wall` counts the host's time, `GPU` only the device's work. Compiled with CUDA graphs is `mode="reduce-overhead"` of
torch.compile, which is what a host needs that takes longer to launch the kernels than the GPU to run them.
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

HEADS: dict[str, Any] = {
    "light_heads": 4,
    "light_dim_head": 64,
    "light_window_size": 128,
    "heavy_heads": 8,
    "heavy_dim_head": 64,
}


class DenseBlock(nn.Module):
    """x + full self-attention, then + feed-forward, of the sizes that a dense layer of the same dimension has."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention = SelfAttention(dim, 64, dim // 64, prenorm=True)
        self.feed_forward = FeedForward(dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (b, n, dim) -> (b, n, dim)."""
        x = x + self.attention(x)
        return x + self.feed_forward(x)


class Float32Routing(nn.Module):
    """A router of the peer that computes in float32: in 16 bits its scores tie, and its kernels do not compile."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router
        self.route_back = router.route_back

    def forward(self, x: Tensor, **arguments: object) -> tuple:
        """As the router, results of the type of x."""
        result = self.router(x.float(), **arguments)
        return result._replace(scores=result.scores.to(x.dtype), routed_tokens=result.routed_tokens.to(x.dtype))


def peer_block(dim: int, budgets: dict[str, Any], use_triton: bool) -> nn.Module:
    """The peer's block in float32."""
    import colt5_attention

    return colt5_attention.ConditionalRoutedTransformerBlock(
        dim, **budgets, **HEADS, use_triton=use_triton, use_flash_attn=True
    )


def rounded(module: nn.Module) -> nn.Module:
    """The module with its weights rounded to bf16, in float32."""
    return module.bfloat16().float()


def in_bf16(peer: nn.Module) -> nn.Module:
    """A copy of the peer's block in bf16 whose routers stay in float32."""
    peer = copy.deepcopy(peer).bfloat16()
    for owner in (peer.conditional_attn, peer.conditional_ff):
        for name in ("q_router", "kv_router", "router"):
            if hasattr(owner, name):
                setattr(owner, name, Float32Routing(getattr(owner, name).float()))
    return peer


def step(module: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], x: Tensor) -> list[Tensor]:
    """The output, the gradient to x, and those to the parameters."""
    out = module(x)
    # of the mean square, so that gradients are of a usable size in 16 bits
    return [out, *torch.autograd.grad(out, (x, *parameters), out.detach())]


def main(arguments: list[str]) -> int:
    """Run the benchmark; the exit status, 1 if a result is wrong."""
    parser = argparse.ArgumentParser(prog="benchmark.py layer", description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["2x16384", "1x65536"], metavar="BxN", help="samples x tokens")
    parser.add_argument("--dim", type=int, default=768, help="numbers a token, a multiple of 64")
    parser.add_argument("--repeats", type=int, default=30, help="calls of which the median is taken")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="leave out: peer, dense, compiled")
    parser.add_argument("--output", type=Path, help="folder for the figures as JSON and as a plot")
    options = parser.parse_args(arguments)

    if "peer" not in options.without and importlib.util.find_spec("colt5_attention") is None:
        parser.error("package colt5-attention is not installed; pip install 'colt5dist[bench]', or --without peer")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = [tuple(int(number) for number in shape.split("x")) for shape in options.shapes]
    rows = chain.from_iterable(
        measure_shape(batch, n, options.dim, device, options.repeats, options.without) for batch, n in shapes
    )
    return report(f"conditional block, forward + backward, dim {options.dim}, bf16", rows, options.output)


def measure_shape(
    batch: int, n: int, dim: int, device: torch.device, repeats: int, without: list[str]
) -> Iterator[Row]:
    """The lines of the table for one shape, one after another."""
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
    if "peer" not in without:
        peer = rounded(peer_block(dim, budgets, use_triton=device.type == "cuda")).to(device)
        load_colt5_attention(ours, peer.state_dict())
        candidates.append(("colt5-attention, routing in float32", peer, in_bf16(peer)))
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
            # or a second shape would be compiled for every shape
            torch.compiler.reset()
            forms[f"{name}, compiled"] = torch.compile(module, fullgraph=True)
            if device.type == "cuda":
                forms[f"{name}, compiled, CUDA graphs"] = torch.compile(module, fullgraph=True, mode="reduce-overhead")
        for form, function in forms.items():
            call = partial(step, function, parameters, x)
            for _ in range(3):
                # the third is what a CUDA graph gives, the first two are what it is recorded of
                out, grad, *_ = call()
            # of the gradient the median row: at the routers' temperature of 0.03, the rounding of x moves some soft
            # scores, and what these add to the gradient, by their own size
            error = max(relative_error([out], expected[:1]), relative_error([grad], expected[1:], share=0.5))
            yield measure(form, f"{batch} x {n:,}", call, error, repeats)
