"""What a layer, a model or an operator says of wrong arguments; that `help` explains the right ones; batches of 0."""

import inspect
import re

import numpy as np
import pytest
import torch

import colt5dist
from colt5dist import CausalCoLT5, CoLT5, CoLT5Config, nn, soft_topk, topk
from colt5dist.nn.attention.local import LocalSelfAttention
from colt5dist.nn.attention.multi_query import MultiQueryAttention

D, N = 16, 40
HEADS = {"light_heads": 2, "light_dim_head": 8, "heavy_heads": 2, "heavy_dim_head": 8}
BUDGETS = {"num_heavy_tokens_q": 7, "num_heavy_tokens_kv": 15}
BLOCK = {"num_heavy_attn_tokens_q": 7, "num_heavy_attn_tokens_kv": 15, "num_heavy_ff_tokens": 7}
CONSTRUCTED = {
    "Attention": {"dim_head": 8, "heads": 2},
    "CausalRouter": {"window_size": 16},
    "ConditionalRoutedAttention": BUDGETS | HEADS | {"light_window_size": 16, "rotary_emb": True},
    "ConditionalRoutedAutoregressiveAttention": BUDGETS | HEADS | {"light_window_size": 16},
    "ConditionalRoutedAutoregressiveBlock": BLOCK | HEADS | {"light_window_size": 16},
    "ConditionalRoutedCrossAttention": {"num_tokens_q": 7, "num_tokens_kv": 6, "dim_head": 8, "heads": 2},
    "ConditionalRoutedFeedForward": {"num_heavy_tokens": 7},
    "ConditionalRoutedImageAttention": BUDGETS | HEADS | {"light_window_size": 4},
    "ConditionalRoutedTransformerBlock": BLOCK | HEADS | {"light_window_size": 16},
    "CoordinateDescentRouter": {},
    "FeedForward": {},
    "RMSNorm": {},
    "RotaryEmbedding": {},
    "SelfAttention": {"dim_head": 8, "heads": 2},
}
"""Arguments, beside dim, of every public layer."""
MODULES = sorted(name for name in nn.__all__ if inspect.isclass(getattr(nn, name)) and name != "RouterReturn")
ON_TOKENS = [name for name in MODULES if name not in ("RotaryEmbedding", "CausalRouter", "RMSNorm", "FeedForward")]
MASKED = [name for name in ON_TOKENS if "Autoregressive" not in name]


def build(name, **arguments):
    torch.manual_seed(0)
    return getattr(nn, name)(**({"dim": D} | CONSTRUCTED[name] | arguments))


def tokens(name, batch=2):
    """An input that the layer takes."""
    shape = (batch, 8, 8, D) if name == "ConditionalRoutedImageAttention" else (batch, N, D)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def call(name, x, **arguments):
    if name == "ConditionalRoutedCrossAttention":
        arguments = {"context": torch.randn(x.shape[0], 30, D)} | arguments
    if name == "CoordinateDescentRouter":
        arguments = {"num_tokens": 7} | arguments
    return build(name)(x, **arguments)


def test_every_public_layer_is_looked_at():
    assert set(MODULES) == set(CONSTRUCTED)


@pytest.mark.parametrize("name", sorted({*MODULES, *colt5dist.__all__}))
def test_help_explains_every_argument(name):
    public = getattr(colt5dist, name, None) or getattr(nn, name)
    text = inspect.getdoc(public)
    explained = set()
    for names in re.findall(r"^    (\w+(?:, \w+)*): ", text.split("Args:\n")[1], re.MULTILINE):
        explained |= set(names.split(", "))
    assert set(inspect.signature(public).parameters) <= explained
    assert len(text.splitlines()[0]) < 115 and "as in `" not in text.split("Args:\n")[1]


def numbers(name):
    """Arguments of the constructor that are numbers."""
    parameters = inspect.signature(getattr(nn, name)).parameters.values()
    return [p.name for p in parameters if re.search(r"\b(int|float)\b", str(p.annotation)) and p.name != "route_groups"]


