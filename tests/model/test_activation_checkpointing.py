"""Recomputed layers: the same gradients, and with the routing kept the first run's decisions."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from colt5dist.model import CoLT5, CoLT5Config
from colt5dist.nn.routing.routing_tokens import RoutingTokens

MODES = ["none", "full", "full_keep_routing"]


class CountRouting(TorchDispatchMode):
    """Counts the calls of the routing operators, forward ones only."""

    def __init__(self):
        super().__init__()
        self.soft_topk = self.select_topk = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        self.soft_topk += name.startswith("colt5dist::soft_topk") and "backward" not in name
        self.select_topk += name.startswith("colt5dist::select_topk")
        return func(*args, **(kwargs or {}))


def losses_and_gradients(model, batch):
    model.zero_grad()
    output = model(**batch)
    (output.token_loss.sum() + 1e-4 * output.z_loss.sum()).backward()
    return output.token_loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"router_implementation": "reference"},
        {"routing": "static"},
        {"routing": "random"},
        {"router_noise": 0.5},
        {"encoder": "dense"},
        {"encoder": "light"},
        {"light_positions": "relative"},
        {"dropout": 0.3},
        {"dropout": 0.3, "encoder": "dense"},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_three_modes_agree_bit_for_bit(build, batch, fields, dtype):
    reference_loss, reference = losses_and_gradients(build(**fields).to(dtype), batch)
    for mode in MODES[1:]:
        loss, gradients = losses_and_gradients(build(mode, **fields).to(dtype), batch)
        assert torch.equal(loss, reference_loss)
        assert [name for name in reference if not torch.equal(gradients[name], reference[name])] == []


@pytest.mark.parametrize("mode", MODES)
def test_autocast_and_routing_collected(build, batch, mode):
    model = build(mode)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch, collect_routing=True)
    output.token_loss.sum().backward()
    assert len(output.routing) == 2 and not output.routing[0].query.soft_scores.requires_grad
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(("mode", "runs"), [("none", 1), ("full", 2), ("full_keep_routing", 1)])
def test_routing_operators_run_again_only_where_they_are_not_kept(build, batch, mode, runs):
    model = build(mode)
    with CountRouting() as forward:
        output = model(**batch)
    # a layer has two soft top-k (one serves queries and keys/values) and three selections
    assert (forward.soft_topk, forward.select_topk) == (2 * 2, 2 * 3)
    with CountRouting() as backward:
        output.token_loss.sum().backward()
    assert (backward.soft_topk, backward.select_topk) == (2 * 2 * (runs - 1), 2 * 3 * (runs - 1))


@pytest.mark.parametrize(
    "fields",
    [
        {"router_implementation": "reference"},
        {"router_implementation": "scalar"},
        {"router_implementation": "scalar", "router_solver": "newton"},
    ],
    ids=["reference", "scalar", "newton"],
)
@pytest.mark.parametrize(("mode", "keeps"), [("full", False), ("full_keep_routing", True)])
def test_perturbed_scores_in_the_second_run_do_not_change_a_kept_decision(
    build, batch, fields, mode, keeps, monkeypatch
):
    _, reference = losses_and_gradients(build(**fields), batch)
    model = build(mode, **fields)
    exact_forward = RoutingTokens.forward
    sign = torch.ones(())

    def perturbed(self, x):
        return exact_forward(self, x) * sign

    monkeypatch.setattr(RoutingTokens, "forward", perturbed)
    output = model(**batch)
    sign.neg_()
    (output.token_loss.sum() + 1e-4 * output.z_loss.sum()).backward()
    for name, parameter in model.decoder.named_parameters(prefix="decoder"):
        assert torch.equal(parameter.grad, reference[name])
    # the last heavy branch's gradient depends on which tokens were routed, and by what they were multiplied
    heavy = model.encoder.layers[-1].feed_forward.heavy_ff.to_out.weight.grad
    assert torch.equal(heavy, reference["encoder.layers.1.feed_forward.heavy_ff.to_out.weight"]) == keeps


def test_exact_ties_of_the_scores(build, batch):
    batch["input_ids"] = torch.full_like(batch["input_ids"], 9)
    _, reference = losses_and_gradients(build(), batch)
    for mode in MODES[1:]:
        _, gradients = losses_and_gradients(build(mode), batch)
        assert all(torch.equal(gradients[name], reference[name]) for name in reference)


def test_checkpointing_keeps_less_for_the_backward_pass(build, batch):
    kept = {}
    for mode in MODES:
        model = build(mode)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t):
            model(**batch)
        kept[mode] = sum(sizes)
    assert kept["full"] == kept["full_keep_routing"] < 0.4 * kept["none"]


def test_nothing_is_recomputed_without_gradients(build, batch):
    with torch.no_grad():
        assert torch.equal(build("full_keep_routing")(**batch).token_loss, build()(**batch).token_loss)


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="activation_checkpointing"), torch.device("meta"):
        CoLT5(CoLT5Config(), activation_checkpointing="half")


def test_backward_twice(build, batch):
    model = build("full_keep_routing")
    loss = model(**batch).token_loss.sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
