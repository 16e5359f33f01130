"""Every layer equals the one of colt5-attention: outputs, gradients to inputs and to every parameter.

Each option of a conditional layer is taken both ways, in all combinations, masked and unmasked, routed and unrouted.
"""

from itertools import product

import colt5_attention as reference
import pytest
import torch
from colt5_attention import transformer_block as reference_parts

from colt5dist import nn

B, N, D, Q, KV = 2, 16, 8, 4, 6
HEADS = {"light_dim_head": 4, "light_heads": 1, "light_window_size": 8, "heavy_dim_head": 4, "heavy_heads": 2}
MASK = torch.arange(N) < torch.tensor([[N], [11]])
# at eps 1 eight iterations show all that twenty do
SHORT = {"eps": 1.0, "n_iters": 8}
# budgets of queries and keys/values: routed, only one of the two routed, neither
ROUTED = {"routed": (Q, KV), "q routed": (Q, N), "kv routed": (N, KV), "unrouted": (N, N)}

# colt5-attention asks for its flash kernels by an old name
pytestmark = pytest.mark.filterwarnings("ignore:.*sdp_kernel.*:FutureWarning")


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def all_options(*names):
    """Every combination of the named options, as arguments and with readable names."""
    combinations = [dict(zip(names, values, strict=True)) for values in product((False, True), repeat=len(names))]
    return pytest.mark.parametrize("options", combinations, ids=_option_id)


def one_option(*names):
    """All options off, each alone, and all on."""
    off = dict.fromkeys(names, False)
    combinations = [off, *(off | {name: True} for name in names), dict.fromkeys(names, True)]
    return pytest.mark.parametrize("options", combinations, ids=_option_id)


def _option_id(options):
    return "+".join(name for name, value in options.items() if value) or "none"


masked = pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
routed = pytest.mark.parametrize("budgets", ROUTED.values(), ids=ROUTED.keys())


def build(name, *arguments, **settings):
    """The module of both packages, ours in float32 with other random weights."""
    torch.manual_seed(0)
    return getattr(nn, name)(*arguments, **settings), getattr(reference_parts, name)(*arguments, **settings)


def router_kwargs(precision, **others):
    return {"router_kwargs": {"eps": precision.eps, **others}}


class TestFeedForward:
    @masked
    @pytest.mark.parametrize("budget", [Q, N], ids=["routed", "unrouted"])
    @all_options("router_straight_through", "use_triton")
    def test_conditional(self, assert_parity, precision, options, budget, masked):
        settings = router_kwargs(precision) | options
        ours = nn.ConditionalRoutedFeedForward(D, num_heavy_tokens=budget, **settings)
        # the kernels of colt5-attention need a GPU
        theirs = reference.ConditionalRoutedFeedForward(
            D, num_heavy_tokens=budget, **(settings | {"use_triton": False})
        )
        mask = MASK if masked else None
        assert_parity(ours, theirs, lambda module, x: module(x, mask=mask), [random(B, N, D)], precision)


ATTENTION_OPTIONS = (
    "router_straight_through",
    "multiply_keys_by_score",
    "multiply_queries_by_score",
    "use_null_q_tokens",
    "rotary_emb",
    "has_light_attn",
)


def conditional_attention(budgets, options, **settings):
    return build(
        "ConditionalRoutedAttention",
        D,
        num_heavy_tokens_q=budgets[0],
        num_heavy_tokens_kv=budgets[1],
        **HEADS | options | settings,
    )


class TestAttention:
    @masked
    @pytest.mark.parametrize("budgets", [(Q, KV), (N, N)], ids=["routed", "unrouted"])
    @all_options(*ATTENTION_OPTIONS)
    def test_all_options(self, assert_parity, options, budgets, masked):
        ours, theirs = conditional_attention(budgets, options, router_kwargs=SHORT)
        mask = MASK if masked else None
        assert_parity(ours, theirs, lambda module, x: module(x, mask=mask), [random(B, N, D)])

    @masked
    @pytest.mark.parametrize("budgets", [(Q, N), (N, KV)], ids=["q routed", "kv routed"])
    @one_option(*ATTENTION_OPTIONS)
    def test_one_of_the_two_routed(self, assert_parity, options, budgets, masked):
        ours, theirs = conditional_attention(budgets, options, router_kwargs=SHORT)
        mask = MASK if masked else None
        assert_parity(ours, theirs, lambda module, x: module(x, mask=mask), [random(B, N, D)])

    @masked
    @one_option(*ATTENTION_OPTIONS, "use_flash_attn")
    def test_precisions(self, assert_parity, precision, options, masked):
        ours, theirs = conditional_attention((Q, KV), options, **router_kwargs(precision))
        mask = MASK if masked else None
        assert_parity(ours, theirs, lambda module, x: module(x, mask=mask), [random(B, N, D)], precision)

    @masked
    @routed
    @one_option(*ATTENTION_OPTIONS)
    def test_several_sets(self, assert_parity, options, budgets, masked):
        ours, theirs = conditional_attention(budgets, options, num_routed_kv=2, router_kwargs=SHORT)
        mask = MASK[1:] if masked else None
        # at batch 1: colt5-attention gives every sample the first one's tokens
        assert_parity(ours, theirs, lambda module, x: module(x, mask=mask), [random(1, N, D)])

    @masked
    def test_cosine(self, assert_parity, precision, masked):
        settings = router_kwargs(precision, cosine_sim_routing=True, cosine_sim_scale=2 * precision.eps)
        ours, theirs = conditional_attention((Q, KV), {"router_straight_through": False}, **settings)
        mask = MASK if masked else None
        assert_parity(ours, theirs, lambda module, x: module(x, mask=mask), [random(B, N, D)], precision)

    def test_budgets_of_the_call(self, assert_parity):
        ours, theirs = conditional_attention((N, N), {}, router_kwargs=SHORT)
        budgets = {"num_heavy_tokens_q": Q, "num_heavy_tokens_kv": KV}
        assert_parity(ours, theirs, lambda module, x: module(x, **budgets), [random(B, N, D)])


