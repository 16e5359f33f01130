"""Whether causal routing learns to recall pairs of key and value beyond the attention window, with three controls.

A sequence is filler with `pairs` adjacent (key, value) tokens hidden in its first half, and one question per pair in
its last quarter: the key again, after which the model must predict the value. Light attention cannot reach back to the
pairs. Heavy attention can, if the pairs were admitted as keys/values and the questions as queries. A token's vector is
the sum of its own embedding and a second embedding of the token before it, so that no layer is needed to learn which
tokens are adjacent. The result is one figure per variant: the cross-entropy of the values on fresh sequences, in nats.
Guessing has log(values).

    causal     routing="causal", learned
    window     routing="window", as in colt5-attention: not causal, since the whole window decides which tokens are
               queries
    random     routing="causal", with the same number of tokens admitted at random
    local      light attention only, without the heavy branch's output
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colt5dist.nn.conditional.autoregressive_attention import ConditionalRoutedAutoregressiveAttention
from colt5dist.nn.embedding import Embedding
from colt5dist.nn.feed_forward import FeedForward
from colt5dist.nn.linear import Linear

VARIANTS = ("causal", "window", "random", "local")
FILLER_TOKENS = 16


def sequences(options: argparse.Namespace, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return one batch of random sequences.

    Keys have the ids 0 to keys - 1, then come the values, then the filler. Pairs are in the first half of a sequence,
    questions in the last quarter.

    Returns:
        Tokens (batch, length) int64, positions of the questions (batch, pairs), and the values (batch, pairs) that
        follow them, from 0.
    """
    b, n, pairs = options.batch, options.length, options.pairs

    def places(first: int, last: int) -> Tensor:
        """Distinct even positions in first to last - 1, in random order."""
        return first + 2 * torch.rand(b, (last - first) // 2, generator=generator).argsort(dim=1)[:, :pairs]

    first_value = options.keys
    first_filler = first_value + options.values
    tokens = torch.randint(first_filler, first_filler + FILLER_TOKENS, (b, n), generator=generator)
    keys = torch.rand(b, options.keys, generator=generator).argsort(dim=1)[:, :pairs]
    values = torch.randint(first_value, first_filler, (b, pairs), generator=generator)
    told, asked = places(0, n // 2), places(3 * n // 4, n)
    tokens.scatter_(1, told, keys)
    tokens.scatter_(1, told + 1, values)
    tokens.scatter_(1, asked, keys)
    return tokens, asked, values - first_value


class Layer(nn.Module):
    """A pre-norm layer: attention, then feed-forward, each added to its input.

    Args:
        options: the benchmark's options.
        variant: one of VARIANTS.
    """

    def __init__(self, options: argparse.Namespace, variant: str) -> None:
        super().__init__()
        self.variant = variant
        self.attention = ConditionalRoutedAutoregressiveAttention(
            options.dim,
            num_heavy_tokens_q=options.queries,
            num_heavy_tokens_kv=options.memory,
            num_admitted_kv=options.admitted,
            light_dim_head=options.dim // 4,
            light_heads=2,
            light_window_size=options.window,
            heavy_dim_head=options.dim // 4,
            heavy_heads=4,
            router_straight_through=False,
            router_kwargs={"eps": 1.0, "eps_init": None, "n_iters": 20, "std": options.dim**-0.5},
            multiply_keys_by_score=True,
            use_null_q_tokens=False,
            rotary_emb=False,
            light_rotary_emb=True,
            routing="window" if variant == "window" else "causal",
            shared_norm=True,
            norm_eps=1e-6,
        )
        self.feed_forward = FeedForward(options.dim, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (batch, length, dim) to (batch, length, dim)."""
        if self.variant == "local":
            attention = self.attention
            normed = attention.norm(x)
            angles = attention.light_rotary_emb(x.shape[1], device=x.device) if attention.light_rotary_emb else None
            x = x + attention.light_attn(normed, rotary_angles=angles)
        else:
            x = x + self.attention(x, random_route=self.variant == "random")
        return x + self.feed_forward(x)


class Model(nn.Module):
    """A small causal model that predicts values.

    Args:
        options: the benchmark's options.
        variant: one of VARIANTS.
    """

    def __init__(self, options: argparse.Namespace, variant: str) -> None:
        super().__init__()
        num_tokens = options.keys + options.values + FILLER_TOKENS
        self.embedding = Embedding(num_tokens, options.dim, std=1.0)
        self.embedding_before = Embedding(num_tokens, options.dim, std=1.0)
        self.layers = nn.Sequential(*(Layer(options, variant) for _ in range(options.layers)))
        self.norm = nn.RMSNorm(options.dim)
        self.head = Linear(options.dim, options.values)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (batch, length) to logits of the values (batch, length, values)."""
        x = self.embedding(tokens) + F.pad(self.embedding_before(tokens[:, :-1]), (0, 0, 1, 0))
        return self.head(self.norm(self.layers(x)))


def loss_of(model: Model, options: argparse.Namespace, generator: torch.Generator) -> Tensor:
    """Return the cross-entropy of the values after the questions, on one batch of fresh sequences."""
    tokens, asked, values = (t.to(options.device) for t in sequences(options, generator))
    logits = model(tokens).gather(1, asked.unsqueeze(-1).expand(-1, -1, options.values))
    return F.cross_entropy(logits.flatten(0, 1).float(), values.flatten())


def train(options: argparse.Namespace, variant: str) -> dict[str, Any]:
    """Train one variant and measure it on other sequences; every variant has the same start and the same sequences."""
    torch.manual_seed(options.seed)
    model = Model(options, variant).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.01)
    generator = torch.Generator().manual_seed(options.seed + 1)
    start, curve = time.perf_counter(), []
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min((step + 1) / 50, 1.0, (options.steps - step) / (0.3 * options.steps))
        loss = loss_of(model, options, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % max(options.steps // 10, 1) == 0:
            curve.append(loss.item())
    generator = torch.Generator().manual_seed(options.seed + 2)
    with torch.no_grad():
        held_out = sum(loss_of(model, options, generator).item() for _ in range(16)) / 16
    return {"variant": variant, "loss": held_out, "seconds": time.perf_counter() - start, "curve": curve}


def main(arguments: list[str]) -> int:
    """Train the variants, print a line for each, and return the exit status."""
    parser = argparse.ArgumentParser(prog="associative_recall", description=__doc__.splitlines()[0] if __doc__ else "")
    for name, default, text in (
        ("length", 128, "tokens of a sequence, a multiple of 8"),
        ("window", 8, "tokens of a window, light and heavy"),
        ("pairs", 4, "pairs of key and value in a sequence"),
        ("keys", 16, "different keys"),
        ("values", 8, "different values"),
        ("queries", 2, "routed queries of a window"),
        ("admitted", 2, "keys/values that are admitted per window, on average"),
        ("memory", 32, "admitted keys/values that a window sees"),
        ("dim", 48, "width, a multiple of 8"),
        ("layers", 1, "layers"),
        ("batch", 32, "sequences per step"),
        ("steps", 1000, "steps"),
        ("seed", 0, "random seed of weights and sequences"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--lr", type=float, default=5e-3, help="peak learning rate of AdamW (0.005)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    options = parser.parse_args(arguments)
    variants = options.variants.split(",")
    if unknown := set(variants) - set(VARIANTS):
        parser.error(f"--variants: {', '.join(sorted(unknown))} unknown; use some of {','.join(VARIANTS)}")
    if options.pairs > min(options.keys, options.length // 8):
        parser.error(f"--pairs: {options.pairs} do not fit; use {min(options.keys, options.length // 8)} or fewer")
    print(f"guessing: {math.log(options.values):.3f} nats; {options.device}, torch {torch.__version__}")
    results = []
    for variant in variants:
        results.append(train(options, variant))
        last = results[-1]
        print(f"{variant:<8} loss {last['loss']:.3f} nats, {last['seconds']:.0f} s", flush=True)
    if options.output:
        settings = {name: str(value) for name, value in vars(options).items()}
        options.output.write_text(json.dumps({"settings": settings, "results": results}, indent=1))
    return 0
