"""Attention of one new token: Triton against PyTorch, and PyTorch against plain attention over all tokens."""

import pytest
import torch
import torch.nn.functional as F

from colt5dist.ops.decode_attention import attend_to_context, attend_to_past

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HALF = torch.bfloat16 if CUDA else torch.float16  # Triton's interpreter has no products of bfloat16
TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
each_type = pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["float32", "half"])


def past(rows, slots, heads, dim, dtype):
    """Random arguments of `attend_to_past` without the position; rows go on from each other's tokens."""
    keys, values = torch.randn(2, rows, slots, heads, dim, device=DEVICE).to(dtype)
    angles = torch.randn(slots, dim // 2, device=DEVICE)
    return {
        "qkv": torch.randn(rows, 3 * heads * dim, device=DEVICE).to(dtype),
        "keys": keys,
        "values": values,
        "source": torch.randint(rows, (rows, slots), device=DEVICE),
        "cosine": angles.cos().to(dtype),
        "sine": angles.sin().to(dtype),
    }


@each_type
@pytest.mark.parametrize("heads, dim", [(1, 8), (3, 20)])
def test_past_in_triton(dtype, heads, dim):
    given = past(4, 150, heads, dim, dtype)
    for position in (0, 1, 63, 64, 65, 149):
        now = torch.tensor([position], device=DEVICE)
        copies = [given | {name: given[name].clone() for name in ("keys", "values")} for _ in range(2)]
        expected = attend_to_past(**copies[0], position=now, implementation="reference")
        # slots after the newest token hold nothing yet
        copies[1]["keys"][:, position:] = float("nan")
        copies[1]["values"][:, position:] = float("nan")
        out = attend_to_past(**copies[1], position=now, implementation="triton")
        torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCE[dtype])
        for name in ("keys", "values"):
            written = copies[1][name][:, : position + 1]
            torch.testing.assert_close(written, copies[0][name][:, : position + 1], rtol=0, atol=TOLERANCE[dtype])


def test_past_is_attention_to_the_tokens_before():
    rows, slots, heads, dim = 3, 7, 2, 6
    given = past(rows, slots, heads, dim, torch.float64)
    given["source"] = torch.arange(rows, device=DEVICE).unsqueeze(1).expand(rows, slots)
    given |= {name: torch.zeros_like(given[name]) for name in ("keys", "values")}
    tokens = torch.randn(slots, rows, 3, heads, dim, dtype=torch.float64, device=DEVICE)
    cosine, sine = given["cosine"][:, None, None, None], given["sine"][:, None, None, None]
    first, second = tokens[:, :, :2].chunk(2, dim=-1)
    turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
    q, k = (turned[:, :, number].permute(1, 2, 0, 3) for number in (0, 1))
    expected = F.scaled_dot_product_attention(q, k, tokens[:, :, 2].permute(1, 2, 0, 3), is_causal=True)
    for position in range(slots):
        given["qkv"] = tokens[position].reshape(rows, -1)
        out = attend_to_past(**given, position=torch.tensor([position], device=DEVICE))
        wanted = expected[:, :, position].reshape(rows, -1)
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)


@each_type
@pytest.mark.parametrize("m, n, dim", [(1, 1, 8), (12, 70, 20), (70, 300, 16)], ids=["one", "odd", "two-blocks"])
def test_context_in_triton(dtype, m, n, dim):
    q = torch.randn(3, m, dim, device=DEVICE).to(dtype)
    context = torch.randn(3, n, 2 * dim, device=DEVICE).to(dtype)
    lengths = torch.tensor([n, 1, (n + 1) // 2], device=DEVICE)
    expected = attend_to_context(q, context, lengths, implementation="reference")
    context[torch.arange(n, device=DEVICE) >= lengths.unsqueeze(1)] = float("nan")
    out = attend_to_context(q, context, lengths, implementation="triton")
    torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCE[dtype])


def test_context_is_cut_into_many_parts(monkeypatch):
    q, context = torch.randn(1, 4, 16, device=DEVICE), torch.randn(1, 1000, 32, device=DEVICE)
    lengths = torch.tensor([333], device=DEVICE)
    expected = attend_to_context(q, context, lengths, implementation="reference")
    for programs in (1, 3, 16):
        monkeypatch.setattr("colt5dist.ops.decode_attention.triton.PROGRAMS", programs)
        out = attend_to_context(q, context, lengths, implementation="triton")
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)
