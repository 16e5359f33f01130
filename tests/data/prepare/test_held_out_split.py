"""Which documents are held out: by hash, and by size where documents are few or very unequal."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from colt5dist.data.prepare.held_out_split import KNOWN_TEXTS, CorpusWriter, held_out_below
from colt5dist.data.prepare.prepare import Prepared, prepare
from colt5dist.data.prepare.report import summary_lines, warning_lines
from colt5dist.data.prepare.settings import PrepareConfig
from colt5dist.data.prepare.tokenize_texts import hash_text
from colt5dist.data.read.shards import ShardSet, open_shards
from colt5dist.data.read.token_reader import TokenReader
from colt5dist.data.tokenizer import ByteTokenizer

SMALL = [f"small document {number} " * 20 for number in range(300)]


def hash_of(text: str) -> int:
    """What decides which set a text is in."""
    return hash_text(text.encode())


def large(texts: Iterable[str], *, first: bool, size: int = 400_000) -> str:
    """A long text whose hash is the smallest of all, so it would be held out; or above half of the range."""
    smallest = min(map(hash_of, texts))
    candidates = (f"{number} " + "of great length " * (size // 16) for number in range(100_000))
    return next(text for text in candidates if (hash_of(text) < smallest if first else hash_of(text) >> 63))


def run(tmp_path: Path, texts: Iterable[str], **changes: object) -> Prepared:
    """Prepare texts."""
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = {"input": [str(tmp_path / "in.jsonl")], "output": tmp_path / "shards", **changes}
    return prepare(PrepareConfig(**settings))  # type: ignore[arg-type]


def texts_of(part: ShardSet) -> list[str]:
    """The documents of one set."""
    ends = part.index.document_ends.tolist()
    reader = TokenReader(part, cache_bytes=1 << 20)
    return [part.tokenizer.decode(reader.read(begin, end)) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def warned(prepared: Prepared) -> list[str]:
    """The warnings at the end."""
    return warning_lines(prepared.manifest, prepared.validation, prepared.problems, prepared.inputs)


def test_the_hash_alone_decides_in_an_ordinary_corpus(tmp_path: Path) -> None:
    """More documents change the side of none."""
    fraction = 0.1
    for name, texts in (("all", SMALL), ("some", SMALL[::2])):
        (tmp_path / name).mkdir()
        prepared = run(tmp_path / name, texts, validation_fraction=fraction)
        held_out = texts_of(open_shards(tmp_path / name / "shards").validation)
        assert sorted(held_out) == sorted(text for text in texts if hash_of(text) < held_out_below(fraction))
        assert not warned(prepared) and "moved" not in prepared.manifest.source


@pytest.mark.parametrize("fraction", [0.01, 0.1])
def test_a_large_document_is_not_held_out(tmp_path: Path, fraction: float) -> None:
    """Where the hash would take it and leave scraps to train on: the next documents by hash are held out."""
    texts = [*SMALL[:200], large(SMALL, first=True), *SMALL[200:], *SMALL[:2]]
    prepared = run(tmp_path, texts, validation_fraction=fraction)
    tokens = prepared.manifest.tokens + prepared.validation.tokens
    assert 0.5 * fraction <= prepared.validation.tokens / tokens <= 2 * fraction
    held_out = texts_of(open_shards(tmp_path / "shards").validation)
    others = sorted(SMALL, key=hash_of)
    assert set(held_out) <= set(others[: len(held_out)])
    assert sorted(held_out + texts_of(open_shards(tmp_path / "shards"))) == sorted(texts)  # copies together
    assert prepared.manifest.source["moved"] and not warned(prepared)
    lines = summary_lines(prepared.manifest, prepared.validation, prepared.problems)
    assert any(line.startswith("not in the set that the hash names: ") for line in lines)


def test_the_nearest_of_few_documents(tmp_path: Path) -> None:
    """Of three, the one whose length is nearest; that this is far too much is said."""
    texts = [large(SMALL, first=True, size=50_000), "middle " * 1000, large(SMALL, first=False, size=30_000)]
    run(tmp_path, texts)
    assert texts_of(open_shards(tmp_path / "shards").validation) == ["middle " * 1000]
    equal = tmp_path / "equal"
    equal.mkdir()
    (line,) = warned(run(equal, [f"{number} " + "text " * 9000 for number in range(3)]))
    assert line.startswith(
        "WARNING: 33% of the tokens are held out, not 1%: the 3 documents are too few or too unequal"
    )


def test_one_document_is_cut_and_that_is_said(tmp_path: Path) -> None:
    (line,) = warned(run(tmp_path, ["text " * 9000]))
    assert line.startswith("WARNING: all text is one document, so its last 9% are held out and the rest is trained on")


def test_scraps_that_are_held_out_are_said(tmp_path: Path) -> None:
    """Two documents, one of a few tokens: no choice is good."""
    (line,) = warned(run(tmp_path, [large(["short"], first=False), "short"]))
    assert line.startswith("WARNING: only 0.00% of the tokens are held out, not 1%: the 2 documents are too few")


def test_many_documents_with_a_few_giants(tmp_path: Path) -> None:
    """More are held out than are known by hash: the giants among them go to training, nothing else moves."""
    writer = CorpusWriter(tmp_path / "one", ByteTokenizer(), validation_fraction=0.15)
    texts = [f"{number} words " * 40 for number in range(8 * KNOWN_TEXTS)]
    giants = [large(texts, first=True), large(texts, first=True, size=390_000)]
    for text in (*texts, *giants):
        writer.add(text)
    moved = writer.moved_texts()
    below = held_out_below(0.15)
    known = set(sorted(map(hash_of, (*texts, *giants)))[:KNOWN_TEXTS])
    changed = {value for value, held_out in moved.items() if held_out != (value < below)}
    assert changed == {hash_of(text) for text in giants} and changed <= known


def test_killed_while_it_is_written_again(tmp_path: Path) -> None:
    """The same bytes as without an interruption."""
    texts = [large(SMALL, first=True), *SMALL[:100]]
    tokens = sum(map(len, texts))
    run(tmp_path, texts)
    seen = 0

    def stop(done: int, total: int, writer: CorpusWriter) -> None:
        nonlocal seen
        again = seen > writer.num_tokens
        seen = max(seen, writer.num_tokens)
        if again and writer.num_tokens > tokens // 2:
            raise KeyboardInterrupt

    config = PrepareConfig(input=[str(tmp_path / "in.jsonl")], output=tmp_path / "killed", commit_seconds=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("colt5dist.data.prepare.resume.REPORT_SECONDS", -1)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, stop)
    prepare(config)
    for path in (tmp_path / "shards").rglob("*"):
        other = tmp_path / "killed" / path.relative_to(tmp_path / "shards")
        assert path.is_dir() or path.read_bytes() == other.read_bytes()
