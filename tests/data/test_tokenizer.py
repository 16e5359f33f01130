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

SPECIAL = ["<pad>", "</s>", "<unk>", "<extra_id_0>", "[S2S]"]
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


def with_special_tokens(kind: str, path: Path, special: bool) -> JsonTokenizer:
    """A file of a kind whose model itself holds the names of the special tokens."""
    characters = "abdeiknprstux_/<>[]S20"
    pieces = [*SPECIAL, *characters, "▁", *("##" + character for character in characters), "Ġ", "a▁b"]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    if kind == "unigram":
        scores = [(piece, 0.0 if piece in SPECIAL else -3.0) for piece in vocabulary]
        tokenizer = tokenizers.Tokenizer(models.Unigram(scores, 2))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    elif kind == "wordpiece":
        tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    elif kind == "wordlevel":
        tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        # merges that make "</s>" out of its characters, and a word that is looked up as a whole
        made = {**vocabulary, "</": len(vocabulary), "</s": len(vocabulary) + 1, "</s>a": len(vocabulary) + 2}
        merges = [("<", "/"), ("</", "s"), ("</s", ">"), ("</s>", "a")]
        settings = {"ignore_merges": kind == "ignore_merges", "unk_token": "<unk>"}
        tokenizer = tokenizers.Tokenizer(models.BPE(made, merges, **settings))  # type: ignore[arg-type]
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        if kind == "ignore_merges":
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
            )
    if special:
        tokenizer.add_special_tokens(SPECIAL)
    else:
        tokenizer.add_tokens(SPECIAL)
    tokenizer.save(str(path))
    return JsonTokenizer(path)


@pytest.mark.parametrize("special", [True, False], ids=["special", "added"])
@pytest.mark.parametrize("kind", ["byte_level", "ignore_merges", "unigram", "wordpiece", "wordlevel"])
def test_names_of_special_tokens_in_a_text_are_text(
    tmp_path_factory: pytest.TempPathFactory, kind: str, special: bool
) -> None:
    """Of the special ids, only "unknown" may come out, and only where a word is unknown; other text keeps its ids."""
    tokenizer = with_special_tokens(kind, tmp_path_factory.mktemp("names") / "t.json", special)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)

    @given(st.lists(st.sampled_from([*SPECIAL, " ", "a", "b", "<", "ta", "</", "s>"]), max_size=12))
    def check(parts: list[str]) -> None:
        text = "".join(parts)
        ids = tokenizer.encode(text).tolist()
        assert not {0, 1, 3, 4} & set(ids)
        if kind != "wordlevel":  # its words are whole
            assert 2 not in ids
            spelt = "".join(tokenizer._pieces[token].removeprefix("##") for token in ids)
            assert spelt.replace("▁", "").replace("Ġ", "") == text.replace(" ", "")

    check()
    assert tokenizer.decode([0, 1, 2, 3, 4]) == ""
    assert tokenizer.byte_lengths[:5].tolist() == [0] * 5


def test_dropout_is_switched_off(tmp_path: Path) -> None:
    """A text has the same ids each time, and it is said that the file wanted otherwise."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {piece: token for token, piece in enumerate([*sorted(alphabet), "ab", "abab"])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("a", "b"), ("ab", "ab")], dropout=0.5))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.save(str(tmp_path / "t.json"))
    tokenizer = JsonTokenizer(tmp_path / "t.json")
    assert {tuple(tokenizer.encode("abab" * 4).tolist()) for _ in range(20)} == {(257,) * 4}
    assert tokenizer.notes == (f"{tmp_path}/t.json: its dropout of 0.5 is not used: a text always has the same ids",)
