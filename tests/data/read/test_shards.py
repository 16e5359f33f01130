"""Shards on disk: what is written is read back by us and by webdataset, and damage is named."""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import webdataset
from tokenizers import models, trainers

from colt5dist.data.order.plan import Plan
from colt5dist.data.read.shards import ShardSet, open_shards
from colt5dist.data.read.token_reader import DamagedShardError, TokenReader
from colt5dist.data.tar_members import member_key, tar_header, tar_member
from colt5dist.data.tokenizer import JsonTokenizer
from colt5dist.errors import ConfigError


def read_documents(shards: ShardSet) -> list[str]:
    """The text of every document of a set."""
    reader = TokenReader(shards, cache_bytes=1 << 20)
    ends = shards.index.document_ends.tolist()
    return [shards.tokenizer.decode(reader.read(begin, end)) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def test_documents_come_back(shards: ShardSet, documents: list[str]) -> None:
    """Each document is complete in one of the two sets."""
    training, held_out = read_documents(shards), read_documents(shards.validation)
    assert len(shards.manifest.shards) > 1
    assert sorted(training + held_out) == sorted(documents)
    assert 5 <= len(held_out) <= 30
    assert shards.num_tokens == sum(len(document.encode()) for document in training)


def test_training_never_sees_a_held_out_document(shards: ShardSet, documents: list[str]) -> None:
    """No text of a held-out document can be sampled, copies of it included."""
    training = set(read_documents(shards))
    assert not training & set(read_documents(shards.validation))


def test_copies_land_on_one_side(make_shards: Callable[..., ShardSet]) -> None:
    """All copies of a text are held out, or none is; also of the text that is held out because at least one must be."""
    for fraction in (1e-9, 0.3):
        texts = [f"text number {number}" for number in range(40)] * 2
        shards = make_shards(texts, validation_fraction=fraction)
        held_out = read_documents(shards.validation)
        assert held_out and not set(held_out) & set(read_documents(shards))
        assert len(held_out) == 2 * len(set(held_out))


def test_the_split_does_not_depend_on_the_order(make_shards: Callable[..., ShardSet], documents: list[str]) -> None:
    """The same documents are held out in any order of the documents, also when only the smallest hash decides."""
    for fraction in (1e-9, 0.05):
        forward = make_shards(documents[:50], validation_fraction=fraction)
        backward = make_shards(documents[49::-1], validation_fraction=fraction)
        assert sorted(read_documents(forward.validation)) == sorted(read_documents(backward.validation))
        assert len(read_documents(forward.validation)) >= 1


def test_one_document_is_cut(make_shards: Callable[..., ShardSet]) -> None:
    """The end of a single document is held out."""
    text = "".join(chr(65 + number % 26) for number in range(30_000))
    shards = make_shards([text])
    (training,), (held_out,) = read_documents(shards), read_documents(shards.validation)
    assert training + held_out == text and len(held_out) == 4096
    with pytest.raises(ConfigError, match="single token"):
        make_shards(["x"])


def test_training_keeps_a_document(make_shards: Callable[..., ShardSet]) -> None:
    """Of two documents, each set gets one, whatever their hashes are."""
    for number in range(8):
        shards = make_shards([f"a {number}", f"b {number}"], validation_fraction=0.5)
        assert shards.num_documents == shards.validation.num_documents == 1


def test_webdataset_reads_the_shards(shards: ShardSet) -> None:
    """The shards are plain webdataset: unique keys without dots, one field, all tokens in order."""
    urls = [str(shards.folder / entry.file) for entry in shards.manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == [
        f"{number:010d}" for number in range(len(shards.index.members))
    ]
    tokens = []
    for sample in samples:
        num_records = int(np.frombuffer(sample["tokens"], dtype="<u4", count=1)[0])
        lengths = np.frombuffer(sample["tokens"], dtype="<u4", offset=4, count=num_records)
        tokens.append(np.frombuffer(sample["tokens"], dtype="<u2", offset=4 + 4 * num_records))
        assert lengths.sum() == len(tokens[-1])
    everything = TokenReader(shards, cache_bytes=1).read(0, shards.num_tokens)
    assert np.array_equal(np.concatenate(tokens), everything)


def test_wide_ids(make_shards: Callable[..., ShardSet], tmp_path: Path) -> None:
    """A vocabulary of more than 65,536 ids is stored in 32 bits; the tokenizer's copy is used to read."""
    words = [f"w{number}" for number in range(66_000)]
    backend = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.train_from_iterator(words, trainers.WordLevelTrainer(vocab_size=70_000, special_tokens=["<unk>", "</s>"]))
    backend.save(str(tmp_path / "words.json"))
    texts = [" ".join(words[start : start + 11_000]) for start in range(0, 66_000, 11_000)]
    shards = make_shards(texts, tokenizer=JsonTokenizer(tmp_path / "words.json"))
    (tmp_path / "words.json").unlink()
    assert shards.dtype == np.dtype("<u4") and shards.manifest.dtype == "uint32"
    assert sorted(read_documents(shards) + read_documents(shards.validation)) == sorted(texts)


@pytest.fixture
def copy(shards: ShardSet, tmp_path: Path) -> Path:
    """A copy of the shard set that may be damaged."""
    return Path(shutil.copytree(shards.folder, tmp_path / "copy"))


def flip(path: Path, place: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def edit(path: Path, **changes: object) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda d: shutil.rmtree(d), r"manifest\.json: is missing"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), r"manifest\.json: is missing"),
    "empty manifest": (lambda d: (d / "manifest.json").write_bytes(b""), r"manifest\.json: is damaged"),
    "binary manifest": (lambda d: (d / "manifest.json").write_bytes(b"\xff\x00"), r"manifest\.json: is damaged"),
    "foreign manifest": (lambda d: (d / "manifest.json").write_text('{"shards": []}'), "was not written by"),
    "list as manifest": (lambda d: (d / "manifest.json").write_text("[]"), "was not written by"),
    "later version": (lambda d: edit(d / "manifest.json", version=2), "has format version 2, this is version 1"),
    "edited manifest": (lambda d: edit(d / "manifest.json", tokens=5), "was edited, its checksum differs"),
    "manifest without an entry": (lambda d: edit(d / "manifest.json", index=None), "is damaged or was edited"),
    "manifest is a folder": (
        lambda d: ((d / "manifest.json").unlink(), (d / "manifest.json").mkdir()),
        r"manifest\.json: cannot be read",
    ),
    "no shard": (lambda d: (d / "000001.tar").unlink(), r"000001\.tar: cannot be read"),
    "truncated shard": (
        lambda d: (d / "000000.tar").write_bytes((d / "000000.tar").read_bytes()[:-512]),
        r"0\.tar: has",
    ),
    "longer shard": (lambda d: (d / "000000.tar").write_bytes((d / "000000.tar").read_bytes() + b"0"), r"0\.tar: has"),
    "no index": (lambda d: shutil.rmtree(d / "index"), r"index/members\.bin: cannot be read"),
    "truncated index": (lambda d: (d / "index/documents.bin").write_bytes(b"12345678"), r"documents\.bin: has 8 bytes"),
    "damaged index": (lambda d: flip(d / "index/checksums.bin", 9), r"checksums\.bin: is damaged"),
    "index of the other set": (
        lambda d: shutil.copytree(d / "validation/index", d / "index", dirs_exist_ok=True),
        r"index/members\.bin: has",
    ),
    "no validation": (lambda d: shutil.rmtree(d / "validation"), r"validation/manifest\.json: is missing"),
    "training set as validation": (
        lambda d: shutil.copy(d / "manifest.json", d / "validation/manifest.json"),
        "validation: belongs to other shards",
    ),
    "damaged validation": (lambda d: flip(d / "validation/index/members.bin", 0), r"members\.bin: is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_found_at_the_start(copy: Path, damage: str) -> None:
    """Each error is one line that names the file."""
    inflict, message = DAMAGE[damage]
    inflict(copy)
    with pytest.raises(ConfigError, match=message) as error:
        open_shards(copy)
    assert "\n" not in str(error.value) and str(copy) in str(error.value)


def test_a_held_out_set_is_not_trained_on(shards: ShardSet) -> None:
    """The validation folder given as data.shards is an error."""
    with pytest.raises(ConfigError, match="held-out documents; give its parent folder"):
        open_shards(shards.folder / "validation")


def test_a_foreign_tokenizer_is_named(make_shards: Callable[..., ShardSet], tmp_path: Path) -> None:
    """The copy of tokenizer.json must be the one that made the shards."""
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    backend.save(str(tmp_path / "t.json"))
    folder = make_shards(["a", "b", "a b a"], tokenizer=JsonTokenizer(tmp_path / "t.json")).folder
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text().replace('"b": 1', '"c": 1'))
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text().replace('"b":1', '"c":1'))
    with pytest.raises(ConfigError, match="its tokenizer is not the one"):
        open_shards(folder)


