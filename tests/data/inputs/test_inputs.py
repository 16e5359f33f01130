"""What prepare reads and makes of it: compressed files, parquet, folders, worker processes, tokenizers, duplicates."""

import gzip
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pytest
import tokenizers
import zstandard
from pyarrow import parquet
from tokenizers import models, pre_tokenizers

from colt5dist.data.inputs.compressed import open_compressed
from colt5dist.data.inputs.documents import Item, read_items
from colt5dist.data.inputs.files import find_inputs
from colt5dist.data.prepare.prepare import prepare
from colt5dist.data.prepare.report import summary_lines, warning_lines
from colt5dist.data.prepare.settings import PrepareConfig
from colt5dist.data.read.shards import ShardSet, open_shards
from colt5dist.data.read.token_reader import TokenReader
from colt5dist.errors import ConfigError

MakeText = Callable[[random.Random, int], str]


def texts_of(part: ShardSet) -> list[str]:
    """The documents of one set."""
    ends = part.index.document_ends.tolist()
    reader = TokenReader(part, cache_bytes=1 << 20)
    return [part.tokenizer.decode(reader.read(begin, end)) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def all_texts(folder: Path) -> list[str]:
    """The documents of a prepared folder, sorted."""
    shards = open_shards(folder)
    return sorted(texts_of(shards) + texts_of(shards.validation))


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def texts(make_text: MakeText) -> list[str]:
    """Distinct documents."""
    rng = random.Random(5)
    return [f"{number} {make_text(rng, rng.randint(20, 4000))}" for number in range(300)]


@pytest.fixture(scope="module")
def inputs(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents, divided among files of all kinds."""
    folder = tmp_path_factory.mktemp("inputs")
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    (folder / "a.jsonl").write_bytes(b"".join(lines[:60]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[60:120])))
    frames = [zstandard.ZstdCompressor().compress(b"".join(part)) for part in (lines[120:150], lines[150:180])]
    (folder / "c.jsonl.zst").write_bytes(b"".join(frames))
    table = pyarrow.table({"id": list(range(100)), "text": texts[180:280]})
    parquet.write_table(table, folder / "d.parquet", row_group_size=17)
    (folder / "sub").mkdir()
    for number, text in enumerate(texts[280:298]):
        (folder / "sub" / f"{number}.txt").write_text(text)
    (folder / "sub/x.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(texts[298].encode()))
    (folder / "sub/y.MD").write_text(texts[299])
    for name in ("notes.bin", ".hidden.txt"):
        (folder / "sub" / name).write_text("no document")
    return folder


def config(inputs: Path, output: Path, **changes: object) -> PrepareConfig:
    """Settings that read the folder."""
    settings = {"input": [str(inputs)], "output": output, "validation_fraction": 0.1, **changes}
    return PrepareConfig(**settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of one process."""
    output = tmp_path_factory.mktemp("one") / "shards"
    prepare(config(inputs, output))
    return output


def test_all_kinds_of_files(texts: list[str], undisturbed: Path) -> None:
    """Each document of each file once; a folder means the files of known kinds below it."""
    assert all_texts(undisturbed) == sorted(texts)


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers(inputs: Path, undisturbed: Path, tmp_path: Path, workers: int) -> None:
    """The same bytes."""
    prepare(config(inputs, tmp_path / "shards", workers=workers))
    assert content(tmp_path / "shards") == content(undisturbed)


def items(path: Path, offset: int = 0, line: int = 0) -> list[Item]:
    """What is read from one file."""
    return list(read_items(find_inputs([str(path)]).files[0], text_key="text", offset=offset, line=line))


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"])
def test_reading_goes_on_anywhere(inputs: Path, name: str) -> None:
    """Reading from the place of any item gives the items after it."""
    whole = items(inputs / name)
    for number in (0, 1, 16, 17, 18, 40, len(whole) - 1):
        place = whole[number]
        rest = items(inputs / name, place.offset, place.line)
        assert [(item.text, item.line) for item in rest] == [(item.text, item.line) for item in whole[number + 1 :]]


@pytest.mark.parametrize("cut", [3, 100, 5000, -1])
def test_a_zst_file_that_breaks_off(inputs: Path, tmp_path: Path, cut: int) -> None:
    """It is a problem after the last complete line, and is never accepted as complete."""
    (tmp_path / "c.jsonl.zst").write_bytes((inputs / "c.jsonl.zst").read_bytes()[:cut])
    found = items(tmp_path / "c.jsonl.zst")
    assert found[-1].problem == "unreadable" and all(item.text for item in found[:-1])
    with open(tmp_path / "c.jsonl.zst", "rb") as raw, pytest.raises((EOFError, zstandard.ZstdError)):
        open_compressed(raw, ".zst").read()


def test_parquet_problems(tmp_path: Path) -> None:
    """No such column, rows without text, and a damaged file, each with its place."""
    rows = ["good", None, "  ", "fine"]
    parquet.write_table(pyarrow.table({"text": rows, "id": [1, 2, 3, 4]}), tmp_path / "rows.parquet")
    parquet.write_table(pyarrow.table({"other": ["x"] * 7, "id": [0] * 7}), tmp_path / "other.parquet")
    whole = (tmp_path / "rows.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-20])
    problems = prepare(config(tmp_path, tmp_path / "shards")).problems
    assert problems.counts == {"unreadable": 1, "no text under 'text'": 8, "empty": 1}
    other, row = problems.examples["no text under 'text'"]
    assert other == f"{tmp_path}/other.parquet: its columns are other, id" and row == f"{tmp_path}/rows.parquet:2"
    assert "cut.parquet:1: Parquet magic bytes not found" in problems.examples["unreadable"][0]
    assert problems.examples["empty"] == [f"{tmp_path}/rows.parquet:3"]
    assert all_texts(tmp_path / "shards") == ["fine", "good"]
    numbers = [str(item.problem) for item in items(tmp_path / "rows.parquet")]
    assert numbers == ["", "no text under 'text'", "empty", ""]


def test_parquet_without_pyarrow(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says what to install, before anything is written."""
    monkeypatch.setattr("colt5dist.data.inputs.files.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--input: .*d\.parquet needs pyarrow; pip install 'colt5dist\[parquet\]'"):
        prepare(config(inputs, tmp_path / "shards"))
    assert not list(tmp_path.iterdir())


def test_duplicates_and_short_documents(texts: list[str], tmp_path: Path) -> None:
    """The first of equal texts is kept; what the settings leave out is reported and is not an error."""
    lines = [*texts[:50], *texts[:20], "short", *texts[40:60], "short"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    changes = {"input": [str(tmp_path / "in.jsonl")], "strict": True, "min_document_tokens": 10, "deduplicate": True}
    prepared = prepare(config(tmp_path, tmp_path / "shards", **changes))
    assert prepared.problems.counts == {}
    assert prepared.problems.unwanted == {"duplicate": 30, "of fewer than 10 tokens": 2}
    assert all_texts(tmp_path / "shards") == sorted(texts[:60])
    assert prepare(config(tmp_path, tmp_path / "shards", **changes)).problems.unwanted == prepared.problems.unwanted
    with pytest.raises(ConfigError, match="holds shards of other inputs or settings"):
        prepare(config(tmp_path, tmp_path / "shards", **{**changes, "deduplicate": False}))


def test_a_tokenizer_from_the_inputs(inputs: Path, texts: list[str], tmp_path: Path) -> None:
    """The same tokenizer every time, with the requested number of ids; every text is recovered."""
    for name, workers in (("one", 0), ("two", 2)):
        prepare(config(inputs, tmp_path / name, train_tokenizer=400, workers=workers))
    assert content(tmp_path / "one") == content(tmp_path / "two")
    shards = open_shards(tmp_path / "one")
    assert shards.tokenizer.vocab_size == 400 and all_texts(tmp_path / "one") == sorted(texts)
    assert shards.num_tokens < 0.8 * sum(map(len, texts_of(shards)))


def test_killed_with_workers(texts: list[str], tmp_path: Path) -> None:
    """SIGKILL at several moments, each followed at once by a new start: the same bytes, and no process is left."""
    lines = [json.dumps({"text": text + " again" * number}) for number in range(2) for text in texts]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    settings = {"input": [str(tmp_path / "in.jsonl")], "train_tokenizer": 300, "deduplicate": True, "workers": 2}
    killed = config(tmp_path, tmp_path / "killed", **settings, commit_seconds=0.02)
    rng = random.Random(0)
    started: list[psutil.Process] = []
    state = tmp_path / "killed.partial/state.json"
    kills = 0

    def saved() -> int:
        try:
            return state.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def slowly(*_: object) -> None:  # called ten times a second at most
        time.sleep(0.1)

    while kills < 6:
        process = multiprocessing.get_context("fork").Process(target=prepare, args=(killed, slowly))
        process.start()
        assert process.pid is not None
        before = saved()
        # the first one while it trains the tokenizer, the others when they have got further
        while process.is_alive() and kills and saved() in (0, before):
            time.sleep(0.005)
        time.sleep(rng.random() * 0.05)
        if process.is_alive():
            started += psutil.Process(process.pid).children()
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        kills += 1
    assert kills >= 3
    prepare(killed)
    prepare(config(tmp_path, tmp_path / "whole", **settings))
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    _, alive = psutil.wait_procs(started, timeout=5)
    assert started and not alive
    assert not list(tmp_path.glob("*.partial"))


def test_a_killed_worker_is_named(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other processes do not hang; a new start resumes."""
    # so that most texts were not sent to the worker when it is killed
    monkeypatch.setattr("colt5dist.data.prepare.tokenize_texts.BATCH_TEXTS", 1)

    others = psutil.Process().children()  # of other tests

    def kill_worker(done: int, total: int, writer: object) -> None:
        for child in set(psutil.Process().children()) - set(others):
            os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(ConfigError, match="--workers: a worker process was killed"):
        prepare(config(inputs, tmp_path / "shards", workers=1), kill_worker)


def objects(first: int, last: int) -> list[dict[str, object]]:
    """JSON objects with one document each."""
    return [{"id": number, "text": f"page {number} with [brackets], \\ and é"} for number in range(first, last)]


def pack(suffix: str, content: bytes) -> bytes:
    """Compress by the ending of a file's name."""
    return {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix](content)


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("form", ["lines", "array", "array of lines", "indented array", "indented object", "one line"])
def test_json_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, compression: str) -> None:
    """Objects in lines, in an array, or over several lines are documents; reading continues after any of them."""
    monkeypatch.setattr("colt5dist.data.inputs.documents.JSON_BYTES", 64)  # less than an object, as in a large file
    made = objects(0, 1 if form == "one line" else 30)
    text = {
        "lines": "".join(json.dumps(part) + "\n" for part in made),
        "array": json.dumps(made),
        "array of lines": "[" + ",\n".join(json.dumps(part, ensure_ascii=False) for part in made) + "\n]\n",
        "indented array": "\ufeff" + json.dumps(made, indent=1),
        "indented object": "\n".join(json.dumps(part, indent=1) for part in made),
        "one line": json.dumps(made[0]),
    }[form]
    path = tmp_path / f"pages.JSON{compression}"
    path.write_bytes(pack(compression, text.encode()))
    whole = items(path)
    assert [item.text for item in whole if item.text] == [part["text"] for part in made]
    assert not any(item.problem for item in whole)
    for place in whole[:: max(1, len(whole) // 5)]:
        rest = [item.text for item in items(path, place.offset, place.line)]
        assert rest == [item.text for item in whole[whole.index(place) + 1 :]]


@pytest.mark.parametrize(
    ("content", "kinds", "problem", "reason"),
    [
        (
            b'[{"text": "one"}, {"text": 5}, {"text": "two"}, {"te',
            ["", "no text under 'text'", ""],
            "not JSON",
            "is not",
        ),
        (b'[{"text": "one"}, oh, {"text": "two"}]', [""], "not JSON", "Expecting value"),
        (b'[{"text": "one"}', [""], "not JSON", "the file ends within the array"),
        (b'[{"text": "one"}, {"text": "\xff"}, {"text": "two"}]', ["", "not UTF-8", ""], "", ""),
        (b'{"text": "one"}\n{"text": \n{"text": "two"}\n', ["", "not JSON", ""], "", ""),
        (b'{"text": "on\n{"text": "one"}\n', ["not JSON", ""], "", ""),
    ],
)
def test_damaged_json_files(tmp_path: Path, content: bytes, kinds: list[str], problem: str, reason: str) -> None:
    """What is good is read; the damage is named with its reason. In lines, only the bad line is lost."""
    (tmp_path / "pages.json").write_bytes(content)
    found = items(tmp_path / "pages.json")
    if problem:
        *found, last = found
        assert last.problem == problem and last.ends_file and reason in last.reason
    assert [item.problem for item in found] == kinds


def test_text_that_is_no_text(inputs: Path, tmp_path: Path) -> None:
    """JSON and marked-up pages under a name for text are counted, not read as one raw document."""
    (tmp_path / "part-0").write_text('{"id": 1, "text": "one"}\n{"id": 2, "text": "two"}\n')
    (tmp_path / "part-1").write_text('[\n {"text": "one"}]')
    (tmp_path / "part-2").write_text(" <!DOCTYPE html>\n<p>page</p>")
    (tmp_path / "part-3").write_text("<?xml version='1.0'?><text/>")
    (tmp_path / "part-4").write_text("{ plain } text [1] <html>")
    problems = prepare(config(inputs, tmp_path / "shards", input=[str(tmp_path / "part-*")])).problems
    named_otherwise = "JSON in a file whose name does not end in .jsonl or .json"
    assert problems.counts == {named_otherwise: 2, "HTML or XML, which is not plain text": 2}


@pytest.mark.parametrize("name", ["a.csv", "a.TSV.gz", "a.html", "a.htm.zst", "a.xml", "a.jsonl.bz2", "a.docx"])
def test_kinds_that_are_refused(tmp_path: Path, name: str) -> None:
    """A file that is named itself, or by a pattern, and is no text: one line that says what to give instead."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(b"x")
    kinds = r"give text, jsonl or parquet files .*\.mds\.zstd and \.bin with its \.idx are read, too"
    with pytest.raises(ConfigError, match=rf"is a \.\w+ file \(and 1 more file.*; {kinds}"):
        find_inputs([str(tmp_path / "*" / "*")])


def test_folders_with_nothing_to_read(tmp_path: Path) -> None:
    """Data sets without records, as `datasets` and `streaming` write them; else all kinds that are read are named."""
    for name, text in (
        ("dict/train/state.json", '{"_data_files": []}'),
        ("dict/dataset_dict.json", '{"splits": ["train"]}'),
        ("mds/index.json", '{"shards": [], "version": 2}'),
        ("other/a.xyz", "a"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for folder in ("dict", "dict/train", "mds"):
        with pytest.raises(ConfigError, match=rf"/{folder}' is a data set without records: its index lists no file"):
            find_inputs([str(tmp_path / folder)])
    with pytest.raises(ConfigError, match=r"of a supported kind \(.*\.mds, .*\.mds\.zstd, .*\.bin with its \.idx\)"):
        find_inputs([str(tmp_path / "other")])


def test_what_is_not_read_is_counted(tmp_path: Path) -> None:
    """Files of a folder by ending, links to nowhere, hidden files; linked folders are read, each once."""
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "deep/linked.txt").write_text("text")
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.txt", "b.json", "c.html", "d.HTML", "e.csv.gz", "README", ".hidden.txt", "sub/f.jsonl"):
        (folder / name).write_text("text")
    (folder / "link").symlink_to(elsewhere)
    (folder / "sub/again").symlink_to(elsewhere)
    (elsewhere / "deep/back").symlink_to(folder)
    (folder / "lost.txt").symlink_to(tmp_path / "gone")
    os.mkfifo(folder / "pipe.txt")
    found = find_inputs([str(folder)])
    assert [file.name for file in found.files] == ["a.txt", "b.json", "link/deep/linked.txt", "sub/f.jsonl"]
    kinds = {".html": 2, ".csv.gz": 1, "files without an ending": 1, "hidden files and folders": 1}
    assert found.not_read == {**kinds, "pipes, devices, and links that lead nowhere": 2}
    assert found.other_endings == 4 and "not read, files ending in .html: 2" in found.lines()
    (folder / "folder.txt").mkdir()
    assert "name the folder itself" in " ".join(find_inputs([str(folder / "*.txt")]).lines())


def test_a_folder_that_cannot_be_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named, also below a folder that can."""
    (tmp_path / "in/closed").mkdir(parents=True)
    (tmp_path / "in/a.txt").write_text("text")
    look = os.scandir

    def refuse(path: str) -> object:
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return look(path)

    monkeypatch.setattr("colt5dist.data.inputs.files.os.scandir", refuse)
    with pytest.raises(ConfigError, match=r"--input: .*in/closed cannot be read \(Permission denied\)"):
        find_inputs([str(tmp_path / "in")])


@pytest.mark.parametrize("name", ["a [1].txt", "what?.txt", "st*r.txt", "[x]"])
def test_a_path_that_exists_is_that_path(tmp_path: Path, name: str) -> None:
    """Whatever characters it has, as a file, as a folder, and as the folder of a pattern."""
    other = tmp_path / "other"
    (other / name).mkdir(parents=True)
    for path in (tmp_path / name, tmp_path / "a 1.txt", tmp_path / "x", other / name / "b.txt", tmp_path / "star.txt"):
        path.write_text("text")
    assert [file.path for file in find_inputs([str(tmp_path / name)]).files] == [tmp_path / name]
    for pattern in (other / name, other / name / "*.txt", other / name / "b.txt"):
        assert [file.path for file in find_inputs([str(pattern)]).files] == [other / name / "b.txt"]


def test_unknown_tokens_are_counted(inputs: Path, tmp_path: Path) -> None:
    """They are in the manifest and the summary, with examples, and many of them are a warning."""
    words = {"<unk>": 0, "<pad>": 1, "</s>": 2, "the": 3}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "t.json"))
    (tmp_path / "in.jsonl").write_text('{"text": "the the cat"}\n{"text": "the dog the"}\n{"text": "the the"}\n')
    changes = {"input": [str(tmp_path / "in.jsonl")], "tokenizer": tmp_path / "t.json"}
    for workers in (0, 1):
        prepared = prepare(config(inputs, tmp_path / f"shards{workers}", workers=workers, **changes))
        assert prepared.manifest.source["unknown"] == {"tokens": 2, "parts": ["cat", "dog"]}
    lines = summary_lines(prepared.manifest, prepared.validation, prepared.problems)
    assert "unknown to the tokenizer: 2 tokens (25.00%), such as 'cat', 'dog'" in lines
    warnings = warning_lines(prepared.manifest, prepared.validation, prepared.problems, prepared.inputs)
    assert warnings[0] == "WARNING: 2 of 8 tokens (25%) are unknown to the tokenizer; see above"


def test_a_window_of_two_gigabytes(tmp_path: Path) -> None:
    """`zstd --long=31` is read, as public dumps are packed."""
    settings = zstandard.ZstdCompressionParameters.from_level(3, window_log=31, enable_ldm=True)
    writer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(writer.compress(b'{"text": "one"}\n') + writer.flush())
    assert [item.text for item in items(tmp_path / "a.jsonl.zst")] == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl.gz", b"no gzip", "Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"some text")[:-3], "Compressed file ended before the end-of-stream marker"),
        ("a.json.zst", b"no zstd", "Unknown frame descriptor"),
        ("a.txt.zst", zstandard.ZstdCompressor().compress(b"some text")[:-3], "the file ends within a frame"),
        ("a.parquet", b"PAR1", "Parquet file size is 4 bytes"),
    ],
    ids=["gzip", "gzip cut", "zstd", "zstd cut", "parquet"],  # gzip stamps the time, and workers must agree on names
)
def test_unreadable_files_have_a_reason(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    """The library's own, beside the place."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"left out, unreadable: 1 \(.*{name}(:1)?: .*{reason}"):
        prepare(config(tmp_path / name, tmp_path / "shards"))


@pytest.mark.parametrize("workers", [0, 1])
def test_long_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """In a text file, a line, an array and a parquet file: the shards are those of short ones, and progress moves."""
    long = "a long document, 日本語. " * 2000
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("\ufeff" + long)
    (tmp_path / "in/b.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("b", "b" + long, "b b"))
    )
    (tmp_path / "in/c.json").write_text(json.dumps([{"text": "c"}, {"text": "c" + long}, {"text": "c c"}]))
    parquet.write_table(pyarrow.table({"text": ["d", "d" + long, "d d"]}), tmp_path / "in/d.parquet")
    (tmp_path / "in/e.txt").write_text("e" * 30_000 + "\0")
    (tmp_path / "in/f.txt").write_text("\n" * 30_000)
    (tmp_path / "in/g.txt").write_bytes(b"g" * 30_000 + b"\xff")
    (tmp_path / "in/h.txt").write_text("<html>" + "h" * 30_000)
    expected = prepare(config(tmp_path / "in", tmp_path / "short")).problems.counts
    assert expected == {"binary": 1, "empty": 1, "not UTF-8": 1, "HTML or XML, which is not plain text": 1}
    monkeypatch.setattr("colt5dist.data.inputs.documents.LONG_BYTES", 20_000)
    monkeypatch.setattr("colt5dist.data.long_texts.WINDOW_BYTES", 4096)
    monkeypatch.setattr("colt5dist.data.inputs.documents.WINDOW_BYTES", 4096)
    monkeypatch.setattr("colt5dist.data.prepare.resume.REPORT_SECONDS", -1)
    assert isinstance(items(tmp_path / "in/a.txt")[0].text, bytes)
    told: list[int] = []
    prepared = prepare(
        config(tmp_path / "in", tmp_path / "long", workers=workers), lambda done, total, writer: told.append(done)
    )
    assert prepared.problems.counts == expected
    assert content(tmp_path / "long") == content(tmp_path / "short")
    assert len([done for done in told if done < len(long.encode())]) > 10


def test_the_real_packages(texts: list[str], tmp_path: Path) -> None:
    """What `datasets` and `streaming` write is read as what the writers of `test_formats.py` make."""
    datasets, streaming = pytest.importorskip("datasets"), pytest.importorskip("streaming")
    texts = [text[:400] for text in texts[:60]]
    made = datasets.Dataset.from_dict({"id": list(range(len(texts))), "text": texts})
    made.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "dict"))
    folders = ["saved", "dict"]
    columns = {"id": "int", "text": "str", "raw": "bytes", "value": "json", "vector": "ndarray"}
    for compression in (None, "zstd:3", "gz"):
        folders.append(f"mds-{compression}")
        output = str(tmp_path / folders[-1])
        with streaming.MDSWriter(out=output, columns=columns, compression=compression, size_limit=4096) as writer:
            for number, text in enumerate(texts):
                row = {"id": number, "text": text, "raw": text.encode(), "value": text, "vector": np.ones(1 + number)}
                writer.write(row)
    for folder in folders:
        prepared = prepare(config(tmp_path / folder, tmp_path / f"shards-{folder}"))
        assert all_texts(tmp_path / f"shards-{folder}") == sorted(texts) and prepared.problems.counts == {}
