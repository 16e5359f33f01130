"""From files of pairs to shards: every format, both sides of the split, problems by file and line, the same bytes."""

import gzip
import hashlib
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zstandard

from colt5dist.data.inputs.pairs import PairKeys
from colt5dist.data.prepare.held_out_split import CorpusWriter
from colt5dist.data.prepare.pair_lengths import PairLengths
from colt5dist.data.prepare.prepare import Prepared, prepare
from colt5dist.data.prepare.report import info_lines, summary_lines, warning_lines
from colt5dist.data.prepare.settings import PrepareConfig
from colt5dist.data.prepare.tokenize_texts import Document, hash_text
from colt5dist.data.read.shards import ShardSet, open_shards
from colt5dist.data.read.token_reader import TokenReader
from colt5dist.data.verify import verify
from colt5dist.errors import ConfigError

PAIRS = [(f"Question {n}?\n\n{'word ' * (7 * n % 50)}{n}", f"answer {n}") for n in range(200)]
SEVERAL = [(PAIRS[n][0], f"another answer {n}") for n in range(0, 200, 3)]


def lines(pairs: list[tuple[str, str | None]]) -> bytes:
    """JSON lines with SCROLLS's fields."""
    records = [{"id": f"q{n}", "pid": f"q{n}_0", "input": i, "output": o} for n, (i, o) in enumerate(pairs)]
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def make(path: Path, output: Path, **changes: object) -> Prepared:
    """Prepare one file of pairs."""
    settings = {"input": [str(path)], "output": output, "pairs": True, "validation_fraction": 0.1, **changes}
    return prepare(PrepareConfig(**settings))  # type: ignore[arg-type]


def stored(part: ShardSet) -> list[tuple[str, str]]:
    """The pairs of a set, in order."""
    reader, begin, found = TokenReader(part, cache_bytes=1 << 20), 0, []
    for end in part.index.document_ends.tolist():
        ids = reader.read(begin, end)
        (place,) = np.flatnonzero(ids == part.tokenizer.eos_id)
        found.append((part.tokenizer.decode(ids[:place]), part.tokenizer.decode(ids[place + 1 :])))
        begin = end
    return found


def hashes(folder: Path) -> dict[str, str]:
    """Name and hash of every file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_parquet(path: Path) -> None:
    """A table with the columns of pairs and another one."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = [f"q{n}" for n in range(len(PAIRS))], *zip(*PAIRS, strict=True)
    table = pyarrow.table(dict(zip(("id", "input", "output"), map(list, columns), strict=True)))
    parquet.write_table(table, path, row_group_size=64)


WRITE = {
    "a.jsonl": lambda path: path.write_bytes(lines(PAIRS)),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines(PAIRS))),
    "a.jsonl.zst": lambda path: path.write_bytes(zstandard.ZstdCompressor().compress(lines(PAIRS))),
    "a.json": lambda path: path.write_text(json.dumps([json.loads(line) for line in lines(PAIRS).splitlines()])),
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", list(WRITE))
def test_every_format_gives_the_same_pairs(tmp_path: Path, name: str) -> None:
    """All pairs, whole, on one side or the other."""
    WRITE[name](tmp_path / name)
    prepared = make(tmp_path / name, tmp_path / "shards")
    shards = open_shards(tmp_path / "shards")
    training, held_out = stored(shards), stored(shards.validation)
    assert sorted(training + held_out) == sorted(PAIRS) and len(training) > len(held_out) > 5
    assert prepared.problems.counts == {} and shards.manifest.holds_pairs and shards.validation.manifest.holds_pairs
    assert verify(tmp_path / "shards", workers=1).damage == []


def test_pairs_with_one_input_stay_on_one_side(tmp_path: Path) -> None:
    """Also those with the smallest hash, which wait for the end, each with its own target; their order counts."""
    smallest, _ = min(PAIRS, key=lambda pair: hash_text(pair[0].encode()))
    pairs = [*PAIRS, *SEVERAL, PAIRS[0], (smallest, "second"), (smallest, "second"), (smallest, "third")]
    (tmp_path / "a.jsonl").write_bytes(lines(pairs))
    make(tmp_path / "a.jsonl", tmp_path / "shards")
    shards = open_shards(tmp_path / "shards")
    training, held_out = stored(shards), stored(shards.validation)
    assert sorted(training + held_out) == sorted(pairs)
    assert not {given for given, _ in training} & {given for given, _ in held_out}
    assert [target for given, target in held_out if given == smallest][-3:] == ["second", "second", "third"]
    # equal pairs count once if asked for, equal inputs do not
    make(tmp_path / "a.jsonl", tmp_path / "once", deduplicate=True)
    once = open_shards(tmp_path / "once")
    assert sorted(stored(once) + stored(once.validation)) == sorted(set(pairs))


