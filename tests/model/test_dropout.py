"""Dropout in the models: a function of the seed and the sample's number, in training only, at T5's places."""

from collections import Counter

import pytest
import torch

from colt5dist.model import CausalCoLT5, CoLT5Config
from colt5dist.nn import dropout as places
from colt5dist.train.engine.compile import compile_layers

FORMS = [{}, {"encoder": "dense"}, {"encoder": "light"}]


def rows(batch, numbers):
    return {name: tensor[numbers] for name, tensor in batch.items()}


@pytest.fixture
def whole(batch):
    """The batch without the sample that is wholly padded."""
    return rows(batch, slice(0, 3))


@pytest.mark.parametrize("fields", FORMS, ids=["conditional", "dense", "light"])
def test_a_samples_loss_does_not_depend_on_how_the_batch_is_cut(build, whole, fields):
    model = build(dropout=0.3, **fields)
    together = model(**whole).token_loss
    for number in range(3):
        alone = model(**rows(whole, slice(number, number + 1))).token_loss
        torch.testing.assert_close(alone, together[number : number + 1], rtol=1e-5, atol=1e-6)
    assert torch.equal(model(**whole).token_loss, together)


def test_other_samples_seeds_and_rates_give_other_masks(build, whole):
    first = build(dropout=0.3)(**whole).token_loss
    others = {
        "another step": build(dropout=0.3)(**(whole | {"sample_index": whole["sample_index"] + 8})).token_loss,
        "another seed": build(dropout=0.3, seed=1)(**whole).token_loss,
        "another rate": build(dropout=0.2)(**whole).token_loss,
        "none": build()(**whole).token_loss,
    }
    assert [name for name, loss in others.items() if torch.allclose(loss, first, rtol=1e-4)] == []


def test_evaluation_drops_nothing_and_needs_no_sample_numbers(build, whole):
    plain = build().eval()(**whole).token_loss
    model = build(dropout=0.3)
    assert torch.equal(model.eval()(**(whole | {"sample_index": None})).token_loss, plain)
    written = model.train().generate(whole["input_ids"], input_mask=whole["input_mask"], max_new_tokens=4)
    expected = build().generate(whole["input_ids"], input_mask=whole["input_mask"], max_new_tokens=4)
    assert torch.equal(written, expected) and model.training
    with pytest.raises(ValueError, match="sample_index: needed for dropout"):
        model(**(whole | {"sample_index": None}))


@pytest.fixture
def dropped(monkeypatch):
    """The masks of all calls: (keys, place, shape) of each."""
    found = []
    original = places.drop_elements

    def record(x, keys, *, rate, place):
        found.append((tuple(keys.tolist()), place, tuple(x.shape)))
        return original(x, keys, rate=rate, place=place)

    monkeypatch.setattr(places, "drop_elements", record)
    return found


@pytest.mark.parametrize(
    ("fields", "of_encoder_layer"), [({}, 4), ({"encoder": "dense"}, 3), ({"encoder": "light"}, 3)], ids=["c", "d", "l"]
)
def test_every_place_of_every_layer_has_a_mask_of_its_own(build, whole, dropped, fields, of_encoder_layer):
    build(dropout=0.3, **fields)(**whole)
    # two ends of encoder and decoder; a decoder layer: two attentions, hidden units, what the feed-forward adds
    assert len(dropped) == 2 * 2 + 2 * of_encoder_layer + 2 * 4
    assert len({(keys, place) for keys, place, _ in dropped}) == len(dropped)


def test_the_causal_model(dropped):
    fields = {"d_model": 32, "head_dim": 8, "num_heads": 4, "num_light_heads": 1, "num_heavy_heads": 3, "ff_dim": 48}
    sizes = {"light_ff_dim": 24, "heavy_ff_dim": 64, "window_size": 16, "memory_size": 16, "num_encoder_layers": 0}
    config = CoLT5Config(architecture="causal", vocab_size=128, num_decoder_layers=2, dropout=0.3, **fields, **sizes)
    torch.manual_seed(0)
    model = CausalCoLT5(config)
    ids = torch.randint(1, 128, (2, 48))
    batch = {"input_ids": ids[:, :0], "decoder_input_ids": ids, "target_ids": ids, "sample_index": torch.arange(2)}
    loss = model(**batch).token_loss
    assert len({(keys, place) for keys, place, _ in dropped}) == len(dropped) == 2 + 2 * 4
    torch.testing.assert_close(model(**rows(batch, slice(1, 2))).token_loss, loss[1:], rtol=1e-5, atol=1e-6)
    changed = ids.clone()
    changed[:, -1] = 5  # no loss of an earlier token sees it, with the same masks
    assert torch.equal(model(**(batch | {"decoder_input_ids": changed})).token_loss[:, :-1], loss[:, :-1])


def test_layers_stay_one_compiled_graph(build, whole):
    """The keys come as a tensor: a compiled layer serves every layer and every step."""
    model, plain = build(dropout=0.3), build(dropout=0.3)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for layer in model.decoder.layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False, backend=backend)
    for step in range(3):
        given = whole | {"sample_index": whole["sample_index"] + 3 * step}
        torch.testing.assert_close(model(**given).token_loss, plain(**given).token_loss)
    assert len(compiled) == 1


@pytest.mark.parametrize(
    "fields", [{}, {"routing": "random"}, {"encoder": "dense"}], ids=["learned", "random", "dense"]
)
def test_a_compiled_layer_draws_by_single_operations(build, whole, fields):
    """PyTorch's compiler puts what a word is computed from into each place that uses the word, and would not end."""
    model, operations = build(dropout=0.3, **fields), Counter()

    def look(graph, _):
        operations.update(str(node.target) for node in graph.graph.nodes if node.op in ("call_function", "call_method"))
        return graph.forward

    compile_layers(model, backend=look)
    expected = build(dropout=0.3, **fields)(**whole).token_loss
    torch.testing.assert_close(model(**whole).token_loss, expected)
    assert operations["colt5dist.kept_elements"] > 0
    assert [name for name in operations if "xor" in name] == []  # of which mixing consists
