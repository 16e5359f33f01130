"""Loading the weights of colt5-attention: every value arrives, and what does not fit is named and changes nothing."""

import pytest
import torch
from colt5_attention import transformer_block as reference

from colt5dist.nn import Attention, ConditionalRoutedAttention, CoordinateDescentRouter, FeedForward, SelfAttention
from colt5dist.nn.interop import colt5_attention_names, load_colt5_attention

DIM = 8
BUDGETS = {"num_heavy_tokens_q": 2, "num_heavy_tokens_kv": 3}


def loaded_values(ours, theirs):
    """The value of each of our parameters, and what the weights of colt5-attention say that it is."""
    state = theirs.state_dict()
    names = colt5_attention_names(ours)
    return {
        name: (value, torch.cat([state[source] for source in names[name]])) for name, value in ours.named_parameters()
    }


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Attention(DIM), reference.Attention(DIM)),
        (SelfAttention(DIM, prenorm=True), reference.SelfAttention(DIM, prenorm=True)),
        (SelfAttention(DIM), reference.SelfAttention(DIM)),
        (FeedForward(DIM, 3), reference.FeedForward(DIM, 3)),
        (
            CoordinateDescentRouter(DIM, num_routing_tokens=3),
            reference.CoordinateDescentRouter(DIM, num_routing_tokens=3),
        ),
        (
            CoordinateDescentRouter(DIM, learned_routing_tokens=True),
            reference.CoordinateDescentRouter(DIM, learned_routing_tokens=True),
        ),
        (
            ConditionalRoutedAttention(DIM, **BUDGETS, num_routed_kv=2, rotary_emb=True),
            reference.ConditionalRoutedAttention(DIM, **BUDGETS, num_routed_kv=2, rotary_emb=True),
        ),
    ],
    ids=lambda module: type(module).__name__,
)
def test_every_value_arrives(ours, theirs):
    load_colt5_attention(ours, theirs.double().state_dict())
    for name, (value, wanted) in loaded_values(ours, theirs).items():
        assert torch.equal(value, wanted.float()), name


def test_a_router_of_several_groups_takes_the_vectors_of_both():
    ours, theirs = (
        module(DIM, **BUDGETS, num_routed_kv=2)
        for module in (ConditionalRoutedAttention, reference.ConditionalRoutedAttention)
    )
    load_colt5_attention(ours, theirs.state_dict())
    weight = ours.router.routing_tokens.weight
    assert torch.equal(weight[:1], theirs.q_router.routing_token)
    assert torch.equal(weight[1:], theirs.kv_router.routing_token)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("q_router.routing_token"), "q_router.routing_token: missing"),
        (lambda state: state.pop("heavy_attn.to_out.weight"), "heavy_attn.to_out.weight: missing"),
        (lambda state: state.update(extra=torch.ones(1)), "extra: left over"),
        (lambda state: state.update(null_q_token=torch.ones(5)), r"null_q_token: \(5,\); null_q_token needs \(8,\)"),
        (lambda state: state.update({"kv_router.routing_token": torch.ones(2, DIM)}), "kv_router.routing_token: "),
        (lambda state: state.update({"kv_router.routing_token": torch.ones(1, 5)}), "kv_router.routing_token: "),
        (lambda state: state["rotary_emb.inv_freq"].mul_(2), "rotary_emb.inv_freq: other frequencies"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_copied(change, message):
    ours, theirs = (
        module(DIM, **BUDGETS, rotary_emb=True)
        for module in (ConditionalRoutedAttention, reference.ConditionalRoutedAttention)
    )
    state = theirs.state_dict()
    change(state)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_colt5_attention(ours, state)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_frequencies_that_were_rounded_with_their_module_are_known_again():
    ours, theirs = (
        module(DIM, **BUDGETS, rotary_emb=True)
        for module in (ConditionalRoutedAttention, reference.ConditionalRoutedAttention)
    )
    load_colt5_attention(ours, theirs.bfloat16().state_dict())
    with pytest.raises(ValueError, match="inv_freq"):
        load_colt5_attention(
            ConditionalRoutedAttention(DIM, **BUDGETS, rotary_emb=True, rope_theta=500), theirs.state_dict()
        )


def test_without_rotary_positions_here_the_frequencies_there_are_left_over():
    state = reference.ConditionalRoutedAttention(DIM, **BUDGETS, rotary_emb=True).state_dict()
    with pytest.raises(ValueError, match=r"rotary_emb\.inv_freq: left over"):
        load_colt5_attention(ConditionalRoutedAttention(DIM, **BUDGETS), state)