BLOCK_OPTIONS = (
    "router_straight_through",
    "multiply_keys_by_score",
    "multiply_queries_by_score",
    "use_null_q_tokens",
    "use_flash_attn",
)


class TestBlock:
    def modules(self, options, budgets=(Q, KV, Q), **settings):
        return build(
            "ConditionalRoutedTransformerBlock",
            D,
            num_heavy_attn_tokens_q=budgets[0],
            num_heavy_attn_tokens_kv=budgets[1],
            num_heavy_ff_tokens=budgets[2],
            **HEADS | options | settings,
        )

    @masked
    @pytest.mark.parametrize("budgets", [(Q, KV, Q), (N, N, N)], ids=["routed", "unrouted"])
    @all_options(*BLOCK_OPTIONS)
    def test_all_options(self, assert_parity, options, budgets, masked):
        ours, theirs = self.modules(options, budgets, router_kwargs=SHORT)
        mask = MASK if masked else None
        assert_parity(ours, theirs, lambda module, x: module(x, mask=mask), [random(B, N, D)])

    @masked
    def test_precisions(self, assert_parity, precision, masked):
        ours, theirs = self.modules({"router_straight_through": False}, **router_kwargs(precision))
        mask = MASK if masked else None
        assert_parity(ours, theirs, lambda module, x: module(x, mask=mask), [random(B, N, D)], precision)

    @masked
    def test_several_sets(self, assert_parity, masked):
        ours, theirs = self.modules({}, num_routed_kv=2, router_kwargs=SHORT)
        mask = MASK[1:] if masked else None
        assert_parity(ours, theirs, lambda module, x: module(x, mask=mask), [random(1, N, D)])

    def test_budgets_of_the_call(self, assert_parity):
        ours, theirs = self.modules({}, (N, N, N), router_kwargs=SHORT)
        budgets = {"num_heavy_attn_tokens_q": Q, "num_heavy_attn_tokens_kv": KV, "num_heavy_ff_tokens": Q}
        assert_parity(ours, theirs, lambda module, x: module(x, **budgets), [random(B, N, D)])


CROSS_OPTIONS = ("router_straight_through", "multiply_keys_by_score", "use_null_q_tokens", "use_flash_attn")
LENGTH, CONTEXT_LENGTH = 10, N


class TestCrossAttention:
    """colt5-attention reads a name that it never sets, `should_route_queries`, and raises NameError in every call (see
    test_parity_faults.py). Here it is set from outside, to what the code around it means; the rest is theirs."""

    @pytest.fixture
    def compare(self, assert_parity, monkeypatch):
        def compare(options, budgets, masked, batch=B, **settings):
            precision = settings.pop("precision", None)
            ours, theirs = build(
                "ConditionalRoutedCrossAttention",
                D,
                num_tokens_q=budgets[0],
                num_tokens_kv=budgets[1],
                dim_head=4,
                heads=2,
                **options | settings,
            )
            monkeypatch.setattr(reference_parts, "should_route_queries", budgets[0] < LENGTH, raising=False)
            masks = {}
            if masked:
                rows = slice(B - batch, None)
                mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [6]])
                masks = {"mask": mask[rows], "context_mask": MASK[rows]}
            inputs = [random(batch, LENGTH, D), random(batch, CONTEXT_LENGTH, D, seed=1)]
            more = [] if precision is None else [precision]
            assert_parity(ours, theirs, lambda module, x, context: module(x, context, **masks), inputs, *more)

        return compare

    @masked
    @routed
    @all_options(*CROSS_OPTIONS)
    def test_all_options(self, compare, options, budgets, masked):
        compare(options, budgets, masked, router_kwargs=SHORT)

    @masked
    def test_precisions(self, compare, precision, masked):
        compare({"router_straight_through": False}, (Q, KV), masked, precision=precision, **router_kwargs(precision))

    @masked
    @routed
    @one_option(*CROSS_OPTIONS)
    def test_several_sets(self, compare, options, budgets, masked):
        compare(options, budgets, masked, batch=1, kv_routing_tokens=2, router_kwargs=SHORT)


