"""A long text in windows has the ids of the whole text."""

import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from colt5dist.data import long_texts
from colt5dist.data.long_texts import encode_long
from colt5dist.data.tokenizer import ByteTokenizer, JsonTokenizer

WORDS = ["the", "cat", "sat", "naïve", "日本語", "\U0001f600", "\n\n", "a-b", "x" * 40, "e\u0301", "  ", "123"]


def words(seed: int, count: int) -> str:
    """Random text."""
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def trained(kind: str, path: Path) -> JsonTokenizer:
    """A tiny tokenizer of a kind."""
    special = ["<pad>", "</s>", "<unk>"]
    trainer: trainers.Trainer
    if kind == "byte_level":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    elif kind == "unigram":
        backend = Tokenizer(models.Unigram())
        backend.normalizer = normalizers.NFKC()
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>")
    else:
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=80, special_tokens=special)
    backend.train_from_iterator([words(0, 2000)], trainer)
    backend.save(str(path))
    return JsonTokenizer(path)


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "WINDOW_BYTES", 4096)
    monkeypatch.setattr(long_texts, "OVERLAP_BYTES", 512)


@pytest.mark.parametrize("kind", ["byte_level", "unigram", "wordpiece"])
def test_windows_give_the_ids_of_the_whole(tmp_path: Path, kind: str) -> None:
    """For each kind of tokenizer, also where a prefix is put before a text; and the progress moves."""
    tokenizer = trained(kind, tmp_path / "t.json")
    for seed in range(3):
        text = words(seed + 1, 8000)
        shares: list[float] = []
        ids = encode_long(tokenizer, text.encode(), shares.append)
        assert ids.tolist() == tokenizer.encode(text).tolist() and ids.dtype == tokenizer.dtype
        assert len(shares) > 9 and shares == sorted(shares) and shares[-1] == 1


def test_bytes_are_the_same_in_windows() -> None:
    text = words(0, 5000)
    assert encode_long(ByteTokenizer(), text.encode()).tolist() == ByteTokenizer().encode(text).tolist()


@pytest.mark.parametrize("text", ["x" * 20_000, " " * 20_000, "日" * 9000, "x" * 4000 + " y" * 4000 + "\n" * 3000])
def test_text_without_boundaries_is_whole(tmp_path: Path, text: str) -> None:
    """Where windows have no boundary in common, no character is lost or doubled."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces, merges = [*alphabet, "<pad>", "</s>"], []
    for length in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):  # tokens of up to 2048 characters
        pieces.append("x" * 2 * length)
        merges.append(("x" * length, "x" * length))
    backend.model = models.BPE({piece: token for token, piece in enumerate(pieces)}, merges)
    backend.save(str(tmp_path / "t.json"))
    tokenizer = JsonTokenizer(tmp_path / "t.json")
    assert tokenizer.decode(encode_long(tokenizer, text.encode())) == text
