"""An exported folder in transformers: the same logits, ids and tokens as in colt5dist; skipped where it is missing."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stored_runs import write_run
from torch import Tensor

import colt5dist
from colt5dist import CausalCoLT5, CoLT5
from colt5dist.data import ModelTokenizer
from colt5dist.pretrained.export import export

transformers = pytest.importorskip("transformers")

CAUSAL = (
    "model.d_model=32 model.num_decoder_layers=2 model.head_dim=8 model.num_light_heads=1 model.num_heavy_heads=3 "
    "model.light_ff_dim=32 model.heavy_ff_dim=64 model.ff_dim=32 model.window_size=32 model.memory_size=32"
).split()
TEXTS = ["a longer text, with <extra_id_0> in it: é", "short <extra_id_1>", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported encoder-decoder with T5's relative positions, whose buffers are not stored."""
    run_dir = tmp_path_factory.mktemp("huggingface") / "run"
    write_run(run_dir, "model.light_positions=relative", "seed=3")
    return export(run_dir, run_dir.with_name("exported")).folder


@pytest.fixture(scope="module")
def causal_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported decoder-only model."""
    run_dir = tmp_path_factory.mktemp("causal") / "run"
    write_run(run_dir, *CAUSAL, config="causal_tiny")
    return export(run_dir, run_dir.with_name("exported")).folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> tuple[CoLT5, ModelTokenizer]:
    """The model in colt5dist."""
    model, tokenizer = colt5dist.load(folder)
    assert isinstance(model, CoLT5)
    return model, tokenizer


@pytest.fixture(scope="module")
def theirs(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer in transformers."""
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)
    return model, transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="module")
def causal(causal_folder: Path) -> tuple[CausalCoLT5, Any, Any]:
    """The decoder-only model in colt5dist and in transformers, and its tokenizer there."""
    model, _ = colt5dist.load(causal_folder)
    assert isinstance(model, CausalCoLT5)
    hf = transformers.AutoModelForCausalLM.from_pretrained(causal_folder, trust_remote_code=True)
    return model, hf, transformers.AutoTokenizer.from_pretrained(causal_folder, trust_remote_code=True)


def own_logits(model: CoLT5, ids: Tensor, mask: Tensor, decoder_ids: Tensor) -> Tensor:
    """Logits of a padded batch by colt5dist alone."""
    missing = -ids.shape[1] % model.config.input_multiple
    ids, mask = F.pad(ids, (0, missing)), F.pad(mask.bool(), (0, missing))
    with torch.no_grad():
        states, _ = model.encode(ids, input_mask=mask)
        return model.loss.logits(model.decode(decoder_ids, states, input_mask=mask))


def test_ids_are_ours(ours: tuple[CoLT5, ModelTokenizer], theirs: tuple[Any, Any], folder: Path) -> None:
    for tokenizer in (theirs[1], transformers.PreTrainedTokenizerFast.from_pretrained(folder)):
        for text in TEXTS:
            ids = tokenizer(text).input_ids
            assert ids == [*ours[1].encode(text).tolist(), ours[1].eos_id]
            assert tokenizer.decode(ids[:-1]) == text
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (ours[1].pad_id, ours[1].eos_id)
        assert "token_type_ids" not in tokenizer(TEXTS)


def test_logits_are_ours_to_the_bit(ours: tuple[CoLT5, ModelTokenizer], theirs: tuple[Any, Any]) -> None:
    batch = theirs[1](TEXTS, padding=True, return_tensors="pt")
    decoder_ids = torch.randint(0, 259, (len(TEXTS), 7))
    with torch.no_grad():
        found = theirs[0](**batch, decoder_input_ids=decoder_ids).logits
    assert torch.equal(found, own_logits(ours[0], batch["input_ids"], batch["attention_mask"], decoder_ids))


def test_labels_of_minus_100_do_not_count(ours: tuple[CoLT5, ModelTokenizer], theirs: tuple[Any, Any]) -> None:
    batch = theirs[1](TEXTS, padding=True, return_tensors="pt")
    labels = torch.randint(3, 259, (len(TEXTS), 7))
    labels[0, 4:] = -100
    labels[2, 1:] = -100
    output = theirs[0](**batch, labels=labels)
    decoder_ids = F.pad(labels[:, :-1], (1, 0)).clamp(min=0)
    logits = own_logits(ours[0], batch["input_ids"], batch["attention_mask"], decoder_ids)
    assert torch.equal(output.logits, logits)
    losses = F.cross_entropy(logits.transpose(1, 2), labels.clamp(min=0), reduction="none")
    assert output.loss.item() == pytest.approx(losses[labels != -100].mean().item(), rel=1e-6)
    output.loss.backward()
    assert theirs[0].embedding.weight.grad is not None
    theirs[0].zero_grad()