@pytest.mark.parametrize(("name", "argument"), [(name, argument) for name in MODULES for argument in numbers(name)])
def test_strings_and_negative_numbers_in_constructors(name, argument):
    with pytest.raises((TypeError, ValueError), match=rf"^{argument}: '8'.*use a (whole )?number"):
        build(name, **{argument: "8"})
    if argument not in ("random_seed", "random_stream"):
        with pytest.raises(ValueError, match=rf"^{argument}: -1"):
            build(name, **{argument: -1})


@pytest.mark.parametrize("value", [0, -1, 2.5, "8", True, torch.tensor(8)], ids=repr)
@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, a) for name in MODULES for a in numbers(name) if re.fullmatch(r"num_(heavy|tokens).*", a)],
)
def test_budgets(name, argument, value):
    """In the constructor and in `forward`, where they have one name."""
    with pytest.raises((TypeError, ValueError), match=rf"^{argument}: .*use"):
        build(name, **{argument: value})
    with pytest.raises((TypeError, ValueError), match=rf"^{argument}: .*use"):
        call(name, tokens(name), **{argument: value})


@pytest.mark.parametrize("value", [0, -1, 2.5, "8", True], ids=repr)
def test_budget_of_the_router(value):
    with pytest.raises((TypeError, ValueError), match=r"^num_tokens: .*use"):
        call("CoordinateDescentRouter", tokens("CoordinateDescentRouter"), num_tokens=value)


def test_integers_of_numpy_are_budgets():
    x = tokens("ConditionalRoutedFeedForward")
    assert torch.equal(
        call("ConditionalRoutedFeedForward", x, num_heavy_tokens=np.int64(5)),
        call("ConditionalRoutedFeedForward", x, num_heavy_tokens=5),
    )


@pytest.mark.parametrize("name", [*ON_TOKENS, "FeedForward", "RMSNorm"])
def test_width_and_type_of_the_input(name):
    x = tokens(name)
    wrong = [x[..., 1:], x.to(torch.int64)]
    if name in ON_TOKENS:
        wrong += [x[0], x[:, None]]
    for given in wrong:
        with pytest.raises(ValueError, match=r"^x: .*use"):
            call(name, given)
    with pytest.raises(TypeError, match=r"^x: list; use a tensor"):
        build(name)(x.tolist(), **{"context": x} if "Cross" in name else {"num_tokens": 7} if "Router" in name else {})


@pytest.mark.parametrize("name", MASKED)
def test_masks(name):
    x = tokens(name)
    mask = torch.ones(x.shape[:-1], dtype=torch.bool)
    for wrong in (mask[:, 1:], mask[:1], mask.float(), mask.to("meta")):
        with pytest.raises(ValueError, match=r"^mask: .*use"):
            call(name, x, mask=wrong)
    with pytest.raises(TypeError, match=r"^mask: "):
        call(name, x, mask=mask.tolist())


@pytest.mark.parametrize("name", ["Attention", "ConditionalRoutedCrossAttention"])
def test_contexts(name):
    x = tokens(name)
    for wrong in (x[0], x[..., 1:], x[:1], x.int(), x.to("meta")):
        with pytest.raises(ValueError, match=r"^context: .*use"):
            call(name, x, context=wrong)
    if "Cross" in name:
        with pytest.raises(ValueError, match=r"^context_mask: .*use"):
            call(name, x, context=x, context_mask=torch.ones(2, N))


def test_routing_tokens_and_sample_index():
    x = tokens("CoordinateDescentRouter")
    router = build("CoordinateDescentRouter", learned_routing_tokens=True)
    for wrong in (torch.ones(2, D + 1), torch.ones(2, D, device="meta")):
        with pytest.raises(ValueError, match=r"^routing_tokens: .*use"):
            router(x, num_tokens=3, routing_tokens=wrong)
    layer = build("ConditionalRoutedFeedForward", router_kwargs={"routing": "random"})
    for index in (torch.arange(3), torch.ones(2), torch.arange(2, device="meta")):
        with pytest.raises(ValueError, match=r"^sample_index: .*use"):
            layer(x, sample_index=index)


