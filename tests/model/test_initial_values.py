"""What the initial values are for: the first steps are calm, and tokens stay apart in the residual stream."""

import math

import torch
from torch import Tensor

GPT2 = {"initializer_range": 0.02, "embedding_init_std": 0.02}
"""GPT-2's initial values, which the tests tell from the default."""


def text(num_samples: int, seed: int) -> dict[str, Tensor]:
    """Inputs (b, 64) and targets (b, 16) of ids that are far from equally frequent, as those of text are."""
    generator = torch.Generator().manual_seed(seed)
    frequencies = 1 / torch.arange(1, 127)
    ids = 2 + torch.multinomial(frequencies, num_samples * 80, replacement=True, generator=generator)
    inputs, targets = ids.view(num_samples, 80).split((64, 16), dim=1)
    shifted = torch.cat([torch.zeros_like(targets[:, :1]), targets[:, :-1]], dim=1)
    return {"input_ids": inputs, "decoder_input_ids": shifted, "target_ids": targets}


def test_the_controls_start_with_the_weights_beside_learned_routers(build) -> None:
    """So runs of one seed differ in the routing alone; only the routing vectors are missing."""
    learned = build().state_dict()
    for routing in ("static", "random"):
        control = build(routing=routing).state_dict()
        missing = [name for name in learned if name not in control]
        assert len(missing) == 4 and all("routing_tokens" in name for name in missing)
        assert all(torch.equal(control[name], learned[name]) for name in control)


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


def train(model: torch.nn.Module, steps: int) -> tuple[list[float], float, float]:
    """Train at twice the usual learning rate.

    Returns:
        Gradient norms of the steps; the smallest root mean square of a state before the decoder's last norm; and the
        length of the mean of the encoder's states over the length of one, at the end: 1 where all tokens look alike.
    """
    states: dict[str, Tensor] = {}
    for name in ("encoder", "decoder"):
        norm = model.get_submodule(name).norm
        norm.register_forward_pre_hook(lambda module, args, name=name: states.update({name: args[0].detach()}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.95), weight_decay=0.0)
    norms, smallest = [], math.inf
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = 6e-3 * min(1.0, step / 20)
        model(**text(8, step)).token_loss.mean().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        smallest = min(smallest, states["decoder"].square().mean(-1).sqrt().min().item())
    x = states["encoder"].flatten(0, 1)
    return norms, smallest, (x.mean(0).norm() / x.square().sum(-1).mean().sqrt()).item()


def test_the_first_steps_are_calm_and_tokens_stay_apart_at_twice_the_usual_rate(build) -> None:
    norms, smallest, common = train(build(), steps=60)
    assert max(norms) < 3 and max(norms[20:]) < 1.5
    assert smallest > 0.5
    assert common < 0.95
    _, smallest, common = train(build(**GPT2), steps=60)
    assert smallest < 0.1 and common > 0.99
