"""CausalCoLT5: causality of the logits to the bit, recomputed layers, decoding, its configuration."""

import pytest
import torch
import torch.nn.functional as F

from colt5dist import CausalCoLT5, CoLT5, CoLT5Config
from colt5dist.model import routing_statistics
from colt5dist.model.activation_checkpointing import run_layer
from colt5dist.nn.routing.routing_tokens import RoutingTokens
from colt5dist.train.report.accounting import forward_multiply_adds

WINDOW, LENGTH = 16, 90
CAUSAL = {
    "architecture": "causal",
    "vocab_size": 128,
    "d_model": 32,
    "num_encoder_layers": 0,
    "num_decoder_layers": 2,
    "head_dim": 8,
    "num_light_heads": 1,
    "num_heavy_heads": 3,
    "light_ff_dim": 24,
    "heavy_ff_dim": 64,
    "router_n_iters": 20,
    "window_size": WINDOW,
    "memory_size": 12,
}
MODES = ["none", "full", "full_keep_routing"]


def build(activation_checkpointing="none", **fields):
    torch.manual_seed(0)
    return CausalCoLT5(CoLT5Config(**(CAUSAL | fields)), activation_checkpointing=activation_checkpointing)


def tokens(b=3, n=LENGTH, seed=1):
    return torch.randint(1, 128, (b, n), generator=torch.Generator().manual_seed(seed))


