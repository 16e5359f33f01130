"""tokenizer.json of an exported folder gives the ids that the model was trained on."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from colt5dist.data import ModelTokenizer
from colt5dist.data.tokenizer import ByteTokenizer, JsonTokenizer
from colt5dist.errors import ConfigError
from colt5dist.pretrained.huggingface_tokenizer import huggingface_json

BYTES = ModelTokenizer(ByteTokenizer(), num_modes=3, num_sentinels=4)
BYTE_BACKEND = Backend.from_str(huggingface_json(BYTES, causal=False))
PIECES = st.one_of(st.text(st.characters(codec="utf-8"), max_size=20), st.sampled_from(list(BYTES.names.values())))


@given(st.lists(PIECES, max_size=5))
def test_bytes(pieces: list[str]) -> None:
    text = "".join(pieces)
    if any(name in text for name in ("<pad>", "</s>", "<unk>")):
        return
    ids = BYTES.encode(text).tolist()
    assert BYTE_BACKEND.encode(text).ids == [*ids, BYTES.eos_id]
    assert BYTE_BACKEND.decode(ids, skip_special_tokens=False) == text == BYTES.decode(ids)


def trained(folder: Path, *specials: str) -> JsonTokenizer:
    """A byte-level tokenizer of a few merges."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the cat and the dog and the bird"] * 3, trainer)
    backend.enable_truncation(4)
    backend.save(str(folder / "own.json"))
    return JsonTokenizer(folder / "own.json")


@pytest.mark.parametrize("specials", [("<pad>", "</s>"), ("[PAD]", "<|endoftext|>", "<extra_id_0>"), ()], ids=str)
def test_a_tokenizer_of_their_own(tmp_path: Path, specials: tuple[str, ...]) -> None:
    tokenizer = ModelTokenizer(trained(tmp_path, *specials), num_modes=0, num_sentinels=3)
    text = f"the cat {tokenizer.sentinel_name(2)} and the dog"
    ids = tokenizer.encode(text).tolist()
    backend = Backend.from_str(huggingface_json(tokenizer, causal=False))
    assert backend.encode(text).ids == [*ids, tokenizer.eos_id] and len(ids) > 4
    assert backend.decode(ids, skip_special_tokens=False) == text
    causal = Backend.from_str(huggingface_json(tokenizer, causal=True))
    assert causal.encode(text).ids == [tokenizer.start_id, *ids]


def test_ids_with_gaps_are_refused(tmp_path: Path) -> None:
    path = trained(tmp_path, "<pad>", "</s>")
    description = json.loads(path.content)
    last = max(description["model"]["vocab"], key=description["model"]["vocab"].get)
    description["model"]["vocab"][last] += 7
    (tmp_path / "gaps.json").write_text(json.dumps(description))
    tokenizer = ModelTokenizer(JsonTokenizer(tmp_path / "gaps.json"), num_modes=0, num_sentinels=3)
    with pytest.raises(ConfigError, match="as the ids of its vocabulary have gaps"):
        huggingface_json(tokenizer, causal=False)