IMAGE_OPTIONS = (
    "router_straight_through",
    "multiply_keys_by_score",
    "multiply_queries_by_score",
    "use_null_q_tokens",
    "channel_first",
)
SIDE, PATCH = 8, 4


class TestImageAttention:
    """colt5-attention routes within patches (`routing="patch"` here), takes its mask in the patches' shape, and
    attends to masked positions in the light branch. Here it is given the mask in that shape, and its light branch the
    mask that it does not pass on."""

    @pytest.fixture
    def compare(self, assert_parity):
        def compare(options, masked, budgets=(Q, KV), side=SIDE, batch=B, precision=None, **settings):
            torch.manual_seed(0)
            arguments = {"num_heavy_tokens_q": budgets[0], "num_heavy_tokens_kv": budgets[1], **HEADS}
            arguments |= {"light_window_size": PATCH, **options, **settings}
            routing = arguments.pop("routing", "patch")
            ours = nn.ConditionalRoutedImageAttention(D, routing=routing, **arguments)
            theirs = reference.ConditionalRoutedImageAttention(D, **arguments)
            x = random(batch, side, side, D)
            inputs = [x.movedim(-1, 1) if options.get("channel_first") else x]
            mask = patch_mask = None
            if masked:
                mask = random(batch, side, side, seed=2) > -0.5
                cut = mask.view(batch, side // PATCH, PATCH, side // PATCH, PATCH).transpose(2, 3)
                patch_mask = cut.reshape(-1, PATCH * PATCH)
                theirs.light_attn.attend.register_forward_pre_hook(
                    lambda module, args, kwargs: (args, {"mask": patch_mask}), with_kwargs=True
                )
            assert_parity(
                ours,
                theirs,
                lambda module, x: module(x, mask=mask),
                inputs,
                *([] if precision is None else [precision]),
                call_theirs=lambda module, x: module(x, mask=patch_mask),
            )

        return compare

    @masked
    @pytest.mark.parametrize("budgets", [(Q, KV), (Q, PATCH * PATCH)], ids=["routed", "q routed"])
    @all_options(*IMAGE_OPTIONS)
    def test_all_options(self, compare, options, budgets, masked):
        compare(options, masked, budgets, router_kwargs=SHORT)

    @masked
    def test_precisions(self, compare, precision, masked):
        compare({"router_straight_through": False}, masked, precision=precision, **router_kwargs(precision))

    @masked
    @pytest.mark.parametrize("routing", ["patch", "map"])
    @one_option(*IMAGE_OPTIONS, "use_flash_attn")
    def test_several_sets_and_a_map_of_one_patch(self, compare, options, routing, masked):
        """Routing within the only patch is routing in the whole map."""
        compare(options, masked, side=PATCH, batch=1, num_routed_kv=2, routing=routing, router_kwargs=SHORT)

    @one_option(*IMAGE_OPTIONS)
    def test_a_map_of_many_patches(self, assert_parity, options):
        """Composed of parts of colt5-attention: its light branch within patches, and its module with one patch as
        large as the map, without the light branch."""
        torch.manual_seed(0)
        arguments = {"num_heavy_tokens_q": Q, "num_heavy_tokens_kv": KV, "router_kwargs": SHORT}
        arguments |= {**HEADS, "light_window_size": PATCH, **options}
        ours = nn.ConditionalRoutedImageAttention(D, **arguments)
        theirs = reference.ConditionalRoutedImageAttention(D, **arguments | {"light_window_size": SIDE})

        def call_theirs(module, x):
            last = x.movedim(1, -1) if module.channel_first else x
            patches = last.view(B, 2, PATCH, 2, PATCH, D).transpose(2, 3).reshape(-1, PATCH * PATCH, D)
            light = module.light_attn(patches).view(B, 2, 2, PATCH, PATCH, D).transpose(2, 3).reshape(last.shape)
            with torch.no_grad():
                whole = module.light_attn(last.flatten(1, 2)).view(last.shape)
            handle = module.light_attn.register_forward_hook(lambda *_: torch.zeros_like(last).flatten(1, 2))
            heavy = module(x)
            handle.remove()
            assert not torch.allclose(whole, light), "one patch: nothing is tested"
            return heavy + (light.movedim(-1, 1) if module.channel_first else light)

        x = random(B, SIDE, SIDE, D)
        x = x.movedim(-1, 1).contiguous() if options["channel_first"] else x
        assert_parity(ours, theirs, lambda module, x: module(x), [x], call_theirs=call_theirs)
