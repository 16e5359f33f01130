"""The model's layers against CoLT5 as published, written out sample by sample in float64 from the paper's formulas.

CoLT5 2303.09752, section 3 and appendix C; T5.1.1 for the decoder. Ours where the paper is silent: rotary positions in
both branches of the encoder's attention and in the decoder's self-attention, one RMSNorm before routers and branches.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

HEAD_DIM = 8
LENGTH = 32
RADIUS = 5
VALID = (32, 21)
"""Valid tokens of the two samples."""


@pytest.fixture
def model(build):
    """One layer each, with weights large enough that every term counts and the soft scores saturate."""
    model = build(num_encoder_layers=1, num_decoder_layers=1, light_radius=RADIUS, router_n_iters=50).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.mul_(3 if "routing_tokens" in name else 5)
    return model


@pytest.fixture
def inputs():
    """Input ids (2, 32) and their mask. No id stands twice in a sample: equal tokens have equal scores."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.stack([1 + torch.randperm(127, generator=generator)[:LENGTH] for _ in VALID])
    return ids, torch.arange(LENGTH) < torch.tensor(VALID)[:, None]


def norm(x: Tensor, gamma: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gamma


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions, halves rotated; x (..., n, HEAD_DIM). The frequencies are float32 numbers."""
    frequencies = 1 / 10000 ** (torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
    angles = positions.double()[:, None] * frequencies.double()
    first, second = x.chunk(2, dim=-1)
    return torch.cat(
        (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1
    )


def soft_scores(scores: Tensor, k: float) -> Tensor:
    """Appendix C: eps 1.0, 50 iterations."""
    b = -scores
    for _ in range(50):
        a = math.log(k) - torch.logsumexp(scores + b, -1, keepdim=True)
        b = -torch.relu(scores + a)
    return (scores + a + b).exp()


def gated_gelu(layer, x: Tensor) -> Tensor:
    gate, value = (x @ layer.to_hidden.weight.T).chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") * value) @ layer.to_out.weight.T


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    """q (heads, i, dim), k and v (heads, j, dim) or (j, dim) -> (i, heads * dim)."""
    weights = q @ k.transpose(-1, -2) / HEAD_DIM**0.5
    if allowed is not None:
        weights = weights.masked_fill(~allowed, -math.inf)
    return (weights.softmax(-1) @ v).transpose(0, 1).flatten(1)


def published_encoder(model, ids: Tensor) -> Tensor:
    """Encoder states of one sample without its padding; the budgets are those of the padded length."""
    layer = model.encoder.layers[0]
    attention, feed_forward = layer.attention, layer.feed_forward
    num_q, num_kv, positions = LENGTH // 8, LENGTH // 4, torch.arange(len(ids))
    x = model.embedding.weight[ids]

    y = norm(x, attention.norm.gamma)
    query_scores, key_value_scores = (y @ attention.router.routing_tokens.weight.T).unbind(-1)
    routed_q, routed_kv = query_scores.topk(num_q).indices, key_value_scores.topk(num_kv).indices
    q, k, v = (y @ attention.light_attn.to_qkv.weight.T).view(len(ids), 3, 1, HEAD_DIM).permute(1, 2, 0, 3)
    near = (positions[:, None] - positions).abs() <= RADIUS
    added = attend(rotate(q, positions), rotate(k, positions), v, near) @ attention.light_attn.to_out.weight.T
    q = (y[routed_q] @ attention.heavy_attn.to_q.weight.T).view(num_q, 3, HEAD_DIM).transpose(0, 1)
    weighted = y[routed_kv] * soft_scores(key_value_scores, num_kv * 9 / 8)[routed_kv, None]
    k, v = (weighted @ attention.heavy_attn.to_kv.weight.T).view(num_kv, 3, 2, HEAD_DIM).permute(2, 1, 0, 3)
    heavy = attend(rotate(q, routed_q), rotate(k, routed_kv), v) @ attention.heavy_attn.to_out.weight.T
    added[routed_q] += heavy * soft_scores(query_scores, num_q * 9 / 8)[routed_q, None]
    x = x + added

    y = norm(x, feed_forward.norm.gamma)
    scores = y @ feed_forward.router.routing_tokens.weight[0]
    routed = scores.topk(num_q).indices
    added = gated_gelu(feed_forward.light_ff, y)
    added[routed] += gated_gelu(feed_forward.heavy_ff, y[routed]) * soft_scores(scores, num_q * 9 / 8)[routed, None]
    return norm(x + added, model.encoder.norm.gamma)


def published_decoder(model, ids: Tensor, encoder_states: Tensor) -> Tensor:
    """Decoder states of one sample: T5.1.1 with one key/value head in cross-attention."""
    layer, positions = model.decoder.layers[0], torch.arange(len(ids))
    x = model.embedding.weight[ids]
    y = norm(x, layer.self_attention.norm.gamma)
    q, k, v = (y @ layer.self_attention.to_qkv.weight.T).view(len(ids), 3, 4, HEAD_DIM).permute(1, 2, 0, 3)
    past = positions[:, None] >= positions
    x = x + attend(rotate(q, positions), rotate(k, positions), v, past) @ layer.self_attention.to_out.weight.T
    cross = layer.cross_attention
    q = (norm(x, cross.norm.gamma) @ cross.to_q.weight.T).view(len(ids), 4, HEAD_DIM).transpose(0, 1)
    k, v = (encoder_states @ cross.to_kv.weight.T).chunk(2, dim=-1)
    x = x + attend(q, k, v) @ cross.to_out.weight.T
    x = x + gated_gelu(layer.feed_forward, norm(x, layer.feed_forward.norm.gamma))
    return norm(x, model.decoder.norm.gamma)


@torch.no_grad()
def test_encoder_is_the_published_one(model, inputs) -> None:
    ids, mask = inputs
    states, _ = model.encode(ids, input_mask=mask)
    for sample, valid in enumerate(VALID):
        torch.testing.assert_close(
            states[sample, :valid], published_encoder(model, ids[sample, :valid]), rtol=0, atol=1e-12
        )


@torch.no_grad()
def test_decoder_is_the_published_one(model, inputs) -> None:
    ids, mask = inputs
    decoder_ids = torch.randint(0, 128, (len(VALID), 9), generator=torch.Generator().manual_seed(3))
    states, _ = model.encode(ids, input_mask=mask)
    decoded = model.decode(decoder_ids, states, input_mask=mask)
    for sample, valid in enumerate(VALID):
        expected = published_decoder(model, decoder_ids[sample], states[sample, :valid])
        torch.testing.assert_close(decoded[sample], expected, rtol=0, atol=1e-12)


def test_random_routers_draw_from_streams_of_their_own(build, inputs) -> None:
    """All routers of the model: no two pick the same tokens."""
    model = build(routing="random", heavy_key_value_ratio=1.0)
    ids, mask = inputs
    _, routing = model.encode(ids, input_mask=mask, sample_index=torch.tensor([4, 9]), collect_routing=True)
    picks = [tuple(kind.indices.flatten().tolist()) for layer in routing for kind in layer]
    assert len(picks) == len(set(picks)) == 6


@pytest.mark.parametrize("encoder", ["conditional", "dense", "light"])
def test_maps_into_the_residual_stream_start_smaller(build, encoder) -> None:
    """Standard deviation 1 for the embedding, 1 / sqrt(width) for matrices, that over sqrt(2 * layers) for outputs."""
    model = build(encoder=encoder, d_model=64, num_encoder_layers=2, num_decoder_layers=4)
    num_output = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "routing_tokens" not in name:
            expected = 1.0 if name == "embedding.weight" else 1 / 8
            if name.endswith("to_out.weight"):
                num_output += 1
                expected /= math.sqrt(2 * (2 if name.startswith("encoder") else 4))
            assert parameter.std().item() == pytest.approx(expected, rel=0.12), name
    # attention and feed-forward, light and heavy or not, and the decoder's two attentions and feed-forward
    assert num_output == 2 * (4 if encoder == "conditional" else 2) + 4 * 3


@pytest.mark.parametrize("light_positions", ["rotary", "relative"])
def test_light_encoder_is_the_conditional_one_whose_heavy_branches_add_nothing(build, inputs, light_positions) -> None:
    conditional = build(light_positions=light_positions)
    light = build(light_positions=light_positions, encoder="light")
    weights = {}
    for name, weight in conditional.state_dict().items():
        if "heavy" in name and name.endswith("to_out.weight"):
            conditional.get_parameter(name).data.zero_()
        name = name.replace(".attention.norm.", ".norm.").replace(".light_attn.", ".").replace(".light_ff.", ".")
        if "heavy" not in name and "router" not in name:
            weights[name] = weight
    light.load_state_dict(weights)
    ids, mask = inputs
    torch.testing.assert_close(light.encode(ids, input_mask=mask)[0], conditional.encode(ids, input_mask=mask)[0])
