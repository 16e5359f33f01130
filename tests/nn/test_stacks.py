"""Two layers of each kind under bf16 autocast, torch.compile and activation checkpointing that keeps the routing."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import checkpoint

import colt5dist.nn.routing.router
from colt5dist import nn
from colt5dist.model.activation_checkpointing import run_layer
from colt5dist.nn.routing.kept_routing import keep_routing_decisions
from colt5dist.ops.select_topk import select_topk

B, N, D = 2, 64, 16
HEADS = {"light_heads": 2, "light_dim_head": 8, "heavy_heads": 2, "heavy_dim_head": 8}
# odd budgets: of tokens that come in pairs of near-ties, one pair is always parted
ATTENTION = {"num_heavy_tokens_q": 7, "num_heavy_tokens_kv": 15, **HEADS}


def block(**options):
    budgets = {"num_heavy_attn_tokens_q": 7, "num_heavy_attn_tokens_kv": 15, "num_heavy_ff_tokens": 7}
    return nn.ConditionalRoutedTransformerBlock(D, **budgets, **HEADS, light_window_size=16, **options)


class OnContext(torch.nn.Module):
    """Cross-attention of x to its own first half turned round, so that it stacks like the others."""

    def __init__(self):
        super().__init__()
        self.layer = nn.ConditionalRoutedCrossAttention(
            D, num_tokens_q=7, num_tokens_kv=6, num_sets_kv=2, dim_head=8, heads=2, route_block_size=16
        )

    def forward(self, x, mask):
        return self.layer(x, x.flip(1)[:, : N // 2], mask=mask, context_mask=mask.flip(1)[:, : N // 2])


class OnMap(torch.nn.Module):
    """The tokens as a map of 8 x 8."""

    def __init__(self):
        super().__init__()
        self.layer = nn.ConditionalRoutedImageAttention(D, **ATTENTION, light_window_size=4)

    def forward(self, x, mask):
        return self.layer(x.unflatten(1, (8, 8)), mask=mask.unflatten(1, (8, 8))).flatten(1, 2)


class Residual(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, mask):
        return x + self.layer(x, mask)


LAYERS = {
    "block": lambda: block(),
    "block of soft scores and two sets": lambda: block(
        router_straight_through=False,
        num_routed_kv=2,
        multiply_keys_by_score=True,
        multiply_queries_by_score=True,
        router_kwargs={"eps": 1.0},
    ),
    "cross-attention": lambda: Residual(OnContext()),
    "image attention": lambda: Residual(OnMap()),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


class Stack(torch.nn.Module):
    def __init__(self, name, mode="none"):
        super().__init__()
        self.layers = torch.nn.ModuleList(LAYERS[name]() for _ in range(2))
        self.mode = mode

    def forward(self, x, mask):
        for layer in self.layers:
            x = run_layer(layer, x, mask, activation_checkpointing=self.mode)
        return x


def stack(name, mode="none"):
    torch.manual_seed(0)
    return Stack(name, mode)


def batch(seed=0):
    x = torch.randn(B, N, D, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    return x, torch.arange(N) < torch.tensor([[N], [N - 5 - seed]])


def results(module, x, mask, function=None):
    """The output and the gradients of its square to the input and all parameters."""
    module.zero_grad()
    out = (module if function is None else function)(x, mask)
    loss = out.float()[mask].square().mean()
    grads = torch.autograd.grad(loss, (x, *module.parameters()))
    return out.detach(), *grads


@each_layer
def test_bf16_autocast(name):
    """Scores of the first layer are those of float32, so are its picks; the rest is as close as 8 bits are."""
    module, (x, mask) = stack(name), batch()
    expected = results(module.layers[0], x, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = results(module.layers[0], x, mask)
        both = results(module, x, mask)
    names = ["output", "x", *(name for name, _ in module.layers[0].named_parameters())]
    for name, here, there in zip(names, actual, expected, strict=True):
        # the soft top-k at the final temperature 0.03 magnifies what its gradient is given
        limit = 0.2 if "routing_tokens" in name else 0.02
        assert (here - there).norm() <= limit * there.norm() + 1e-6, name
    assert all(grad.isfinite().all() and grad.dtype == torch.float32 for grad in both[1:])


@each_layer
def test_all_in_bf16(name):
    module, (x, mask) = stack(name).bfloat16(), batch()
    x = x.detach().bfloat16().requires_grad_()
    out, *grads = results(module, x, mask)
    assert out.dtype == torch.bfloat16 and all(t.isfinite().all() for t in (out, *grads))


@pytest.mark.parametrize("name", ["block", "cross-attention", "image attention"])
def test_compiles_to_one_graph_and_only_once(name):
    """No graph break, no recompilation over steps that differ in values, and the eager layer's numbers."""
    module = stack(name)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            x, mask = batch(step)
            actual, expected = results(module, x, mask, compiled), results(module, x, mask)
            for here, there in zip(actual, expected, strict=True):
                torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-6)
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(0.01 * torch.randn_like(parameter))


