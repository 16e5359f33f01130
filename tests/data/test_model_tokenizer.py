"""The tokenizer of a trained model: its ids, the names of sentinels in texts, and its files."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from colt5dist.data import DataConfig, ModelTokenizer, model_tokenizer
from colt5dist.data.tokenizer import ByteTokenizer, JsonTokenizer
from colt5dist.errors import ConfigError

BYTES = ModelTokenizer(ByteTokenizer(), num_modes=3, num_sentinels=12)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=30)


def word_tokenizer(folder: Path, *words: str) -> JsonTokenizer:
    """A tokenizer.json whose vocabulary is these words."""
    backend = Backend(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.Fuse()
    backend.save(str(folder / "words.json"))
    return JsonTokenizer(folder / "words.json")


@given(st.lists(st.tuples(TEXTS, st.integers(0, 11)), max_size=4), TEXTS)
def test_texts_with_sentinels_survive(parts: list[tuple[str, int]], last: str) -> None:
    text = "".join(f"{words}{BYTES.sentinel_name(number)}" for words, number in parts) + last
    ids = BYTES.encode(text)
    assert ids.ndim == 1 and ids.dtype == np.int64 and BYTES.decode(ids) == text
    assert [i - BYTES.first_sentinel for i in ids.tolist() if i >= BYTES.first_sentinel] == [n for _, n in parts]


def test_ids_are_those_of_training() -> None:
    assert (BYTES.pad_id, BYTES.start_id, BYTES.eos_id, BYTES.first_sentinel, BYTES.vocab_size) == (0, 0, 1, 262, 274)
    assert BYTES.encode("<mode_S>a</s><extra_id_0>").tolist() == [260, 100, *(b + 3 for b in b"</s>"), 262]
    assert BYTES.decode([0, 100, 1, 263, 0]) == "a<extra_id_1>"
    assert BYTES.names[261] == "<mode_X>" and len(BYTES.names) == 15
    of_colt5 = model_tokenizer(ByteTokenizer(), DataConfig(input_length=256, target_length=64))
    assert of_colt5.first_sentinel == 259 and of_colt5.num_modes == 0 and of_colt5.num_sentinels == 14
    assert model_tokenizer(ByteTokenizer(), DataConfig(mixture="ul2", num_sentinels=500)).vocab_size == 259 + 3 + 500


def test_names_that_a_text_token_has_are_not_taken(tmp_path: Path) -> None:
    tokenizer = ModelTokenizer(word_tokenizer(tmp_path, "?", "a", "<extra_id_0>"), num_modes=0, num_sentinels=2)
    assert tokenizer.sentinel_name(1) == "<sentinel_1>"
    assert tokenizer.encode("a<sentinel_1>a").tolist() == [1, tokenizer.first_sentinel + 1, 1]


def test_files(tmp_path: Path) -> None:
    tokenizer = ModelTokenizer(word_tokenizer(tmp_path, "?", "a", "b"), num_modes=3, num_sentinels=5)
    for written in (BYTES, tokenizer):
        folder = tmp_path / written.tokenizer.kind
        written.save(folder)
        read = ModelTokenizer.open(folder)
        assert read.tokenizer.fingerprint == written.tokenizer.fingerprint and read.names == written.names
        assert read.encode("b a<extra_id_4>").tolist() == written.encode("b a<extra_id_4>").tolist()


@pytest.mark.parametrize(
    "text, words",
    [("<extra_id_12>", "the model has 12 sentinels"), ("<extra_id_99999>", "leave fewer blanks in one text")],
)
def test_a_sentinel_that_the_model_has_not(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        BYTES.encode(text)


def test_a_mode_token_that_the_model_has_not() -> None:
    with pytest.raises(ConfigError, match="knows no such mode token"):
        ModelTokenizer(ByteTokenizer(), num_modes=0, num_sentinels=1).encode("<mode_R>a")


@pytest.mark.parametrize("change", [{"format_version": 2}, {"kind": "words"}, {"fingerprint": "0"}, {"num_modes": 0}])
def test_changed_files_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    BYTES.save(tmp_path)
    path = tmp_path / "vocabulary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError):
        ModelTokenizer.open(tmp_path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="is damaged"):
        ModelTokenizer.open(tmp_path)
    path.unlink()
    with pytest.raises(ConfigError, match="continue the run once"):
        ModelTokenizer.open(tmp_path)