@pytest.mark.parametrize("router_kwargs", [5, {"straight_through": True}, {"no_such": 1}, {"n_iters": "20"}])
def test_arguments_of_the_routers(router_kwargs):
    with pytest.raises((TypeError, ValueError), match=r"router_kwargs|no_such|n_iters"):
        build("ConditionalRoutedTransformerBlock", router_kwargs=router_kwargs)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (soft_topk, {"k": "3"}),
        (soft_topk, {"k": True}),
        (soft_topk, {"k": torch.ones(2, device="meta")}),
        (soft_topk, {"scores": [1.0, 2.0]}),
        (soft_topk, {"scores": torch.ones(2, 8, dtype=torch.int64)}),
        (soft_topk, {"mask": [True]}),
        (soft_topk, {"mask": torch.ones(2, 8, dtype=torch.bool, device="meta")}),
        (soft_topk, {"n_iters": "20"}),
        (soft_topk, {"n_iters": 2.5}),
        (soft_topk, {"eps": "1"}),
        (soft_topk, {"checkpoint_segments": "1"}),
        (topk, {"k": "3"}),
        (topk, {"k": 2.5}),
        (topk, {"k": 0}),
        (topk, {"k": True}),
        (topk, {"x": [1.0, 2.0]}),
        (topk, {"x": torch.ones(2, 8, dtype=torch.int64)}),
        (topk, {"mask": torch.ones(2, 8, dtype=torch.bool, device="meta")}),
        (topk, {"mask": [True]}),
        (topk, {"n_iters": "20"}),
        (topk, {"coor_descent_k_ratio": "1"}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_functions(function, arguments):
    first = "scores" if function is soft_topk else "x"
    given = {first: torch.ones(2, 8), "k": 3} | arguments
    with pytest.raises((TypeError, ValueError), match=rf"^{next(iter(arguments))}: .*use"):
        function(given.pop(first), given.pop("k"), **given)


SIZES = {
    "vocab_size": 128,
    "d_model": 32,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "head_dim": 8,
    "num_heads": 4,
    "num_light_heads": 1,
    "num_heavy_heads": 3,
    "light_ff_dim": 24,
    "heavy_ff_dim": 64,
    "ff_dim": 48,
    "light_radius": 5,
}


def model(name, **fields):
    if name == "CausalCoLT5":
        fields = {"architecture": "causal", "num_encoder_layers": 0, "window_size": 16} | fields
        return CausalCoLT5(CoLT5Config(**SIZES | fields))
    return CoLT5(CoLT5Config(**SIZES | fields))


def model_inputs(name, batch=2):
    length = 0 if name == "CausalCoLT5" else 32
    shapes = {"input_ids": (batch, length), "decoder_input_ids": (batch, 40), "target_ids": (batch, 40)}
    return {key: torch.zeros(shape, dtype=torch.int64) for key, shape in shapes.items()}


each_model = pytest.mark.parametrize("name", ["CoLT5", "CausalCoLT5"])


@each_model
def test_models_refuse_wrong_inputs(name):
    built, good = model(name), model_inputs(name)
    wrong = [(key, value) for key, ids in good.items() for value in (ids.float(), ids[0], ids.to("meta"))]
    wrong = [(key, value) for key, value in wrong if key != "input_ids" or value.device.type == "cpu"]
    wrong += [("target_ids", good["target_ids"][:, 1:]), ("decoder_input_ids", good["decoder_input_ids"][:1])]
    wrong += [("input_mask", torch.ones(2, 3, dtype=torch.bool)), ("target_mask", torch.ones(2, 40))]
    wrong += [("sample_index", torch.arange(3))]
    for key, value in wrong:
        with pytest.raises(ValueError, match=rf"^{key}: .*use"):
            built(**good | {key: value})
    with pytest.raises(TypeError, match=r"^target_ids: list"):
        built(**good | {"target_ids": [[0]]})


@each_model
@pytest.mark.parametrize("fields", [{"d_model": "32"}, {"num_heads": 2.5}, {"router_eps": "1"}, {"routing": 3}])
def test_models_refuse_wrong_types_in_the_configuration(name, fields):
    with pytest.raises(ValueError, match=rf"^model\.{next(iter(fields))}: .*use a"):
        model(name, **fields)


@pytest.mark.parametrize("public", [CoLT5, CausalCoLT5])
def test_models_refuse_what_is_no_configuration(public):
    with pytest.raises(TypeError, match=r"^config: dict; use a CoLT5Config"):
        public(SIZES)


def test_generation_refuses_wrong_arguments():
    built = model("CausalCoLT5")
    for arguments, named in (
        ((torch.zeros(1, 3), 2), "input_ids"),
        ((torch.zeros(1, 3).long(), "2"), "num_tokens"),
        ((torch.zeros(1, 3).long(), -2), "num_tokens"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{named}: "):
            built.generate(*arguments)


def assert_takes_nothing(out, x, module, shape):
    assert out.shape == shape
    out.sum().backward()
    assert x.grad is None or x.grad.shape == x.shape
    assert all(p.grad is None or (p.grad.isfinite().all() and not p.grad.any()) for p in module.parameters())


@pytest.mark.parametrize("soft", [False, True], ids=["straight-through", "soft"])
@pytest.mark.parametrize("name", [*ON_TOKENS, "FeedForward", "RMSNorm"])
def test_batch_of_none(name, soft):
    """Forward and backward, as PyTorch's own layers take it."""
    settings = {}
    if name.startswith("Conditional"):
        settings = {"router_straight_through": not soft, "multiply_keys_by_score": soft} if "Feed" not in name else {}
    module, x = build(name, **settings), tokens(name, 0).requires_grad_()
    extra = {"context": torch.randn(0, 30, D)} if "Cross" in name else {}
    extra |= {"num_tokens": 7} if name == "CoordinateDescentRouter" else {}
    masks = [None]
    if name in MASKED:
        masks.append(torch.ones(x.shape[:-1], dtype=torch.bool))
    for mask in masks:
        out = module(x, **extra, **({} if mask is None else {"mask": mask}))
        if name == "CoordinateDescentRouter":
            assert out.indices.shape == out.scores.shape == (0, 7)
            assert_takes_nothing(out.routed_tokens * out.scores[..., None], x, module, (0, 7, D))
        else:
            assert_takes_nothing(out, x, module, x.shape)


@pytest.mark.parametrize("options", [{"routing": "patch"}, {"channel_first": True}, {"num_routed_kv": 2}], ids=str)
def test_batch_of_no_maps(options):
    module = build("ConditionalRoutedImageAttention", **options)
    x = torch.randn((0, D, 8, 8) if "channel_first" in options else (0, 8, 8, D)).requires_grad_()
    assert_takes_nothing(module(x), x, module, x.shape)


@pytest.mark.parametrize("routing", ["causal", "window"])
@pytest.mark.parametrize("length", [40, 10])
def test_batch_of_none_in_windows(routing, length):
    module = build("ConditionalRoutedAutoregressiveAttention", routing=routing, num_routed_kv=2, rotary_emb=True)
    x = torch.randn(0, length, D).requires_grad_()
    assert_takes_nothing(module(x), x, module, x.shape)


@pytest.mark.parametrize("build_layer", [LocalSelfAttention, MultiQueryAttention])
def test_batch_of_none_in_the_light_branch_and_the_decoder(build_layer):
    module = build_layer(D, dim_head=8, heads=2, **({"radius": 5} if build_layer is LocalSelfAttention else {}))
    x = torch.randn(0, N, D).requires_grad_()
    context = () if build_layer is LocalSelfAttention else (torch.randn(0, 30, D),)
    assert_takes_nothing(module(x, *context), x, module, x.shape)


@each_model
@pytest.mark.parametrize("fields", [{}, {"router_solver": "newton"}, {"routing": "static"}], ids=str)
def test_batch_of_none_in_models(name, fields):
    built = model(name, **fields)
    out = built(**model_inputs(name, 0), collect_routing=True)
    assert out.token_loss.shape == out.z_loss.shape == (0, 40)
    (out.token_loss.sum() + out.z_loss.sum()).backward()
    assert all(not p.grad.any() for p in built.parameters() if p.grad is not None)


def test_batch_of_none_in_the_dense_encoder():
    assert model("CoLT5", encoder="dense")(**model_inputs("CoLT5", 0)).token_loss.shape == (0, 40)