def batch(n=LENGTH):
    """Three samples, one with padding and one wholly padded."""
    mask = torch.arange(n) < torch.tensor([[n], [n * 2 // 3], [0]])
    target = tokens(n=n) * mask
    return {
        "input_ids": torch.zeros(3, 0, dtype=torch.int64),
        "decoder_input_ids": F.pad(target[:, :-1], (1, 0)),
        "target_ids": target,
        "target_mask": mask,
        "sample_index": torch.tensor([5, 6, -1]),
    }


def logits(model, ids):
    return model.loss.logits(model.decode(ids)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_logit_depends_on_a_later_token_by_one_bit(dtype):
    model, ids = build().to(dtype), tokens(1, 256)
    with torch.no_grad():
        first = logits(model, ids)
        for position in range(1, 256, 4 if dtype == torch.float32 else 12):
            changed = ids.clone()
            changed[:, position:] = tokens(1, 256 - position, seed=position + 2)
            changed[:, position] = (ids[:, position] + 1) % 128
            second = logits(model, changed)
            assert torch.equal(first[:, :position], second[:, :position])
            assert not torch.equal(first[:, position], second[:, position])


def losses_and_gradients(model):
    model.zero_grad()
    output = model(**batch())
    (output.token_loss.sum() + 1e-4 * output.z_loss.sum()).backward()
    return output.token_loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_loss_is_the_cross_entropy_of_the_next_token():
    model, given = build(), batch()
    output = model(**given)
    expected = F.cross_entropy(
        logits(model, given["decoder_input_ids"]).transpose(1, 2), given["target_ids"], reduction="none"
    )
    torch.testing.assert_close(output.token_loss, expected.masked_fill(~given["target_mask"], 0.0))
    assert output.routing == ()


@pytest.mark.parametrize(
    "fields", [{}, {"router_implementation": "reference"}, {"router_solver": "newton"}, {"routing": "random"}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_layers_have_the_same_gradients_to_the_bit(fields, dtype):
    reference_loss, reference = losses_and_gradients(build(**fields).to(dtype))
    for mode in MODES[1:]:
        loss, gradients = losses_and_gradients(build(mode, **fields).to(dtype))
        assert torch.equal(loss, reference_loss)
        assert [name for name in reference if not torch.equal(gradients[name], reference[name])] == []


@pytest.mark.parametrize("implementation", ["reference", "scalar"])
@pytest.mark.parametrize(("mode", "keeps"), [("full", False), ("full_keep_routing", True)])
def test_near_ties_that_fall_the_other_way_do_not_change_a_kept_decision(implementation, mode, keeps, monkeypatch):
    """Two tokens alternate, so that all scores are ties but for rounding, and the second run sees them moved."""
    block = build(router_implementation=implementation).layers[0].block
    x = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(2)).repeat(1, LENGTH // 2, 1).requires_grad_()
    upstream = torch.randn(3, LENGTH, 32, generator=torch.Generator().manual_seed(3))
    exact_forward = RoutingTokens.forward
    moved = torch.zeros(LENGTH)
    monkeypatch.setattr(
        RoutingTokens, "forward", lambda self, x: (scores := exact_forward(self, x)) + moved[: scores.shape[-1]]
    )
    for layer, heavy in ((block.conditional_attn, "heavy_attn"), (block.conditional_ff, "heavy_ff")):
        # it depends on which tokens were routed, and by what they were multiplied, and on nothing else that moves
        weight = layer.get_submodule(heavy).to_out.weight
        (reference,) = torch.autograd.grad(layer(x), weight, upstream)
        out = run_layer(layer, x, activation_checkpointing=mode)
        moved.copy_(0.3 * torch.randn(LENGTH, generator=torch.Generator().manual_seed(0)))
        (gradient,) = torch.autograd.grad(out, weight, upstream)
        moved.zero_()
        assert reference.abs().sum() > 0
        assert torch.equal(gradient, reference) == keeps


def test_every_parameter_has_a_gradient_whatever_the_length():
    for routing in ("learned", "static", "random"):
        for length in (1, WINDOW, WINDOW + 1, LENGTH):
            model = build(routing=routing)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = model(**batch(length), collect_routing=True)
            output.token_loss.sum().backward()
            assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
            assert len(output.routing) == 2


def test_routing_statistics():
    given = batch()
    output = build()(**given, collect_routing=True)
    statistics = routing_statistics(output.routing, given["target_mask"])
    assert all(value.isfinite() for value in statistics.values())
    assert 0.2 < statistics["router/layer_00/query/mean_score"] <= 1
    layer = output.routing[0]
    # an eighth of a window as queries and in the feed-forward, about two eighths as keys/values of all but the last
    assert layer.query.mask.shape == layer.feed_forward.mask.shape == (3, 5 * 2)
    assert layer.key_value.mask.shape == (3, 5 * 8)
    assert 0.15 < layer.key_value.mask.float().sum() / (3 * 80) < 0.35


@pytest.mark.parametrize("prompt", [1, WINDOW - 1, WINDOW, 2 * WINDOW + 5, 80])
def test_decoding_equals_the_whole_pass(prompt):
    model, ids = build().double(), tokens()
    first, states = model.start_decoding(ids[:, :prompt])
    stepped = [first, *(model.decode_step(token, states) for token in ids[:, prompt:].unbind(1))]
    expected = logits(model, ids)[:, prompt - 1 :]
    torch.testing.assert_close(torch.stack(stepped, dim=1), expected, rtol=0, atol=1e-10)


def test_generation_takes_the_likeliest_or_draws():
    model, prompt = build().double(), tokens(2, 40)
    written = model.generate(prompt, 9)
    ids = prompt
    for position in range(9):
        following = logits(model, ids)[:, -1].argmax(dim=-1, keepdim=True)
        assert torch.equal(following[:, 0], written[:, position])
        ids = torch.cat((ids, following), dim=1)
    drawn = [model.generate(prompt, 9, temperature=1.0, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert model.generate(prompt, 0).shape == (2, 0)
    for arguments in ((prompt[:, :0], 3, 0.0), (prompt, 3, -1.0)):
        with pytest.raises(ValueError, match=r"input_ids|temperature"):
            model.generate(*arguments[:2], temperature=arguments[2])


@pytest.fixture
def lively():
    """A float64 model that does not write one token again and again, and ends at different places."""
    model = build().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def test_prompts_of_unequal_lengths_are_continued_as_if_alone(lively):
    model, prompts = lively, tokens(3, 40)
    mask = torch.arange(40) < torch.tensor([[40], [WINDOW], [40]])
    for arguments in ({}, {"num_beams": 3, "num_return_sequences": 2}, {"temperature": 1.0, "seed": 3, "top_k": 20}):
        written = model.generate(prompts, input_mask=mask, max_new_tokens=20, **arguments)
        each = written.unflatten(0, (3, -1))
        for row, length in enumerate((40, WINDOW, 40)):
            prompt, number = prompts[row : row + 1, :length], torch.tensor([row])
            alone = model.generate(prompt_ids=prompt, max_new_tokens=20, sample_index=number, **arguments)
            assert torch.equal(F.pad(alone, (0, each.shape[2] - alone.shape[1])), each[row])


def test_beams_follow_the_text_that_they_go_on_from(lively):
    model, prompt = lively, tokens(2, WINDOW - 2)
    best = model.generate(prompt, 24, num_beams=4, length_penalty=0.0)

    def score(written):
        ids = torch.cat((prompt, written), dim=1)
        shares = logits(model, ids[:, :-1]).log_softmax(dim=-1)[:, prompt.shape[1] - 1 :]
        return shares.gather(2, written.unsqueeze(-1)).sum(dim=(1, 2))

    greedy = model.generate(prompt, 24)
    assert (score(best) > score(greedy) + 0.1).any() and (score(best) >= score(greedy) - 1e-9).all()


def test_wrong_arguments_of_generate():
    model, prompt = build(), tokens(2, 20)
    gap = torch.arange(20).expand(2, 20) != 7
    for arguments, error, message in (
        ({}, TypeError, "max_new_tokens: missing"),
        ({"max_new_tokens": 3, "num_tokens": 3}, TypeError, "max_new_tokens: given together with num_tokens"),
        ({"max_new_tokens": 3, "input_mask": gap}, ValueError, "input_mask: sample 0 has padding between"),
        ({"max_new_tokens": 3, "prompt_ids": prompt}, TypeError, "input_ids: given together with prompt_ids"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens: -1"),
    ):
        with pytest.raises(error, match=message):
            model.generate(prompt, **arguments)


def test_work_grows_with_the_text_and_not_with_its_square():
    config = CoLT5Config(**CAUSAL)
    one, two, four = (forward_multiply_adds(config, 0, 1024 * factor) for factor in (1, 2, 4))
    assert two == 2 * one and four == 4 * one


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_encoder_layers": 2}, "model.num_encoder_layers: 2; architecture=causal has no encoder, use 0"),
        ({"encoder": "dense"}, "model.encoder: dense, but architecture=causal has no encoder"),
        ({"encoder": "light"}, "model.encoder: light, but architecture=causal has no encoder"),
        ({"light_positions": "relative"}, "model.light_positions: relative has no form for architecture=causal"),
        ({"router_noise": 0.5}, "model.router_noise: has no form for architecture=causal"),
        ({"window_size": 12}, "model.window_size: 12 is not a multiple of 8"),
        ({"memory_size": 0}, "model.memory_size: 0"),
        ({"architecture": "decoder"}, "model.architecture: 'decoder'; use one of"),
        ({"architecture": "encoder_decoder", "num_encoder_layers": 1}, "model.architecture: 'encoder_decoder'"),
        ({"architecture": "encoder_decoder"}, "model.num_encoder_layers: 0; use 1 or more"),
    ],
)
def test_wrong_configurations(fields, message):
    with pytest.raises(ValueError) as error, torch.device("meta"):
        build(**fields)
    assert message in str(error.value)


def test_the_encoder_decoder_refuses_the_other_architecture():
    with pytest.raises(ValueError, match=r"model\.architecture"), torch.device("meta"):
        CoLT5(CoLT5Config(**CAUSAL))


def test_an_encoder_input_is_refused():
    with pytest.raises(ValueError, match="input_ids"):
        build()(**(batch() | {"input_ids": tokens()}))