def test_an_archive_of_scrolls_keeps_its_own_split(tmp_path: Path) -> None:
    """validation.jsonl is held out; test.jsonl, which has no targets, is left out and said."""
    with zipfile.ZipFile(tmp_path / "task.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("task/validation.jsonl", lines(PAIRS[:60]))
        archive.writestr("task/train.jsonl", lines([*PAIRS[60:], *SEVERAL[30:], (PAIRS[70][0], None)]))
        archive.writestr("task/test.jsonl", lines([(given, None) for given, _ in PAIRS[:5]]))
        archive.writestr("__MACOSX/._train.jsonl", b"\0")
    prepared = make(tmp_path / "task.zip", tmp_path / "shards", validation_fraction=0.01)
    shards = open_shards(tmp_path / "shards")
    assert stored(shards) == [*PAIRS[60:], *SEVERAL[30:]] and stored(shards.validation) == PAIRS[:60]
    assert prepared.inputs.lines() == ["not read, test.jsonl, which has no targets: 1"]
    assert prepared.problems.examples["no text under 'output'"] == [f"{tmp_path / 'task.zip'}: task/train.jsonl:178"]
    assert warning_lines(prepared.manifest, prepared.validation, prepared.problems, prepared.inputs) == []
    assert "training: 177 pairs" in summary_lines(prepared.manifest, prepared.validation, prepared.problems)[0]
    assert "holds pairs of an input and a target (data.mixture: pairs)" in info_lines(shards)
    with zipfile.ZipFile(tmp_path / "task.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    prepared = make(tmp_path / "unpacked", tmp_path / "again", validation_fraction=0.01)
    again = open_shards(tmp_path / "again")
    assert stored(again) == stored(shards) and stored(again.validation) == stored(shards.validation)
    assert "not read, test.jsonl, which has no targets: 1" in prepared.inputs.lines()
    (tmp_path / "bad.zip").write_bytes((tmp_path / "task.zip").read_bytes()[:-40])
    with pytest.raises(ConfigError, match=r"bad\.zip cannot be read as a zip archive"):
        make(tmp_path / "bad.zip", tmp_path / "bad")
    with pytest.raises(ConfigError, match=r"task\.zip is a \.zip file"):
        make(tmp_path / "task.zip", tmp_path / "bad", pairs=False)


def test_damaged_archives(tmp_path: Path) -> None:
    """What cannot be read of a member is counted; an archive with two members of one name is refused."""
    with zipfile.ZipFile(tmp_path / "task.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("task/train.jsonl", lines(PAIRS))
    content = bytearray((tmp_path / "task.zip").read_bytes())
    for place in (len(content) // 3, 60):  # of the data, and of what describes its compression
        damaged = bytearray(content)
        damaged[place : place + 8] = b"\xff" * 8
        (tmp_path / "bad.zip").write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"bad\.zip"):
            make(tmp_path / "bad.zip", tmp_path / "bad", strict=True)
    needed = content.index(b"PK\1\2") + 6  # the version that a reader needs, in the directory
    content[needed] = 151
    (tmp_path / "newer.zip").write_bytes(content)
    with pytest.raises(ConfigError, match=r"newer\.zip cannot be read as a zip archive"):
        make(tmp_path / "newer.zip", tmp_path / "bad")
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("task/train.jsonl", lines(PAIRS[:5]))
        archive.writestr("task/train.jsonl", lines(PAIRS[5:]))
    with pytest.raises(ConfigError, match=r"twice\.zip holds task/train\.jsonl twice"):
        make(tmp_path / "twice.zip", tmp_path / "bad")


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_anywhere_it_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """The state is saved after every pair, and the work is interrupted after every few."""
    with zipfile.ZipFile(tmp_path / "task.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("task/train.jsonl", lines([*PAIRS[:40], *SEVERAL[:14], (PAIRS[0][0], None)]))
    make(tmp_path / "task.zip", tmp_path / "whole")
    config = PrepareConfig(
        input=[str(tmp_path / "task.zip")],
        output=tmp_path / "shards",
        pairs=True,
        validation_fraction=0.1,
        workers=workers,
        commit_seconds=0,
    )
    starts, add_document = 0, CorpusWriter.add_document

    def add_or_interrupt(self: CorpusWriter, document: Document) -> None:
        add_document(self, document)
        if starts < 5 and self.num_documents >= 10 * starts:
            raise KeyboardInterrupt

    monkeypatch.setattr(CorpusWriter, "add_document", add_or_interrupt)
    while True:
        starts += 1
        try:
            prepare(config)
            break
        except KeyboardInterrupt:
            assert not config.output.exists()
    assert starts == 5 and hashes(tmp_path / "shards") == hashes(tmp_path / "whole")


def test_what_is_no_pair_is_counted_with_file_and_line(tmp_path: Path) -> None:
    bad = [
        b'{"input": "x"}',
        b'{"input": "x", "output": 5}',
        b'{"input": " ", "output": "y"}',
        b'{"input": "x", "output": "\\ud800"}',
        b"[1]",
        b"{",
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(PAIRS) + b"\n".join(bad) + b"\n")
    problems = make(path, tmp_path / "shards").problems
    assert problems.counts == {
        "no text under 'output'": 2,
        "empty under 'input'": 1,
        "not UTF-8 under 'output'": 1,
        "no text under 'input'": 1,
        "not JSON": 1,
    }
    assert problems.examples["empty under 'input'"] == [f"{path}:203"]
    with pytest.raises(ConfigError, match=re.escape(f"{path}:201: is no text under 'output'")):
        make(path, tmp_path / "strict", strict=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"input_key": "question"},
            "a.jsonl holds no whole pair (no text under 'question': 200); leave it out, or name",
        ),
        ({"input": "b.jsonl"}, "b.jsonl holds no whole pair (it is empty)"),
        ({"input": "c.txt"}, "c.txt can hold no pairs; with --pairs give .jsonl"),
        ({"input": "d.jsonl"}, "--input: all pairs have the same input, so none can be held out"),
        (
            {"train_tokenizer": 300},
            "--train-tokenizer: cannot be used with --pairs; leave it out, and give --tokenizer",
        ),
        ({"min_document_tokens": 3}, "--min-document-tokens: cannot be used with --pairs"),
        ({"text_key": "x"}, "--text-key: cannot be used with --pairs"),
        ({"target_key": "input"}, "--target-key: 'input' is the key of the input too"),
        ({"pairs": False, "target_key": "x"}, "--target-key: is for pairs; give --pairs as well"),
    ],
    ids=["keys", "empty", "text", "one-input", "train", "shortest", "text-key", "same-key", "no-pairs"],
)
def test_what_is_refused_is_one_line(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    """And nothing is left behind."""
    contents = {"a.jsonl": lines(PAIRS), "b.jsonl": b"", "c.txt": b"text", "d.jsonl": lines([PAIRS[0]] * 3)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    path = tmp_path / str(settings.pop("input", "a.jsonl"))
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        make(path, tmp_path / "shards", **settings)
    assert "\n" not in str(error.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(contents)


def test_counted_lengths_say_what_is_cut() -> None:
    """Exactly, where the limit is the edge of a bin; otherwise at most a sixteenth too many lengths are in question."""
    lengths = [*range(1, 5000, 7), 2047, 2048]
    counted = PairLengths()
    for length in lengths:
        counted.add(length)
    again = PairLengths(json.loads(json.dumps(counted.save())))
    assert again.total == len(lengths) and again.above(2047) == (sum(length > 2047 for length in lengths), True)
    number, is_exact = again.above(2000)
    assert not is_exact and sum(length > 2000 for length in lengths) <= number <= sum(n > 1870 for n in lengths)
    assert again.quantile(0.5) == pytest.approx(np.median(lengths), rel=0.05)
    assert again.mean(10_000) == pytest.approx(np.mean(lengths), rel=0.01)
    assert PairLengths().quantile(0.5) == 0 and PairKeys() == PairKeys(input_key="input", target_key="output")