@pytest.mark.parametrize("num_beams", [1, 4], ids=["greedy", "beams"])
def test_generation_is_ours(ours: tuple[CoLT5, ModelTokenizer], theirs: tuple[Any, Any], num_beams: int) -> None:
    """Both by colt5dist, which the exported model calls, and by transformers' own loop on the exported `forward`."""
    batch = theirs[1](TEXTS, padding=True, return_tensors="pt")
    mask = batch["attention_mask"].bool()
    expected = ours[0].generate(batch["input_ids"], input_mask=mask, max_new_tokens=6, num_beams=num_beams)
    found = theirs[0].generate(**batch, max_new_tokens=6, num_beams=num_beams)
    assert torch.equal(found, F.pad(expected, (1, 0)))
    # an argument that colt5dist has not: a penalty of 1 changes nothing
    looped = theirs[0].generate(**batch, max_new_tokens=6, num_beams=num_beams, repetition_penalty=1.0)
    assert torch.equal(looped, found)
    alone = theirs[1](TEXTS[2:], return_tensors="pt")
    single = theirs[0].generate(**alone, max_new_tokens=6, num_beams=num_beams)
    assert torch.equal(single[0], found[2, : single.shape[1]])


def test_another_end_token_is_obeyed(theirs: tuple[Any, Any]) -> None:
    batch = theirs[1](TEXTS[:1], return_tensors="pt")
    written = theirs[0].generate(**batch, max_new_tokens=6)[0].tolist()
    found = theirs[0].generate(**batch, max_new_tokens=6, eos_token_id=written[1])[0].tolist()
    assert len(written) > 2 and found == written[:2]


def test_draws_and_lengths(ours: tuple[CoLT5, ModelTokenizer], theirs: tuple[Any, Any]) -> None:
    batch = theirs[1](TEXTS[:1], return_tensors="pt")
    torch.manual_seed(0)
    drawn = theirs[0].generate(**batch, max_length=9, do_sample=True, temperature=0.8, num_return_sequences=5)
    assert drawn.shape == (5, 9) and len({tuple(row.tolist()) for row in drawn}) > 1
    torch.manual_seed(0)
    again = ours[0].generate(batch["input_ids"], max_new_tokens=8, temperature=0.8, top_k=50, num_return_sequences=5)
    assert torch.equal(drawn[:, 1:], again)


def test_saved_again_the_bytes_are_the_same(folder: Path, theirs: tuple[Any, Any], tmp_path: Path) -> None:
    theirs[0].save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "modeling_colt5dist.py"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    differing = set((tmp_path / "again" / "config.json").read_text().splitlines()) ^ set(
        (folder / "config.json").read_text().splitlines()
    )
    assert [line for line in differing if "transformers_version" not in line] == []
    model = CoLT5.from_pretrained(tmp_path / "again")
    expected = CoLT5.from_pretrained(folder)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())


def test_in_bf16(folder: Path) -> None:
    kind = transformers.AutoModelForSeq2SeqLM
    model = kind.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    expected = CoLT5.from_pretrained(folder, dtype=torch.bfloat16)
    ids = torch.randint(3, 259, (1, 24))
    with torch.no_grad():
        found = model(input_ids=ids, decoder_input_ids=ids[:, :5]).logits
    assert torch.equal(found, own_logits(expected, ids, torch.ones_like(ids), ids[:, :5]))


def test_decoder_only(causal: tuple[CausalCoLT5, Any, Any]) -> None:
    model, hf, tokenizer = causal
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert batch["input_ids"][0, 0] == 0 and batch["attention_mask"][2].tolist()[-2:] == [1, 1]
    with torch.no_grad():
        found = hf(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))
    losses = []
    for row, mask in enumerate(batch["attention_mask"].bool()):
        ids = batch["input_ids"][row, mask].unsqueeze(0)
        with torch.no_grad():
            logits = model.loss.logits(model.decode(ids)[0])
        assert torch.allclose(found.logits[row, mask], logits[0], atol=1e-5)
        losses += F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none").tolist()
    assert found.loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    whole = batch["input_ids"][:1]
    with torch.no_grad():
        assert torch.equal(hf(input_ids=whole).logits, model.loss.logits(model.decode(whole)[0]))


@pytest.mark.parametrize("num_beams", [1, 4], ids=["greedy", "beams"])
def test_decoder_only_generation_is_ours(causal: tuple[CausalCoLT5, Any, Any], num_beams: int) -> None:
    model, hf, tokenizer = causal
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    mask = batch["attention_mask"].bool()
    expected = model.generate(batch["input_ids"], input_mask=mask, max_new_tokens=3, num_beams=num_beams)
    found = hf.generate(**batch, max_new_tokens=3, num_beams=num_beams)
    assert torch.equal(found, torch.cat((batch["input_ids"], expected), dim=1))
    looped = hf.generate(**batch, max_new_tokens=3, num_beams=num_beams, repetition_penalty=1.0)
    assert torch.equal(looped, found)
