"""Tokenizers: ids and back, special tokens, and the bytes that an id represents."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from colt5dist.data.tokenizer import ByteTokenizer, JsonTokenizer
from colt5dist.errors import ConfigError

SENTENCES = ["the cat sat on the mat", "the dog sat on the log", "a naïve café, ½ price", "</s> is text here"] * 5


def train(path: Path, kind: str, special_tokens: list[str]) -> Path:
    """Train a tiny tokenizer of a kind and save it."""
    if kind == "byte_level":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special_tokens, initial_alphabet=alphabet)
    elif kind == "metaspace":
        tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True))
        tokenizer.normalizer = normalizers.Prepend("▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        tokenizer.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never"), decoders.Fuse()]
        )
        special_tokens = special_tokens + [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special_tokens)
    else:
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special_tokens)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=40)
    tokenizer.save(str(path))
    return path


@given(st.text())
def test_bytes(text: str) -> None:
    """Every text is recovered, with one id per byte."""
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths[ids].sum() == len(ids) == len(text.encode())


def test_bytes_have_the_promised_ids() -> None:
    """Pad 0, end token 1, unknown 2, bytes from 3; sentinels and special tokens decode to nothing."""
    tokenizer = ByteTokenizer()
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.vocab_size, tokenizer.dtype) == (0, 1, 259, np.dtype("<u2"))
    assert tokenizer.encode("A\xff").tolist() == [3 + 65, 3 + 0xC3, 3 + 0xBF]
    assert tokenizer.decode([0, 68, 1, 259, 300]) == "A"
    assert tokenizer.byte_lengths[:4].tolist() == [0, 0, 0, 1]


def test_byte_level_json(tmp_path: Path) -> None:
    """Ids and back, and bytes exact; the file's truncation and padding are not used; "</s>" in a text is text."""
    tokenizer = JsonTokenizer(train(tmp_path / "t.json", "byte_level", ["<pad>", "</s>"]))
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 300)
    for text in [*SENTENCES[:4], "unseen \U0001f600 \n\n  text", "<pad>"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
        assert not {tokenizer.pad_id, tokenizer.eos_id} & set(ids.tolist())
    assert tokenizer.byte_lengths[:2].tolist() == [0, 0]
    assert tokenizer.decode([1, *tokenizer.encode("cat"), 0, 5000]) == "cat"


def test_metaspace_json(tmp_path: Path) -> None:
    """A space in a piece is one byte, and so is a piece <0x0A>. The space that is put before a text counts as well."""
    tokenizer = JsonTokenizer(train(tmp_path / "t.json", "metaspace", ["<pad>", "<eos>"]))
    for text in SENTENCES[:3]:
        assert tokenizer.byte_lengths[tokenizer.encode(text)].sum() == len(text.encode()) + 1
    newline = tokenizer._backend.token_to_id("<0x0A>")
    assert tokenizer.encode("\n").tolist()[-1] == newline


def test_wordpiece_json(tmp_path: Path) -> None:
    """A piece that begins a word includes the space before it; one that continues a word does not."""
    tokenizer = JsonTokenizer(train(tmp_path / "t.json", "wordpiece", ["[UNK]", "[PAD]", "[SEP]"]))
    assert (tokenizer.pad_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.byte_lengths[tokenizer.encode("the cat sat")].sum() == len("the cat sat") + 1


def test_special_tokens_that_a_file_lacks_are_reserved(tmp_path: Path) -> None:
    """A file with one end token for all gets a pad id of its own, above its vocabulary."""
    tokenizer = JsonTokenizer(train(tmp_path / "t.json", "byte_level", ["<|endoftext|>"]))
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (0, 300, 301)
    assert len(tokenizer.byte_lengths) == 301 and tokenizer.byte_lengths[300] == 0
    tokenizer = JsonTokenizer(train(tmp_path / "u.json", "byte_level", []))
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (300, 301, 302)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xff", b'{"model": {"type": "BPE"}}'])
def test_what_is_no_tokenizer_is_named(tmp_path: Path, content: bytes | None) -> None:
    """One line that names the file."""
    path = tmp_path / "t.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"t\.json: ") as error:
        JsonTokenizer(path)
    assert "\n" not in str(error.value)