def overwrite(path: Path, place: int, content: bytes) -> None:
    """Overwrite a part of a file."""
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(content)


# in shard 0: the first member's header is bytes 0..511, its tokens follow
READ_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit in a token": (lambda d: flip(d / "000000.tar", 40_000), "at byte 0: record .* is damaged"),
    "bit in the record lengths": (lambda d: flip(d / "000000.tar", 517), "at byte 0: has other record lengths"),
    "bit in the header": (lambda d: flip(d / "000000.tar", 3), "at byte 0: is no"),
    "zeros over the header": (
        lambda d: overwrite(d / "000000.tar", 0, bytes(1024)),
        "at byte 0: is not member 0000000000",
    ),
    "zeros over tokens": (lambda d: overwrite(d / "000000.tar", 9000, bytes(1024)), "at byte 0: record .* is damaged"),
    "shards of equal size swapped": (
        lambda d: (d / "000001.tar").write_bytes(
            (d / "000000.tar")
            .read_bytes()[: (d / "000001.tar").stat().st_size]
            .ljust((d / "000001.tar").stat().st_size, b"\0")
        ),
        r"000001\.tar: at byte 0: ",
    ),
    "file gone later": (lambda d: (d / "000000.tar").unlink(), r"000000\.tar: at byte 0: cannot be read"),
    "file cut later": (lambda d: (d / "000000.tar").write_bytes(b"x" * 700), r"000000\.tar: at byte 0: "),
}


