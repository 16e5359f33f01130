"""Time of local attention (GPU only): our Triton kernels, FlexAttention, fused windows and package local-attention.

Forward and backward are timed together. Results are compared with those of the package local-attention in float32.
`wall` includes the host's time, `GPU` is the GPU's work only.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from colt5dist.benchmark import Row, measure, relative_error, report, require_gpu
from colt5dist.ops.local_attention import local_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def flex_attention(n: int, radius: int, device: torch.device) -> Attention:
    """Return PyTorch's FlexAttention, compiled, over the blocks within `radius` of the diagonal of `n` tokens."""
    from torch.nn.attention import flex_attention as flex

    def near(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query - key).abs() <= radius

    mask = flex.create_block_mask(near, None, None, n, n, device=device)
    return partial(torch.compile(flex.flex_attention), block_mask=mask)


def step(attention: Attention, inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """Return the output and the gradients of q, k and v."""
    out = attention(*inputs)
    return [out, *torch.autograd.grad(out, inputs, upstream)]


def main(arguments: list[str]) -> int:
    """Run the benchmark.

    Returns:
        The exit status, 1 if a result is wrong.

    Raises:
        ConfigError: there is no GPU.
    """
    parser = argparse.ArgumentParser(prog="benchmark.py local_attention", description=__doc__)
    parser.add_argument("--batch", type=int, default=2, help="samples")
    parser.add_argument("--length", type=int, default=16_384, help="tokens per sample")
    parser.add_argument("--heads", type=int, default=4, help="attention heads")
    parser.add_argument("--dim", type=int, default=64, help="dimensions per head")
    parser.add_argument("--radius", type=int, default=127, help="tokens that a token sees on either side")
    parser.add_argument("--repeats", type=int, default=50, help="measurements, of which the median is taken")
    parser.add_argument("--output", type=Path, help="folder for the figures as JSON and as a plot")
    options = parser.parse_args(arguments)
    require_gpu("local_attention")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Triton's interpreter, in which a trial without a GPU runs, cannot multiply bfloat16
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    torch.manual_seed(0)
    # the memory layout that the projections of tokens have in a layer
    tensors = [
        torch.randn(options.batch, options.length, options.heads, options.dim, device=device).transpose(1, 2)
        for _ in range(4)
    ]
    *wide, wide_upstream = (x.to(dtype).float().requires_grad_() for x in tensors)
    *inputs, upstream = (x.to(dtype).requires_grad_() for x in tensors)
    expected = step(
        partial(local_attention, radius=options.radius, implementation="reference"), wide, wide_upstream.detach()
    )
    bias = torch.zeros(options.heads, 2 * options.radius + 1, device=device)

    def ours(implementation: str, bias: Tensor | None = None) -> Attention:
        return partial(local_attention, radius=options.radius, implementation=implementation, bias=bias)

    candidates: dict[str, Attention] = {
        "Triton": ours("triton"),
        "Triton, compiled": torch.compile(ours("triton"), fullgraph=True),
        "Triton, with relative bias": ours("triton", bias=bias),
        "fused windows": ours("windows"),
        "fused windows, compiled": torch.compile(ours("windows"), fullgraph=True),
        "package local-attention": ours("reference"),
    }
    if device.type == "cuda":
        candidates["FlexAttention, compiled"] = flex_attention(options.length, options.radius, device)
    else:
        # a trial of this program: compiling for the CPU takes minutes and shows nothing
        candidates = {name: call for name, call in candidates.items() if "compiled" not in name}
    shape = f"{options.batch} x {options.length:,}"
    rows: list[Row] = []
    for name, attention in candidates.items():
        call = partial(step, attention, inputs, upstream.detach())
        rows.append(measure(name, shape, call, relative_error(call(), expected), options.repeats))
    title = (
        f"local attention, forward + backward, {options.heads} heads of {options.dim}, radius {options.radius}, {dtype}"
    )
    return report(title, rows, options.output)
