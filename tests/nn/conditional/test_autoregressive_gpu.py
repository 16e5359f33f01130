"""The causal layers on a GPU: what the CPU computes, causality to the bit eager and compiled, and length."""

from itertools import product

import pytest
import torch

from colt5dist.nn import ConditionalRoutedAutoregressiveBlock

pytestmark = pytest.mark.gpu

D, WINDOW = 128, 64
ROUTER = {"eps": 1.0, "eps_init": None, "eps_decay": 1.0, "n_iters": 20, "std": D**-0.5}
OPTIONS = list(product([False, True], [False, True]))


def block(dim=D, window=WINDOW, **settings):
    torch.manual_seed(0)
    fields = {
        "num_heavy_attn_tokens_q": window // 8,
        "num_heavy_attn_tokens_kv": 2 * window,
        "num_heavy_ff_tokens": window // 8,
        "light_window_size": window,
        "light_heads": 4,
        "heavy_heads": 8,
        "router_kwargs": ROUTER | {"std": dim**-0.5},
    }
    return ConditionalRoutedAutoregressiveBlock(dim, **(fields | settings)).cuda()


def tokens(n, dim=D, dtype=torch.float32):
    return torch.randn(1, n, dim, generator=torch.Generator().manual_seed(n)).cuda().to(dtype)


@pytest.mark.parametrize("straight_through", [False, True])
def test_float32_is_what_the_cpu_computes(straight_through):
    layer, x = block(router_straight_through=straight_through), tokens(1000).requires_grad_()
    out = layer(x)
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (x, *layer.parameters()), upstream)
    names = ["x", *dict(layer.named_parameters())]
    layer, x = layer.cpu(), x.detach().cpu().requires_grad_()
    expected = layer(x)
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=5e-4)
    wanted = torch.autograd.grad(expected, (x, *layer.parameters()), upstream.cpu())
    for name, actual, there in zip(names, gradients, wanted, strict=True):
        scale = there.abs().max().item()
        torch.testing.assert_close(
            actual.cpu(), there, rtol=0, atol=2e-3 * scale + 1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("straight_through", "multiply"), OPTIONS)
def test_no_later_token_moves_an_output_by_one_bit(assert_causal, straight_through, multiply, dtype):
    settings = {"router_straight_through": straight_through, "multiply_queries_by_score": multiply}
    layer = block(**settings).to(dtype)
    assert_causal(layer, tokens(256, dtype=dtype), range(1, 256))
    generator = torch.Generator().manual_seed(1)
    assert_causal(layer, tokens(8192, dtype=dtype), torch.randint(1, 8192, (40,), generator=generator).tolist())


@pytest.mark.parametrize(("straight_through", "multiply"), OPTIONS)
def test_compiled_whole_once_and_causal(assert_causal, straight_through, multiply):
    settings = {"router_straight_through": straight_through, "multiply_queries_by_score": multiply}
    layer = block(**settings).bfloat16()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    x = tokens(1024, dtype=torch.bfloat16)
    compiled(x).float().square().sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(-x).float().square().sum().backward()
    assert_causal(compiled, x, range(1, 1024, 16))


def test_memory_is_linear_in_the_length_to_65536_tokens():
    """Forward and backward, d 512, bf16, window 128; a window sees 1,024 keys/values."""
    layer = block(512, 128, num_heavy_attn_tokens_kv=1024).bfloat16()
    peaks = {}
    for n in (16_384, 32_768, 65_536):
        x = tokens(n, 512, torch.bfloat16).requires_grad_()
        layer.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        layer(x).float().square().mean().backward()
        torch.cuda.synchronize()
        peaks[n] = torch.cuda.max_memory_allocated() - before
        assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())
    print({n: f"{peak / 2**20:.0f} MiB" for n, peak in peaks.items()})
    assert peaks[32_768] < 2.1 * peaks[16_384] and peaks[65_536] < 4.2 * peaks[16_384]