@pytest.mark.parametrize("damage", READ_DAMAGE)
def test_damage_found_when_read(copy: Path, damage: str) -> None:
    """No damaged token is returned; the error names the shard and the place."""
    shards = open_shards(copy)
    inflict, message = READ_DAMAGE[damage]
    inflict(copy)
    with pytest.raises(DamagedShardError, match=message) as error:
        TokenReader(shards, cache_bytes=1 << 20).read(0, shards.num_tokens)
    assert "\n" not in str(error.value)


def test_every_member_is_checked(copy: Path) -> None:
    """A flipped bit in any stored token is found."""
    shards = open_shards(copy)
    rng = np.random.default_rng(0)
    for member in rng.integers(0, len(shards.index.members), 10).tolist():
        entry = shards.index.members[member]
        path = copy / shards.manifest.shards[int(entry["shard"])].file
        records = len(shards.index.record_lengths(member))
        first = 512 + 4 + 4 * records
        length = 2 * int(shards.index.record_lengths(member).sum())
        place = int(entry["offset"]) + first + int(rng.integers(0, length))
        flip(path, place)
        with pytest.raises(DamagedShardError):
            TokenReader(shards, cache_bytes=1 << 20).read(0, shards.num_tokens)
        flip(path, place)
    assert len(TokenReader(shards, cache_bytes=1).read(0, shards.num_tokens)) == shards.num_tokens


@pytest.mark.parametrize("size", [0, 1, 512, 262_148, 8**7])
def test_the_known_header_is_webdatasets(size: int) -> None:
    """The header that members are compared with is the one that webdataset writes."""
    for member in (0, 7, 123_456, 9_999_999_999):
        assert tar_header(member, size) == tar_member(member_key(member), bytes(size))[:512]


def test_a_header_of_another_writer_is_parsed(shards: ShardSet, copy: Path) -> None:
    """webdataset's parser and the comparison of headers find the same tokens."""
    for path in copy.glob("*.tar"):
        with tarfile.open(path) as tar:
            offsets = [member.offset for member in tar]
        content = bytearray(path.read_bytes())
        for offset in offsets:
            header = content[offset : offset + 512]
            header[136:147] = b"00000000777"  # the time of the change
            header[148:156] = b" " * 8
            header[148:155] = b"%06o\0" % sum(header)
            content[offset : offset + 512] = header
        path.write_bytes(content)
    changed = TokenReader(open_shards(copy), cache_bytes=1)
    expected = TokenReader(shards, cache_bytes=1).read(0, shards.num_tokens)
    assert np.array_equal(changed.read(0, shards.num_tokens), expected)


def test_pieces_are_joined_alike(shards: ShardSet) -> None:
    """One by one and all at once give the same text."""
    reader = TokenReader(shards, cache_bytes=1 << 24)
    plan = Plan(shards.index.document_ends, [900, 6000], seed=0)
    for number in range(60):
        chunk = plan.sample(number).chunk
        assert np.array_equal(reader._join_few(chunk), reader._join_many(chunk))


def test_the_cache_is_bounded(shards: ShardSet) -> None:
    """Any access pattern keeps the memory near the limit."""
    reader = TokenReader(shards, cache_bytes=1 << 19)
    plan = Plan(shards.index.document_ends, [500], seed=0)
    for number in range(300):
        reader.read_chunk(plan.sample(number).chunk)
        assert sum(member.tokens.nbytes for member in reader._members.values()) <= 1 << 19
