"""Data sets of other libraries as inputs: Arrow and MDS folders, snapshots of parquet, token files; keys by file."""

import gzip
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import tokenizers
import zstandard
from pyarrow import ipc, parquet
from tokenizers import models, pre_tokenizers

from colt5dist.data.inputs.documents import Item, read_items
from colt5dist.data.inputs.files import find_inputs
from colt5dist.data.inputs.megatron import TokenIds
from colt5dist.data.prepare import resume
from colt5dist.data.prepare.prepare import prepare
from colt5dist.data.prepare.settings import PrepareConfig, parse_prepare
from colt5dist.data.read.shards import open_shards
from colt5dist.data.read.token_reader import TokenReader
from colt5dist.errors import ConfigError

TEXTS = [f"{number} caf\u00e9 " + "word " * (7 * number % 50) for number in range(60)]


def write_arrow(path: Path, texts: list[str], *, kind: str = "stream") -> None:
    """An Arrow file in batches of four rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    new = ipc.new_stream if kind == "stream" else ipc.new_file
    with pyarrow.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)


def write_saved(folder: Path, texts: list[str], shards: int = 2) -> None:
    """A folder as `save_to_disk` of `datasets` writes it, and a file of its cache."""
    names = [f"data-{number:05d}-of-{shards:05d}.arrow" for number in range(shards)]
    for number, name in enumerate(names):
        write_arrow(folder / name, texts[number * len(texts) // shards : (number + 1) * len(texts) // shards])
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"text": {"dtype": "string"}}}))
    write_arrow(folder / "cache-0123.arrow", ["of the cache"])


def mds_shard(samples: list[dict[str, bytes]], encodings: dict[str, str], sizes: dict[str, int | None]) -> bytes:
    """A shard, by the layout that its documentation gives."""
    names = sorted(encodings)
    description = {
        "column_encodings": [encodings[name] for name in names],
        "column_names": names,
        "column_sizes": [sizes[name] for name in names],
        "compression": None,
        "format": "mds",
        "hashes": [],
        "size_limit": 1 << 26,
        "version": 2,
    }
    config = json.dumps(description, sort_keys=True).encode()
    parts = []
    for sample in samples:
        head = b"".join(struct.pack("<I", len(sample[name])) for name in names if sizes[name] is None)
        parts.append(head + b"".join(sample[name] for name in names))
    ends = 4 + 4 * (len(samples) + 1) + len(config) + np.cumsum([0, *map(len, parts)])
    return struct.pack("<I", len(samples)) + ends.astype("<u4").tobytes() + config + b"".join(parts)


MDS_COLUMNS = {"id": "int", "raw": "bytes", "text": "str", "value": "json", "vector": "ndarray"}
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda content: gzip.compress(content, mtime=0),
    ".zstd": lambda content: zstandard.ZstdCompressor().compress(content),
}


def write_mds(folder: Path, texts: list[str], *, compression: str = "", shards: int = 2) -> None:
    """A folder as `MDSWriter` writes it."""
    folder.mkdir(parents=True)
    entries = []
    for number in range(shards):
        part = texts[number * len(texts) // shards : (number + 1) * len(texts) // shards]
        samples = [
            {
                "id": struct.pack("<q", place),
                "raw": text.encode(),
                "text": text.encode(),
                "value": json.dumps(text).encode(),
                "vector": bytes(place % 5),
            }
            for place, text in enumerate(part)
        ]
        content = mds_shard(samples, MDS_COLUMNS, {**dict.fromkeys(MDS_COLUMNS), "id": 8})
        name = f"shard.{number:05d}.mds"
        packed = COMPRESS[compression](content)
        (folder / f"{name}{compression}").write_bytes(packed)
        zipped = {"basename": name + compression, "bytes": len(packed), "hashes": {}} if compression else None
        raw = {"basename": name, "bytes": len(content), "hashes": {}}
        entries.append({"format": "mds", "raw_data": raw, "zip_data": zipped, "samples": len(part), "version": 2})
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))


def write_tokens(path: Path, documents: list[list[list[int]]], *, dtype: str = "<u2", kind: int = 8) -> None:
    """Token files of documents of sequences of ids."""
    sequences = [np.array(sequence, dtype) for document in documents for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    starts = (np.cumsum(lengths) - lengths) * np.dtype(dtype).itemsize
    bounds = np.cumsum([0, *map(len, documents)])
    path.write_bytes(b"".join(sequence.tobytes() for sequence in sequences))
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, kind, len(sequences), len(bounds))
    arrays = lengths.tobytes() + starts.astype("<i8").tobytes() + bounds.astype("<i8").tobytes()
    path.with_suffix(".idx").write_bytes(header + arrays)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words of the texts; the ids 0 and 1 end a document."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    words = ["</s>", "<|endoftext|>", "?", "word", "caf\u00e9", *map(str, range(60))]
    model = models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="?")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    made.save(str(path))
    return path


def documents_of(folder: Path) -> list[list[int]]:
    """The ids of all documents of a prepared folder, sorted."""
    found = []
    shards = open_shards(folder)
    for part in (shards, shards.validation):
        reader, ends = TokenReader(part, cache_bytes=1 << 20), part.index.document_ends.tolist()
        found += [reader.read(begin, end).tolist() for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    return sorted(found)


def all_texts(folder: Path) -> list[str]:
    """The texts of a folder that was prepared with bytes as tokens, sorted."""
    decode = open_shards(folder).tokenizer.decode
    return sorted(decode(ids) for ids in documents_of(folder))


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def config(inputs: Path | str, output: Path, **changes: object) -> PrepareConfig:
    """Settings that read one input."""
    return PrepareConfig(**{"input": [str(inputs)], "output": output, "validation_fraction": 0.1, **changes})  # type: ignore[arg-type]


def items(path: Path, line: int = 0) -> list[Item]:
    """What is read from one file, from a record on."""
    return list(read_items(find_inputs([str(path)]).files[0], text_key="text", line=line))


def shown(found: list[Item]) -> list[tuple[object, int, str]]:
    """Documents and problems, with ids as lists."""
    return [(i.text.ids.tolist() if isinstance(i.text, TokenIds) else i.text, i.line, i.problem) for i in found]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The texts, divided among folders of all kinds."""
    folder = tmp_path_factory.mktemp("sources")
    write_saved(folder / "dict/train", TEXTS[:10])
    write_saved(folder / "dict/test", TEXTS[10:16], shards=1)
    (folder / "dict/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    write_arrow(folder / "plain/file.arrow", TEXTS[16:25], kind="file")
    for number, compression in enumerate(COMPRESS):
        write_mds(folder / f"mds{compression}", TEXTS[25 + 5 * number : 30 + 5 * number], compression=compression)
    shutil.copy(folder / "mds/shard.00000.mds", folder / "mds.zstd/other.mds")  # which its index does not list
    (folder / "mds.gz/shard.00000.mds").write_bytes(
        gzip.decompress((folder / "mds.gz/shard.00000.mds.gz").read_bytes())
    )
    (folder / "blobs").mkdir()
    parquet.write_table(pyarrow.table({"text": TEXTS[40:]}), folder / "blobs/0a1b")
    snapshot = folder / "snapshots/main"
    (snapshot / "data").mkdir(parents=True)
    (snapshot / "data/train-00000-of-00001.parquet").symlink_to(folder / "blobs/0a1b")
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n# A card\n")
    return folder


def test_folders_of_data_sets(sources: Path, tmp_path: Path) -> None:
    """Each record once, with any number of workers; descriptions, caches and second copies are counted, not read."""
    prepared = prepare(config(sources, tmp_path / "one"))
    assert all_texts(tmp_path / "one") == sorted(TEXTS)
    assert prepared.problems.counts == {}
    assert prepared.inputs.not_read == {
        "files that describe a data set": 2 * 2 + 1 + 3 + 1,
        "files that their data set does not list": 2 + 1 + 1,
        "files without an ending": 1,
    }
    assert [note.partition(";")[0] for note in prepared.notes] == [
        f"--input: {sources}/dict has the splits train, test, and all are read"
    ]
    prepare(config(sources, tmp_path / "two", workers=2))
    assert content(tmp_path / "two") == content(tmp_path / "one")
    prepare(config(f"{sources}/*/**/*", tmp_path / "three"))  # a pattern leaves out the same
    assert all_texts(tmp_path / "three") == sorted(TEXTS)


def test_interrupted_after_any_record(
    sources: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped eight times and continued: the same bytes."""
    inputs = tmp_path / "inputs"
    shutil.copytree(sources, inputs, symlinks=True)
    write_tokens(inputs / "ids.bin", [[[5 + number, 3], [3]] for number in range(20)])
    prepare(config(inputs, tmp_path / "whole", tokenizer=tokenizer))
    monkeypatch.setattr(resume, "REPORT_SECONDS", 0.0)
    again = config(inputs, tmp_path / "again", tokenizer=tokenizer, commit_seconds=0.0)

    def stop_after(number: int) -> Callable[..., None]:
        calls = count(1)

        def report(*_: object) -> None:
            if next(calls) == number:
                raise KeyboardInterrupt

        return report

    for _ in range(8):
        with pytest.raises(KeyboardInterrupt):
            prepare(again, stop_after(10))
    prepare(again)
    assert content(tmp_path / "again") == content(tmp_path / "whole")


@pytest.fixture(scope="module")
def files(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file of each kind, of records that differ."""
    folder = tmp_path_factory.mktemp("files")
    write_arrow(folder / "stream.arrow", TEXTS[:11])
    write_arrow(folder / "file.arrow", TEXTS[:11], kind="file")
    found = {"stream": folder / "stream.arrow", "file": folder / "file.arrow"}
    for compression in COMPRESS:
        write_mds(folder / f"mds{compression}", TEXTS[:11], compression=compression, shards=1)
        found[f"mds{compression}"] = folder / f"mds{compression}/shard.00000.mds{compression}"
    write_tokens(folder / "ids.bin", [[[7, number], [number] * number] for number in range(11)])
    return {**found, "ids": folder / "ids.bin"}


KINDS = ("stream", "file", "mds", "mds.gz", "mds.zstd", "ids")


@pytest.mark.parametrize("kind", KINDS)
def test_reading_goes_on_anywhere(files: dict[str, Path], kind: str) -> None:
    """Reading from any record on gives the records after it."""
    whole = shown(items(files[kind]))
    assert len(whole) == 11 and not any(problem for _, _, problem in whole)
    for line in (0, 1, 3, 4, 10, 11):
        assert shown(items(files[kind], line)) == whole[line:]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut(files: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """At any place: the records before it, and a problem after them, which names the record."""
    original = files[kind]
    path = tmp_path / original.name
    if kind == "ids":
        shutil.copy(original.with_suffix(".idx"), path.with_suffix(".idx"))
    whole, bytes_of_file = shown(items(original)), original.read_bytes()
    for length in np.linspace(0, len(bytes_of_file) - 1, 40, dtype=int).tolist():
        path.write_bytes(bytes_of_file[:length])
        *before, last = items(path)
        assert last.problem == "unreadable" and last.reason and last.ends_file and last.line == len(before) + 1
        assert shown(before) == whole[: len(before)]
        assert last.documents in (1, 11 - len(before))


def test_damage_within_a_file(files: dict[str, Path], tmp_path: Path) -> None:
    """Wrong magic, offsets and sizes: one problem with the reason, never an exception."""
    shard = bytearray(files["mds"].read_bytes())
    path = tmp_path / "shard.mds"

    def reason(changed: bytes, file: Path = path) -> tuple[int, str]:
        file.write_bytes(changed)
        found = items(file)
        return len(found) - 1, found[-1].reason

    first = struct.unpack_from("<I", shard, 4)[0]
    assert reason(b"\xff" * 4 + shard[4:]) == (0, "the file ends within it")
    assert reason(shard[:4] + b"\0" * 4 + shard[8:])[1].startswith("is no MDS shard: its first offset")
    assert reason(shard[:8] + struct.pack("<I", first - 1) + shard[12:]) == (0, "its offsets are not in order")
    assert reason(shard.replace(b'"column_names"', b'"column_nomes"'))[1].startswith("is no MDS shard: the description")
    assert reason(shard[:first] + b"\1" + shard[first + 1 :]) == (0, "the sizes of its columns do not add up")
    assert reason(shard + b"more") == (11, "more bytes follow its last sample")
    assert reason(b"no arrow" * 9, tmp_path / "x.arrow")[0] == 0
    arrow = files["stream"].read_bytes()
    lengths = [len(text.encode()) for text in TEXTS[:2]]
    offsets = struct.pack("<iii", 0, lengths[0], sum(lengths))
    ends = arrow.replace(offsets, struct.pack("<iii", 0, 1 << 30, sum(lengths)), 1)
    assert ends != arrow and reason(ends, tmp_path / "y.arrow")[0] == 0

    ids = tmp_path / "ids.bin"
    index = files["ids"].with_suffix(".idx").read_bytes()
    bounds = 34 + 12 * 22
    for changed, number, message in (
        (index[:-1], 0, "ids.idx is cut off"),
        (index[:-8] + bytes(8), 0, "the documents of ids.idx are not all of its sequences"),
        (index[: bounds + 16] + struct.pack("<q", 99) + index[bounds + 24 :], 1, "the documents of ids.idx are not in"),
        (index[: 34 + 4 * 22] + struct.pack("<q", -2) + index[34 + 4 * 22 + 8 :], 0, "the file ends within it, or"),
    ):
        ids.with_suffix(".idx").write_bytes(changed)
        found, said = reason(files["ids"].read_bytes(), ids)
        assert found == number and said.startswith(message)
    ids.with_suffix(".idx").write_bytes(index)
    assert reason(files["ids"].read_bytes() + b"xx", ids) == (11, "2 bytes follow its last document")


def test_damage_shows_at_the_same_record_from_wherever_reading_begins(tmp_path: Path) -> None:
    """In a compressed shard it does not show at once; so a resumed prepare must lose the same documents."""
    rng = random.Random(1)
    texts = ["".join(rng.choices("abcdefgh ", k=4000)) for _ in range(300)]
    write_mds(tmp_path / "mds", texts, compression=".gz", shards=1)
    (path,) = (tmp_path / "mds").glob("*.gz")
    content = bytearray(path.read_bytes())
    place = len(content) * 4 // 5
    content[place : place + 300] = rng.randbytes(300)
    path.write_bytes(content)
    whole = shown(items(path))
    assert 200 < len(whole) < 300 and whole[-1][2] == "unreadable"
    for line in range(0, len(whole), 7):
        assert shown(items(path, line)) == whole[line:]


def test_columns_that_hold_no_text(files: dict[str, Path], tmp_path: Path) -> None:
    """All rows of the file are counted, with what it holds instead; bytes and JSON may hold text."""
    shard = files["mds"]
    for key, reason in (
        ("id", "the column has the encoding int, which is no text"),
        ("other", "its columns are id, raw, text, value, vector"),
    ):
        (item,) = read_items(find_inputs([str(shard)]).files[0], text_key=key)
        assert (item.problem, item.reason, item.documents) == (f"no text under {key!r}", reason, 11)
    for key in ("raw", "value"):
        found = read_items(find_inputs([str(shard)]).files[0], text_key=key)
        assert [item.text for item in found] == TEXTS[:11]
    (item,) = read_items(find_inputs([str(files["stream"])]).files[0], text_key="other")
    assert (item.reason, item.documents) == ("its columns are id, text", 11)
    bad = {**dict.fromkeys(MDS_COLUMNS, b""), "id": bytes(8), "text": b"\xff", "value": b"{"}
    (tmp_path / "bad.mds").write_bytes(mds_shard([bad], MDS_COLUMNS, {**dict.fromkeys(MDS_COLUMNS), "id": 8}))
    assert [item.problem for item in items(tmp_path / "bad.mds")] == ["not UTF-8"]


def test_data_sets_that_are_not_whole(tmp_path: Path) -> None:
    """A listed file that is missing, outside the folder, or compressed otherwise is one line."""
    write_saved(tmp_path / "saved", TEXTS[:6])
    (tmp_path / "saved/data-00001-of-00002.arrow").unlink()
    with pytest.raises(ConfigError, match=r"--input: .*/saved lists data-00001-of-00002.arrow, which is not there"):
        find_inputs([str(tmp_path)])
    assert len(find_inputs([str(tmp_path / "saved/data*")]).files) == 1
    write_mds(tmp_path / "mds", TEXTS[:6])
    index = tmp_path / "mds/index.json"
    index.write_text(index.read_text().replace("shard.00001.mds", "../shard.00001.mds"))
    with pytest.raises(ConfigError, match=r"--input: .*/mds lists a file outside it: \.\./shard.00001.mds"):
        find_inputs([str(tmp_path / "mds")])
    index.write_text(index.read_text().replace("../shard.00001.mds", "shard.00001.mds.br"))
    (tmp_path / "mds/shard.00001.mds").rename(tmp_path / "mds/shard.00001.mds.br")
    with pytest.raises(ConfigError, match=r"shard.00001.mds.br cannot be read; compress with zstd or gz"):
        find_inputs([str(tmp_path / "mds")])


def test_splits_that_are_missing(tmp_path: Path) -> None:
    """A split that a DatasetDict lists is refused by name, with status 2, if its folder or its index is not there."""
    write_saved(tmp_path / "in/train", TEXTS)
    (tmp_path / "in/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    script = Path(__file__).parents[3] / "launch/prepare.py"
    command = [sys.executable, str(script), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert "/in lists the split test, which is not there; copy" in run.stderr and not (tmp_path / "out").exists()
    (tmp_path / "in/test").mkdir()
    with pytest.raises(ConfigError, match=r"/in lists the split test, and test/state\.json is not there; copy"):
        find_inputs([str(tmp_path / "in")])
    (tmp_path / "in/dataset_dict.json").write_text('{"splits": ["../test"]}')
    with pytest.raises(ConfigError, match=r"lists a split outside it: \.\./test; do not use"):
        find_inputs([str(tmp_path / "in")])
    assert len(find_inputs([str(tmp_path / "in/train")]).files) == 2


@pytest.mark.parametrize("damage", ["x", "{", "[]", "{}", ""])
@pytest.mark.parametrize(
    ("index", "pattern"), [("saved/state.json", "*.arrow"), ("mds/index.json", "*.mds"), ("dict/dataset_dict.json", "")]
)
def test_a_damaged_index(tmp_path: Path, index: str, pattern: str, damage: str) -> None:
    """It is refused by name; files that a pattern matches are read without it, and elsewhere it is an ordinary file."""
    write_saved(tmp_path / "saved", TEXTS[:6])
    write_mds(tmp_path / "mds", TEXTS[:6], compression=".zstd")
    write_saved(tmp_path / "dict/train", TEXTS[:6])
    (tmp_path / index).write_text(damage)
    for given in ((tmp_path / index).parent, tmp_path / index):
        with pytest.raises(ConfigError, match=rf"--input: .*/{index} is damaged: it does not list .*; restore it, or"):
            find_inputs([str(given)])
    if pattern:
        assert len(find_inputs([str((tmp_path / index).parent / f"{pattern}*")]).files) in (2, 3)  # 3 with the cache
    (tmp_path / "other").mkdir()
    (other := tmp_path / "other" / (tmp_path / index).name).write_text(damage)
    assert [file.path for file in find_inputs([str(other.parent)]).files] == [other]


def test_an_index_of_shards_in_other_folders(tmp_path: Path) -> None:
    """If it is damaged it is refused, as is one that lists no shard beside shards; without it they are read."""
    write_mds(tmp_path / "mds/part", TEXTS[:6])
    (index := tmp_path / "mds/index.json").write_text('["the folder below has an index"]')
    assert len(find_inputs([str(tmp_path / "mds")]).files) == 2 + 1
    (tmp_path / "mds/part/index.json").unlink()
    with pytest.raises(ConfigError, match=r"--input: .*/mds/index\.json is damaged: .*; restore it, or give"):
        find_inputs([str(tmp_path / "mds")])
    assert len(find_inputs([str(tmp_path / "mds/**/*.mds*")]).files) == 2
    index.rename(tmp_path / "mds/part/index.json").write_text('{"shards": [], "version": 2}')
    with pytest.raises(ConfigError, match=r"--input: .*/part/index\.json is damaged"):
        find_inputs([str(tmp_path / "mds")])


@pytest.mark.parametrize("length", [0, 1000])
@pytest.mark.parametrize("kind", ["saved", *(f"mds{compression}" for compression in COMPRESS)])
def test_a_listed_file_that_is_cut(tmp_path: Path, kind: str, length: int) -> None:
    """It is refused before anything is read, as a missing one is, also by a pattern; the others can be read."""
    if kind == "saved":
        write_saved(tmp_path / "in", TEXTS, shards=3)
    else:
        rng = random.Random(1)
        texts = ["".join(rng.choices("abcdefgh ", k=400)) for _ in range(60)]  # long when compressed, too
        write_mds(tmp_path / "in", texts, compression=kind.removeprefix("mds"), shards=3)
    _, cut, _ = sorted((tmp_path / "in").glob("*0000*"))
    assert cut.stat().st_size > length
    os.truncate(cut, length)
    for given in (cut.parent, cut.parent / "*0000*", cut):
        with pytest.raises(ConfigError, match=rf"--input: .*/{cut.name} (has|is empty|ends).* its index .*; copy"):
            find_inputs([str(given)])
    assert len(find_inputs([str(cut.parent / "*0000[02]*")]).files) == 2


def test_ids_of_token_files(tokenizer: Path, tmp_path: Path) -> None:
    """They are kept, sequences joined, end tokens only within; all types; .idx or no ending names the .bin file."""
    documents = [[[9, 4, 3, 0]], [[1, 8], [7, 1, 0, 0]], [[], [6]], [[0, 1]], [], [[3] * 5]]
    expected = sorted([[9, 4, 3], [1, 8, 7], [6], [3] * 5])
    for name, dtype, kind in (("a", "<u2", 8), ("b", "<i4", 4), ("c", "<i8", 5), ("d", "u1", 1)):
        write_tokens(tmp_path / f"{name}.bin", documents, dtype=dtype, kind=kind)
        given = tmp_path / (name if kind == 4 else f"{name}.idx")
        prepared = prepare(config(given, tmp_path / name, tokenizer=tokenizer))
        assert documents_of(tmp_path / name) == expected
        assert prepared.problems.counts == {"empty": 2}
    prepare(config(tmp_path / "?.*", tmp_path / "all", tokenizer=tokenizer, workers=1, deduplicate=True))
    assert documents_of(tmp_path / "all") == expected
    changed = tmp_path / "a.idx"
    changed.write_bytes(changed.read_bytes()[:-8] + struct.pack("<q", 6))
    with pytest.raises(ConfigError, match="holds shards of other inputs"):
        prepare(config(tmp_path / "?.bin", tmp_path / "all", tokenizer=tokenizer, deduplicate=True))


def test_token_files_that_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    """Each in one line, and nothing is written but what a repaired input continues."""
    path = tmp_path / "ids.bin"
    write_tokens(path, [[[5, 6]], [[7, 65]]])
    for changes, message in (
        ({}, rf"--input: {path} holds ids, not text; give as --tokenizer"),
        ({"train_tokenizer": 300}, rf"--input: {path} holds ids, not text; give as --tokenizer"),
        ({"tokenizer": tokenizer}, rf"--input: {path}:2: holds the id 65, and the tokenizer has the ids 0 to 64; give"),
        ({"tokenizer": tokenizer, "workers": 1}, rf"--input: {path}:2: holds the id 65"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare(config(path, tmp_path / "shards", **changes))
    write_tokens(path, [[[5, 6]]], dtype="<f4", kind=7)
    with pytest.raises(ConfigError, match=r"ids\.idx gives the ids the type number 7, which is no type of ids"):
        prepare(config(path, tmp_path / "other", tokenizer=tokenizer))
    path.with_suffix(".idx").unlink()
    for given in (path, path.with_suffix("")):
        with pytest.raises(ConfigError, match=r"ids\.bin is a \.bin file; .* needs its \.idx file beside it"):
            find_inputs([str(given)])


def test_keys_by_file(tmp_path: Path) -> None:
    """The first pattern that matches the end of the path; * stands for folders, too; others have the default."""
    (tmp_path / "lang=en").mkdir()
    for name, key in (("a.jsonl", "content"), ("b.jsonl", "body"), ("lang=en/c.jsonl", "story"), ("d.jsonl", "words")):
        (tmp_path / name).write_text(json.dumps({key: f"text of {name}"}))
    given = ["a.jsonl=content", f"{tmp_path}/*n/c.jsonl=story", "*.jsonl=body", "words", "d.jsonl=never"]
    arguments = ["--input", str(tmp_path), "--output", str(tmp_path / "out")]
    keys = [part for key in (*given[:3], "unused") for part in ("--text-key", key)]
    settings, _ = parse_prepare([*arguments, "--validation-fraction", "0.3", *keys], None)
    assert settings.text_key == "unused"
    assert prepare(settings).problems.counts == {"no text under 'body'": 1}  # in d.jsonl
    assert all_texts(tmp_path / "out") == ["text of a.jsonl", "text of b.jsonl", "text of lang=en/c.jsonl"]
    with pytest.raises(ConfigError, match=r"--text-key: x\.jsonl=k matches none of the input files"):
        prepare(config(tmp_path / "*.jsonl", tmp_path / "other", text_keys=[("x.jsonl", "k")]))
    with pytest.raises(ConfigError, match=r"--text-key: x= has no key; give PATTERN=KEY"):
        prepare(config(tmp_path / "*.jsonl", tmp_path / "other", text_keys=[("x", "")]))
