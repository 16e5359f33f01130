"""CoLT5.generate: caches against whole passes, inputs of any length, batches against single samples, arguments."""

import pytest
import torch
import torch.nn.functional as F

from colt5dist.model.generation import (
    DecoderState,
    GenerationSettings,
    encode_inputs,
    for_inference,
    search_for,
    write_from_start,
)

ENDS = {"max_new_tokens": 20}
WAYS = {
    "greedy": {},
    "draws": {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "seed": 4, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.7},
}
each_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def model(build):
    """A float64 model whose outputs are no near-ties, and end at different places."""
    return lively(build().double())


def lively(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
        model.loss.weight[model.eos_id] *= 2
    return model.eval()


def inputs(b, n, seed=1):
    return torch.randint(2, 128, (b, n), generator=torch.Generator().manual_seed(seed))


def encoded_alone(model, ids):
    """States of the valid tokens of one input (1, n), padded by hand to the multiple."""
    n = ids.shape[1]
    padding = -n % model.config.input_multiple
    mask = F.pad(torch.ones(1, n, dtype=torch.bool), (0, padding))
    return model.encode(F.pad(ids, (0, padding)), input_mask=mask)[0][:, :n]


class WithoutCache:
    """What `DecoderState` does, by whole passes over all tokens."""

    def __init__(self, model, states, rows_per_sample):
        self.model, self.states, self.read = model, states.repeat_interleave(rows_per_sample, 0), None

    def step(self, token_ids):
        new = token_ids.unsqueeze(1).clone()
        self.read = new if self.read is None else torch.cat((self.read, new), dim=1)
        return self.model.loss.logits(self.model.decode(self.read, self.states)[:, -1])

    def reorder(self, parents):
        self.read = self.read[parents]


@pytest.mark.parametrize("n", [1, 7, 8, 21, 64])
def test_cached_logits_are_those_of_the_whole_pass(model, n):
    ids, targets = inputs(2, n), inputs(2, 9, seed=2)
    with torch.no_grad():
        encoded = encode_inputs(model, ids, None, None)
        state = DecoderState(
            model.embedding, model.decoder, model.loss, encoded, rows_per_sample=1, num_slots=targets.shape[1]
        )
        stepped = torch.stack([state.step(token) for token in targets.unbind(1)], dim=1)
        for row in range(2):
            states = encoded_alone(model, ids[row : row + 1])
            expected = model.loss.logits(model.decode(targets[row : row + 1], states))
            torch.testing.assert_close(stepped[row : row + 1], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("fields", [{"encoder": "dense"}, {"light_positions": "relative"}, {"routing": "random"}])
def test_other_encoders(build, fields):
    model = lively(build(**fields).double())
    mask = torch.arange(21) < torch.tensor([[21], [10]])
    written = model.generate(inputs(2, 21), input_mask=mask, **ENDS)
    for row, n in enumerate((21, 10)):
        number = torch.tensor([row])
        alone = model.generate(inputs(2, 21)[row : row + 1, :n], sample_index=number, **ENDS)
        assert torch.equal(F.pad(alone, (0, written.shape[1] - alone.shape[1])), written[row : row + 1])


@each_way
def test_what_is_written_is_what_is_written_without_a_cache(model, way):
    ids = inputs(1, 13)
    settings = GenerationSettings(**ENDS, **WAYS[way])
    with for_inference(model, ids.device):
        state = WithoutCache(model, encoded_alone(model, ids), settings.rows_per_sample)
        search = search_for(settings, torch.arange(1), torch.float64)
        expected = write_from_start(state, search, ENDS["max_new_tokens"])
    written = model.generate(ids, **ENDS, **WAYS[way])
    assert torch.equal(F.pad(written, (0, expected.shape[1] - written.shape[1])), expected)
    if way == "beams":
        shares = model.loss.logits(model.decode(F.pad(written, (1, 0))[:, :-1], state.states[:2])).log_softmax(-1)
        sums = (shares.gather(2, written.unsqueeze(-1)).squeeze(-1) * (written != 0)).sum(dim=1)
        scores = sums / (written != 0).sum(dim=1).double() ** 0.7
        torch.testing.assert_close(scores, search._finished_scores[0, :2], rtol=0, atol=1e-10)


def test_greedy_is_the_likeliest_token_of_the_whole_pass(model):
    ids = inputs(3, 21)
    written = model.generate(ids, **ENDS)
    for row in range(3):
        read = torch.zeros(1, 1, dtype=torch.int64)
        for token in written[row].tolist():
            following = model.loss.logits(model.decode(read, encoded_alone(model, ids[row : row + 1])))[:, -1:].argmax(
                -1
            )
            assert following.item() == token
            read = torch.cat((read, following), dim=1)
            if token == model.eos_id:
                break
        assert (written[row, read.shape[1] - 1 :] == model.pad_id).all()


@each_way
def test_a_batch_is_its_samples_one_by_one(model, way):
    """Also where padding is at the front, or between the tokens of others, and with other samples beside it."""
    lengths = (21, 1, 8, 13, 16)
    ids, numbers = inputs(5, 24), torch.tensor([3, 9, 4, 8, 2**40])
    mask = torch.arange(24) < torch.tensor(lengths).unsqueeze(1)
    mask[3] = mask[3].roll(5)
    written = model.generate(ids, input_mask=mask, sample_index=numbers, **ENDS, **WAYS[way])
    assert (written == model.eos_id).any() and (written[:, -1] != model.pad_id).any()
    each = written.unflatten(0, (5, -1))
    for row in range(5):
        alone = model.generate(
            ids[row][mask[row]].unsqueeze(0), sample_index=numbers[row : row + 1], **ENDS, **WAYS[way]
        )
        assert torch.equal(F.pad(alone, (0, each.shape[2] - alone.shape[1])), each[row])


def test_padding_between_tokens_is_not_seen(model):
    ids, mask = inputs(2, 24), torch.ones(2, 24, dtype=torch.bool)
    mask[0, 5:9] = False
    other = torch.where(mask, ids, 77)
    written = model.generate(ids, input_mask=mask, **ENDS)
    assert torch.equal(written, model.generate(other, input_mask=mask, **ENDS))
    assert not torch.equal(written, model.generate(ids, **ENDS))
    with torch.no_grad():
        states = model.encode(ids[:1], input_mask=mask[:1])[0]
        expected = model.loss.logits(model.decode(F.pad(written[:1], (1, 0)), states, input_mask=mask[:1]))
        assert torch.equal(expected[0, : written.shape[1]].argmax(-1)[:1], written[0, :1])


def test_an_input_of_70_000_tokens(build):
    model = lively(build(num_encoder_layers=1, num_decoder_layers=1).double())
    ids, targets = inputs(1, 70_001), inputs(1, 3, seed=2)
    with torch.no_grad():
        encoded = encode_inputs(model, ids, None, None)
        state = DecoderState(model.embedding, model.decoder, model.loss, encoded, rows_per_sample=1, num_slots=3)
        stepped = torch.stack([state.step(token) for token in targets.unbind(1)], dim=1)
        expected = model.loss.logits(model.decode(targets, encoded_alone(model, ids)))
    torch.testing.assert_close(stepped, expected, rtol=0, atol=1e-10)


def test_the_host_looks_only_now_and_then(model, monkeypatch):
    looks = []
    original = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: looks.append(1) or original(self))
    monkeypatch.setattr(torch.Tensor, "item", None)
    model.eos_id = 127
    with torch.no_grad():
        model.loss.weight[127] = -model.loss.weight[127]
    model.generate(inputs(2, 8), max_new_tokens=15, temperature=1.0, top_p=0.9, seed=0)
    before = len(looks)
    model.generate(inputs(2, 8), max_new_tokens=48, num_beams=2)
    assert before == 0 and len(looks) <= 2


def test_weights_mode_and_generators_are_left_alone(model):
    model.train()
    model.encoder.eval()
    state = torch.random.get_rng_state()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        written = model.generate(inputs(2, 9), **ENDS, **WAYS["draws"])
    assert torch.equal(written, model.eval().generate(inputs(2, 9), **ENDS, **WAYS["draws"]))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    torch.manual_seed(5)
    first, second = (model.generate(inputs(2, 9), max_new_tokens=8, temperature=1.0) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(first, model.generate(inputs(2, 9), max_new_tokens=8, temperature=1.0))
    assert not torch.equal(first, second)
    model.train()
    assert model.decoder.training


def test_a_text_is_a_prefix_of_the_longer_one(model):
    arguments = {"temperature": 1.0, "seed": 7, "num_return_sequences": 2}
    short, long = (model.generate(inputs(2, 9), max_new_tokens=steps, **arguments) for steps in (6, 12))
    assert torch.equal(short, long[:, :6])
    assert not torch.equal(long[0], long[1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens: 0; use 1 or more"),
        ({"max_new_tokens": 2.5}, TypeError, "max_new_tokens: 2.5"),
        ({"temperature": -1}, ValueError, "temperature: -1; use 0 or more"),
        ({"temperature": "hot"}, TypeError, "temperature: 'hot'"),
        ({"top_k": 5}, ValueError, "top_k: 5 with temperature 0; use a temperature above 0"),
        ({"top_k": 0, "temperature": 1}, ValueError, "top_k: 0; use 1 or more"),
        ({"top_p": 1.5, "temperature": 1}, ValueError, "top_p: 1.5; use a number above 0, at most 1"),
        ({"num_beams": 0}, ValueError, "num_beams: 0; use 1 or more"),
        ({"num_beams": 65}, ValueError, "num_beams: 65 of 128 ids; use 64 or fewer"),
        ({"num_beams": 2, "temperature": 1}, ValueError, "temperature: 1 with num_beams 2; use 0"),
        ({"num_beams": 2, "length_penalty": float("inf")}, ValueError, "length_penalty: inf; use a finite number"),
        ({"num_return_sequences": 2}, ValueError, "num_return_sequences: 2 of num_beams 1; use 1 or fewer"),
        ({"seed": "x"}, TypeError, "seed: 'x'"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, ValueError, "input_ids: no token"),
        ({"input_ids": torch.zeros(0, 8, dtype=torch.int64)}, ValueError, "input_ids: no sample"),
        ({"input_ids": torch.zeros(2, 8)}, ValueError, "input_ids: .* of torch.float32; use int64"),
        ({"input_ids": torch.full((2, 8), 128)}, ValueError, "input_ids: sample 0 has the id 128; use 0 to 127"),
        ({"input_mask": torch.arange(16).view(2, 8) > 7}, ValueError, "input_ids: sample 0 has no valid token"),
        ({"input_mask": torch.ones(2, 7, dtype=torch.bool)}, ValueError, "input_mask: .*; use bool"),
        ({"sample_index": torch.zeros(3, dtype=torch.int64)}, ValueError, "sample_index: "),
    ],
)
def test_wrong_arguments(build, arguments, error, message):
    with pytest.raises(error, match=message) as raised:
        build().generate(**({"input_ids": inputs(2, 8), "max_new_tokens": 3} | arguments))
    assert "\n" not in str(raised.value)
