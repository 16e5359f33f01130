"""What the initial values are for: the first steps are calm, and tokens stay apart in the residual stream."""

import math

import pytest
import torch
from torch import Tensor

OLD = {"initializer_range": 0.02, "embedding_init_std": 0.02}
"""GPT-2's initial values, which the tests must be able to tell from the default."""


def text(num_samples: int, seed: int) -> dict[str, Tensor]:
    """Inputs (b, 64) and targets (b, 16) of ids that are far from equally frequent, as those of text are."""
    generator = torch.Generator().manual_seed(seed)
    frequencies = 1 / torch.arange(1, 127)
    ids = 2 + torch.multinomial(frequencies, num_samples * 80, replacement=True, generator=generator)
    inputs, targets = ids.view(num_samples, 80).split((64, 16), dim=1)
    shifted = torch.cat([torch.zeros_like(targets[:, :1]), targets[:, :-1]], dim=1)
    return {"input_ids": inputs, "decoder_input_ids": shifted, "target_ids": targets}


def gradient_norm(model: torch.nn.Module) -> float:
    return math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None))


def first_gradients(model: torch.nn.Module) -> tuple[float, float]:
    """Gradient norms of encoder and decoder before the first step."""
    model(**text(4, 0)).token_loss.mean().backward()
    return gradient_norm(model.encoder), gradient_norm(model.decoder)


def test_the_first_gradients_grow_no_faster_than_the_number_of_layers(build) -> None:
    """sqrt(6) is what six times as many layers with equal gradients each would give."""
    shallow, deep = (
        first_gradients(build(d_model=64, num_encoder_layers=layers, num_decoder_layers=layers)) for layers in (2, 12)
    )
    for few, many in zip(shallow, deep, strict=True):
        assert many / few < 1.25 * math.sqrt(6)
    assert deep[0] < deep[1]


def train(model: torch.nn.Module, steps: int) -> tuple[list[float], float]:
    """Train at twice the usual rate; returns gradient norms, and what the encoder's states have in common.

    That is the length of their mean over the length of a state, before the last norm: 1 where all tokens look alike.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.95), weight_decay=0.0)
    norms = []
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = 6e-3 * min(1.0, step / 20)
        model(**text(8, step)).token_loss.mean().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    states: list[Tensor] = []
    hook = model.encoder.norm.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    with torch.no_grad():
        model.encode(text(8, 0)["input_ids"])
    hook.remove()
    x = states[0].flatten(0, 1)
    return norms, (x.mean(0).norm() / x.square().sum(-1).mean().sqrt()).item()


@pytest.mark.parametrize("seed", [0, 1])
def test_tokens_stay_apart_and_gradients_small_at_twice_the_usual_rate(build, seed: int) -> None:
    torch.manual_seed(seed)
    norms, common = train(build(), steps=60)
    print(max(norms), max(norms[20:]), common)
    old_norms, old_common = train(build(**OLD), steps=60)
    print(max(old_norms), max(old_norms[20:]), old_common)