@pytest.mark.parametrize(("mode", "routing_again"), [("full", True), ("full_keep_routing", False)])
def test_compiled_checkpointing_runs_the_routing_again_only_where_it_is_not_kept(mode, routing_again):
    """The backward graph itself is looked at."""
    module, (x, mask), graphs = stack("cross-attention", mode), batch(), []

    def keep(graph, _inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes if "colt5dist." in str(node.target)})
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    actual = results(module, x, mask, torch.compile(module, fullgraph=True, backend=backend))
    decides = [any("backward" not in operator for operator in operators) for operators in graphs]
    assert decides == [True, routing_again]
    for here, there in zip(actual, results(stack("cross-attention"), x, mask), strict=True):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-6)


def near_ties():
    """Tokens in pairs that differ by one unit in the last place of one number."""
    x, mask = batch()
    x = x.detach().clone()
    x[:, 1::2] = x[:, ::2]
    x[:, 1::2, 0] = torch.nextafter(x[:, ::2, 0], torch.tensor(9.0))
    return x.requires_grad_(), mask


@each_layer
@pytest.mark.parametrize("data", [batch, near_ties])
@pytest.mark.parametrize("mode", ["full", "full_keep_routing"])
def test_checkpointing_gives_the_same_bits(name, data, mode):
    x, mask = data()
    for here, there in zip(results(stack(name, mode), x, mask), results(stack(name), x, mask), strict=True):
        assert torch.equal(here, there)


@each_layer
@pytest.mark.parametrize(("keeps", "context_fn"), [(False, None), (True, keep_routing_decisions)])
def test_near_ties_that_fall_the_other_way_in_the_second_run(name, keeps, context_fn, monkeypatch):
    """Scores that the second run computes a few units in the last place otherwise: a kept decision does not move, and
    the gradients are those without checkpointing, to the bit; without one they are wrong."""
    module, (x, mask) = stack(name), near_ties()
    runs = []

    def other_in_the_second_run(scores, num_tokens, mask=None):
        scores = scores.detach()
        # of a pair whose scores are one but for a rounding error, the first token's is larger in one run, the second's
        # in the other
        even = torch.arange(scores.shape[-1]) % 2 == 0
        partner = torch.where(even, scores.roll(-1, -1), scores.roll(1, -1))
        larger = 2e-6 if len(runs) == 1 else -2e-6
        moved = (scores + partner) / 2 + torch.where(even, larger, -larger)
        return select_topk(torch.where((partner - scores).abs() < 4e-6, moved, scores), num_tokens, mask)

    def layer_of(layer):
        def run(x, mask):
            runs.append(layer)
            return layer(x, mask)

        return run

    monkeypatch.setattr(colt5dist.nn.routing.router, "select_topk", other_in_the_second_run)
    arguments = {} if context_fn is None else {"context_fn": context_fn}
    layer = module.layers[0]
    first = results(layer, x, mask, layer_of(layer))
    runs.clear()
    out = checkpoint(layer_of(layer), x, mask, use_reentrant=False, determinism_check="none", **arguments)
    loss = out.float()[mask].square().mean()
    grads = torch.autograd.grad(loss, (x, *layer.parameters()))
    assert len(runs) == 2
    same = [torch.equal(here, there) for here, there in zip(grads, first[1:], strict=True)]
    assert all(same) if keeps else not all(same)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["block", "block of soft scores and two sets", "cross-attention", "image attention"])
@pytest.mark.parametrize("mode", ["none", "full_keep_routing"])
def test_inductor_on_the_gpu(name, mode):
    """One graph, compiled once: in float32 eager's numbers; in bf16 as near to float32 as eager bf16 is, within a
    factor."""
    module = stack(name, mode).cuda()
    batches = [(x.detach().cuda().requires_grad_(), mask.cuda()) for x, mask in map(batch, range(3))]
    wide = [results(module, x, mask) for x, mask in batches]
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True)
        for (x, mask), expected in zip(batches, wide, strict=True):
            for here, there in zip(results(module, x, mask, compiled), expected, strict=True):
                assert (here - there).norm() <= 1e-3 * there.norm() + 1e-6
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True)
        for (x, mask), expected in zip(batches, wide, strict=True):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                eager, actual = results(module, x, mask), results(module, x, mask, compiled)
            assert all(grad.isfinite().all() for grad in actual[1:])
            # output and gradient of x by the median token: a near-tie that falls the other way moves a few
            for here, there, wanted in zip(actual[:2], eager[:2], expected[:2], strict=True):
                error = (here - wanted).norm(dim=-1).median()
                assert error <= 3 * (there - wanted).norm(dim=-1).median() + 1e-6
