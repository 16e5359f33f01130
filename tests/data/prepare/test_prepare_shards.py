"""From files to shards: inputs, errors counted, restart after a kill at any point, the same bytes."""

import gzip
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from colt5dist.data.inputs.documents import Problems
from colt5dist.data.inputs.files import find_inputs
from colt5dist.data.manifest import Manifest
from colt5dist.data.prepare.held_out_split import CorpusWriter
from colt5dist.data.prepare.prepare import prepare
from colt5dist.data.prepare.settings import PrepareConfig
from colt5dist.data.read.shards import open_shards
from colt5dist.data.read.token_reader import TokenReader
from colt5dist.errors import ConfigError
from colt5dist.files import locked


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, make_text: Callable[[random.Random, int], str]) -> Path:
    """Text and jsonl files, plain and gzipped, with all kinds of errors in them."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = random.Random(0)
    (folder / "sub").mkdir()
    for number in range(6):
        (folder / "sub" / f"{number}.txt").write_text(make_text(rng, 150_000 if number == 3 else 9000))
    lines = [json.dumps({"text": make_text(rng, rng.randint(1, 9000)), "id": number}) for number in range(60)]
    bad = [
        "{broken",
        "[1, 2]",
        '{"text": 5}',
        '{"other": "x"}',
        '{"text": "  "}',
        '{"text": "\\ud800"}',
        "",
        "nul\x00l",
    ]
    for number, line in enumerate(bad):
        lines.insert(5 + 7 * number, line)
    content = "\n".join(lines).encode() + b'\n{"text": "\xff"}\n'
    (folder / "a.jsonl").write_bytes(content)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(content.replace(b'"id"', b'"nr"').replace(b"abc", b"cba")))
    (folder / "cut.jsonl.gz").write_bytes(
        gzip.compress(b'{"text": "a document before the cut"}\n' * 3 + content)[:3000]
    )
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "nothing.txt").write_bytes(b"")
    (folder / "marked.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfafter a byte order mark"))
    return folder


def config(inputs: Path, out: Path, **changes: object) -> PrepareConfig:
    """Settings that read all inputs."""
    patterns = [str(inputs / "**/*.txt"), str(inputs / "*.jsonl"), str(inputs / "*.gz")]
    settings = {"input": patterns, "output": out, "shard_bytes": 1 << 20, "validation_fraction": 0.1, **changes}
    return PrepareConfig(**settings)  # type: ignore[arg-type]


def hashes(folder: Path) -> dict[str, str]:
    """Name and hash of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without interruption."""
    output = tmp_path_factory.mktemp("undisturbed") / "shards"
    prepare(config(inputs, output))
    return output


def test_all_documents_are_there(inputs: Path, undisturbed: Path) -> None:
    """Every good document is in one of the two sets, and nothing else."""
    expected = [path.read_text() for path in sorted((inputs / "sub").glob("*.txt"))] + ["after a byte order mark"]
    for name in ("a.jsonl", "b.jsonl.gz"):
        content = (inputs / name).read_bytes()
        for line in (gzip.decompress(content) if name.endswith(".gz") else content).split(b"\n"):
            try:
                text = json.loads(line)["text"]
                expected += [text] if text.encode().strip() else []
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
    found = []
    shards = open_shards(undisturbed)
    for part in (shards, shards.validation):
        reader, begin = TokenReader(part, cache_bytes=1 << 20), 0
        for end in part.index.document_ends.tolist():
            found.append(part.tokenizer.decode(reader.read(begin, end)))
            begin = end
    cut = [text for text in found if text == "a document before the cut"]
    assert len(cut) == 3
    # the truncated file gives the text before its end, which is the beginning of a.jsonl again
    assert set(found) - set(cut) == set(expected) and len(found) >= len(expected) + 3
    names = set(hashes(undisturbed))
    assert names == {
        f"{folder}{name}"
        for folder in ("", "validation/")
        for name in ("manifest.json", "000000.tar", "index/members.bin", "index/documents.bin", "index/checksums.bin")
    } | {name for name in names if name.endswith(".tar")}


def test_errors_are_counted_by_kind(inputs: Path, tmp_path: Path) -> None:
    """Each kind, with the file and line of the first few."""
    prepared = prepare(config(inputs, tmp_path / "shards"))
    problems = prepared.problems
    whole = prepare(config(inputs, tmp_path / "whole", input=[str(inputs / "a.jsonl")])).problems
    assert whole.counts == {"not JSON": 2, "no text under 'text'": 3, "empty": 1, "not UTF-8": 2}
    assert whole.examples["not JSON"] == [f"{inputs / 'a.jsonl'}:6", f"{inputs / 'a.jsonl'}:55"]
    assert problems.counts["unreadable"] == 1 and problems.counts["not UTF-8"] == 5
    assert str(inputs / "latin.txt") in problems.examples["not UTF-8"]
    assert str(inputs / "nothing.txt") in problems.examples["empty"]
    assert len(problems.examples["no text under 'text'"]) == 5 < problems.counts["no text under 'text'"]
    assert prepared.manifest.source["left_out"] == problems.counts
    assert any(line.startswith("left out, unreadable: 1 (") for line in problems.lines())
    # the second call finds the finished folder
    again = prepare(config(inputs, tmp_path / "shards"))
    assert again.was_there and again.manifest == prepared.manifest and again.problems.counts == problems.counts


def test_strict_stops_at_the_first_error(inputs: Path, tmp_path: Path) -> None:
    """The error names file and line; without --strict the same folder is resumed."""
    with pytest.raises(ConfigError, match=r"a\.jsonl:6: is not JSON"):
        prepare(config(inputs, tmp_path / "shards", strict=True))
    assert not (tmp_path / "shards").exists()
    assert prepare(config(inputs, tmp_path / "shards")).problems.counts["unreadable"] == 1


def killed(work: Callable[[], object], arm: Callable[[Callable[[], None]], object]) -> bool:
    """Run `work` in a separate process, which a trap set by `arm` may kill; return whether it was killed."""

    def child() -> None:
        arm(lambda: os.kill(os.getpid(), signal.SIGKILL))
        work()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.parametrize("step", [40, 150, 400])
def test_killed_and_started_again(inputs: Path, undisturbed: Path, tmp_path: Path, step: int) -> None:
    """Killed after every few calls that write to disk, the result is that of a run without interruption."""
    output = tmp_path / "shards"
    kills = 0

    def arm(kill: Callable[[], None]) -> None:
        calls, fsync = [0], os.fsync

        def counted(descriptor: int) -> None:
            calls[0] += 1
            if calls[0] == step + kills:
                kill()
            fsync(descriptor)

        os.fsync = counted  # type: ignore[assignment]

    # the state is saved after every document; each start gets a little further, since the end is not divided
    while killed(lambda: prepare(config(inputs, output, commit_seconds=0)), arm):
        assert not output.exists()
        kills += 1
    assert kills >= 2
    assert hashes(output) == hashes(undisturbed)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("place", ["validation manifest", "manifest", "rename", "after"])
def test_killed_at_the_end(inputs: Path, undisturbed: Path, tmp_path: Path, place: str) -> None:
    """While the manifests are written and the folder is renamed."""
    output = tmp_path / "shards"

    def arm(kill: Callable[[], None]) -> None:
        write, rename = Manifest.write, os.rename
        written: list[Path] = []

        def write_manifest(self: Manifest, folder: Path) -> None:
            written.append(folder)
            if place == ("validation manifest", "manifest")[len(written) - 1]:
                kill()
            write(self, folder)

        def rename_folder(old: Path, new: Path) -> None:
            if place == "rename" and Path(new) == output:
                kill()
            rename(old, new)
            if place == "after" and Path(new) == output:
                kill()

        Manifest.write = write_manifest  # type: ignore[method-assign]
        os.rename = rename_folder  # type: ignore[assignment]

    assert killed(lambda: prepare(config(inputs, output, commit_seconds=0.01)), arm)
    assert output.exists() == (place == "after")
    assert prepare(config(inputs, output)).was_there == (place == "after")
    assert hashes(output) == hashes(undisturbed)


def test_a_tokenizer_file(inputs: Path, tmp_path: Path) -> None:
    """The ids are the tokenizer's, and a copy of it is with the shards."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator([path.read_text() for path in (inputs / "sub").glob("*.txt")], trainer)
    backend.save(str(tmp_path / "t.json"))
    prepare(config(inputs, tmp_path / "shards", input=[str(inputs / "sub/*.txt")], tokenizer=tmp_path / "t.json"))
    shards = open_shards(tmp_path / "shards")
    assert (tmp_path / "shards/tokenizer.json").read_bytes() == (tmp_path / "t.json").read_bytes()
    assert shards.tokenizer.vocab_size == 400 and shards.num_tokens < 100_000
    texts = {path.read_text() for path in (inputs / "sub").glob("*.txt")}
    first = TokenReader(shards, cache_bytes=1).read(0, int(shards.index.document_ends[0]))
    assert shards.tokenizer.decode(first) in texts


def test_wrong_inputs_are_named(inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Each is one line with the argument and how to fix it, and leaves no files behind."""
    for name in ("table.pdf", "table.parquet.gz", "other/table.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"PAR1")
    (tmp_path / "empty.jsonl").write_text("\n\n{}\n")
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep this")
    wrong: list[tuple[dict[str, object], str]] = [
        ({"input": [str(tmp_path / "*.none")]}, r"--input: .* matches no file; give text or jsonl files"),
        ({"input": [str(tmp_path / "m*")]}, r"--input: .* matches no file; give its files, for instance as .*\*\.txt"),
        ({"input": [str(tmp_path / "other")]}, r"--input: .* holds no file of a supported kind \(\.txt, .*\)"),
        ({"input": [str(tmp_path / "*.pdf")]}, r"--input: .*table\.pdf is a \.pdf file; give text, jsonl or parquet"),
        ({"input": [str(tmp_path / "*.gz")]}, r"--input: .*table\.parquet\.gz is a compressed parquet file"),
        (
            {"tokenizer": tmp_path / "t.json", "train_tokenizer": 300},
            "--train-tokenizer: cannot be used with --tokenizer",
        ),
        ({"train_tokenizer": 258}, "--train-tokenizer: 258 ids are too few; give 259 or more"),
        ({"workers": -1}, "--workers: -1 is negative"),
        (
            {"input": [str(tmp_path / "*.jsonl")]},
            r"--input: no document in 1 file; left out, no text under 'text': 1",
        ),
        ({"tokenizer": tmp_path / "none.json"}, r"none\.json: cannot be read"),
        ({"validation_fraction": 0.0}, "--validation-fraction: 0.0 is out of range"),
        ({"validation_fraction": float("nan")}, "--validation-fraction: nan is out of range"),
        ({"shard_bytes": 10}, "--shard-bytes: 10 is too small"),
        ({"text_key": "caf\udce9"}, "--text-key: 'caf.*' is not UTF-8"),
        ({"output": tmp_path / "mine"}, "--output: .*mine exists and holds no shards"),
        ({"output": tmp_path / "file"}, "--output: .*file exists and holds no shards"),
        ({"output": tmp_path / "file/below"}, "--output: .* cannot be written"),
        ({"output": undisturbed, "validation_fraction": 0.2}, "--output: .* holds shards of other inputs or settings"),
    ]
    for changes, message in wrong:
        with pytest.raises(ConfigError, match=message) as error:
            prepare(config(inputs, tmp_path / "shards", **changes))
        assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.partial")) and (tmp_path / "mine/notes.txt").read_text() == "keep this"


def test_begun_work_is_not_mixed_with_other_work(inputs: Path, tmp_path: Path) -> None:
    """Other settings do not resume a partial folder, and two processes do not write the same one."""
    with pytest.raises(ConfigError):
        prepare(config(inputs, tmp_path / "shards", strict=True, commit_seconds=0))
    with pytest.raises(ConfigError, match="was begun with other inputs or settings"):
        prepare(config(inputs, tmp_path / "shards", text_key="id"))
    state = tmp_path / "shards.partial/state.json"
    begun = state.read_text()
    state.write_text(json.dumps(json.loads(begun) | {"format": 1}))
    with pytest.raises(ConfigError, match="was begun by another version of colt5dist; delete it"):
        prepare(config(inputs, tmp_path / "shards", strict=True, commit_seconds=0))
    state.write_text(begun)
    with (
        locked(tmp_path / "shards.partial/lock", wait=False),
        pytest.raises(ConfigError, match="is being written by another prepare"),
    ):
        prepare(config(inputs, tmp_path / "shards"))
    prepare(config(inputs, tmp_path / "shards"))


def test_inputs_are_listed_once_in_one_order(inputs: Path) -> None:
    """Overlapping patterns do not double a file; the order does not depend on that of the patterns."""
    patterns = [str(inputs / "**/*"), str(inputs / "*.jsonl"), str(inputs / "sub/*.txt")]
    files = find_inputs(patterns).files
    assert [file.name for file in files] == [file.name for file in find_inputs(patterns[::-1]).files]
    assert len(files) == len({file.path for file in files}) == 12
    assert [file.name for file in files[:2]] == ["a.jsonl", "b.jsonl.gz"]


def test_problem_lines_without_places() -> None:
    """A finished folder stores how many were left out, but not where."""
    assert Problems(counts={"empty": 3}).lines() == ["left out, empty: 3"]


def test_other_text_of_the_same_name_and_size_is_other_work(inputs: Path, tmp_path: Path) -> None:
    """The inputs of a finished folder are recognized by content, not only by names and sizes."""
    text = tmp_path / "x.txt"
    text.write_text("a" * 20_000)
    prepare(config(inputs, tmp_path / "shards", input=[str(text)]))
    text.write_text("b" * 20_000)
    with pytest.raises(ConfigError, match="holds shards of other inputs or settings"):
        prepare(config(inputs, tmp_path / "shards", input=[str(text)]))


def test_shards_among_the_inputs_are_no_text(inputs: Path, tmp_path: Path) -> None:
    """The same command twice, with its output and the shards of another tokenizer inside the pattern."""
    (tmp_path / "a.txt").write_text("some text " * 5000)
    everything = [str(tmp_path / "**" / "*")]
    one = prepare(config(inputs, tmp_path / "one", input=everything))
    assert prepare(config(inputs, tmp_path / "one", input=everything)).was_there
    two = prepare(config(inputs, tmp_path / "two", input=everything))
    assert two.manifest.documents == one.manifest.documents and two.manifest.tokens == one.manifest.tokens


def test_links_and_archives(inputs: Path, tmp_path: Path) -> None:
    """A link to a file that is read already adds nothing; an archive is refused; zero bytes mean a binary file."""
    (tmp_path / "a.txt").write_text("some text " * 5000)
    (tmp_path / "zeros.txt").write_text("some\0text")
    (tmp_path / "loop").symlink_to(tmp_path)
    files = find_inputs([str(tmp_path / "**" / "*.txt")]).files
    assert [file.name for file in files] == ["a.txt", "zeros.txt"]
    done = prepare(config(inputs, tmp_path / "shards", input=[str(tmp_path / "*.txt")]))
    assert done.problems.counts == {"binary": 1}
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"a\.tar\.gz is a"):
        find_inputs([str(tmp_path / "*.gz")])


def test_a_name_that_is_not_utf_8(inputs: Path, tmp_path: Path) -> None:
    """It is read, and printed if it has a problem."""
    folder = os.fsencode(tmp_path / "in")
    os.mkdir(folder)
    for name, content in ((b"caf\xe9.txt", b"some text " * 5000), (b"bad\xe9.txt", b"\xff")):
        Path(os.fsdecode(os.path.join(folder, name))).write_bytes(content)
    done = prepare(config(inputs, tmp_path / "shards", input=[str(tmp_path / "in" / "*.txt")]))
    assert done.problems.counts == {"not UTF-8": 1}
    assert r"bad\udce9.txt" in done.problems.lines()[0]


def test_a_tokenizer_that_cannot_encode_is_named(inputs: Path, tmp_path: Path) -> None:
    """A WordLevel model without an unknown token raises at the first word it does not know."""
    path = tmp_path / "words.json"
    tokenizers.Tokenizer(models.WordLevel({"known": 0}, unk_token="[UNK]")).save(str(path))
    with pytest.raises(ConfigError, match=r"words\.json: cannot encode every text"):
        prepare(config(inputs, tmp_path / "shards", tokenizer=path))


def test_strict_is_not_answered_by_a_folder_that_left_documents_out(inputs: Path, tmp_path: Path) -> None:
    prepare(config(inputs, tmp_path / "shards"))
    with pytest.raises(ConfigError, match="was made without --strict; left out"):
        prepare(config(inputs, tmp_path / "shards", strict=True))


def test_output_that_cannot_be_renamed_to(inputs: Path) -> None:
    with pytest.raises(ConfigError, match="--output: / cannot be made"):
        prepare(config(inputs, Path("/")))


def test_strict_goes_on_from_nothing_that_left_documents_out(inputs: Path, tmp_path: Path) -> None:
    """Neither from a state that was saved without --strict, nor by renaming a finished partial folder."""

    def stop(done: int, total: int, writer: CorpusWriter) -> None:
        raise KeyboardInterrupt

    bad = [str(inputs / "latin.txt"), str(inputs / "sub/*.txt")]
    begun = config(inputs, tmp_path / "shards", input=bad, commit_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        prepare(begun, stop)
    with pytest.raises(ConfigError, match=r"shards\.partial was made without --strict; left out, not UTF-8: 1"):
        prepare(config(inputs, tmp_path / "shards", input=bad, strict=True))
    assert prepare(config(inputs, tmp_path / "shards", input=bad)).problems.counts == {"not UTF-8": 1}
    os.rename(tmp_path / "shards", tmp_path / "shards.partial")  # as if killed just before it got its name
    with pytest.raises(ConfigError, match=r"shards\.partial was made without --strict; left out, not UTF-8: 1"):
        prepare(config(inputs, tmp_path / "shards", input=bad, strict=True))


def test_a_strict_stop_is_fixed_as_its_message_says(inputs: Path, tmp_path: Path) -> None:
    """After fixing the file and deleting the partial folder, the same command works."""
    text = tmp_path / "in.jsonl"
    text.write_text('{"text": "one"}\n{"text": \n')
    strict = config(inputs, tmp_path / "shards", input=[str(text)], strict=True, commit_seconds=0)
    with pytest.raises(ConfigError, match=r"in\.jsonl:2: is not JSON; fix the file and delete .*/shards\.partial"):
        prepare(strict)
    text.write_text('{"text": "one"}\n{"text": "two"}\n')
    with pytest.raises(ConfigError, match="was begun with other inputs"):
        prepare(strict)
    shutil.rmtree(tmp_path / "shards.partial")
    assert sum(part.documents for part in (prepare(strict).manifest, prepare(strict).validation)) == 2


def test_what_an_unsaved_start_left_is_not_taken_over(inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    """A start that was killed before it saved its state may have had other inputs and written more."""
    (tmp_path / "shards.partial/validation").mkdir(parents=True)
    for name in ("lock", "000007.tar", "waiting-0", "validation/000003.tar"):
        (tmp_path / "shards.partial" / name).write_text("old")
    prepare(config(inputs, tmp_path / "shards"))
    assert hashes(tmp_path / "shards") == hashes(undisturbed)


def test_the_name_of_the_begun_folder_is_taken(inputs: Path, tmp_path: Path) -> None:
    """A folder that prepare did not make is neither emptied nor used."""
    (tmp_path / "shards.partial").mkdir()
    (tmp_path / "shards.partial/notes.txt").write_text("keep this")
    with pytest.raises(ConfigError, match=r"shards\.partial is needed, and holds something else"):
        prepare(config(inputs, tmp_path / "shards"))
    assert (tmp_path / "shards.partial/notes.txt").read_text() == "keep this"


def test_a_single_token_leaves_nothing_behind(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match="holds a single token"):
        prepare(config(inputs, tmp_path / "shards", input=[str(tmp_path / "a.txt")]))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_output_that_is_a_link(inputs: Path, tmp_path: Path) -> None:
    """The shards are written to its target."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    prepare(config(inputs, tmp_path / "link", input=[str(inputs / "sub/*.txt")]))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk/manifest.json").exists()


def test_output_that_is_a_mount_point(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before anything is written, not when the finished folder cannot be renamed."""
    monkeypatch.setattr(Path, "is_mount", lambda self: self == tmp_path / "disk")
    with pytest.raises(ConfigError, match=r"--output: .*/disk cannot be made by renaming"):
        prepare(config(inputs, tmp_path / "disk"))
    assert not list(tmp_path.iterdir())


def test_inputs_that_are_no_text_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe, an empty pattern, shards, an archive, a folder without permission: each message says how to fix it."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/manifest.json").write_text('{\n "format": "colt5dist shards",\n')
    (tmp_path / "shards/readme.txt").write_text("text")
    (tmp_path / "a.tar.GZ").write_bytes(b"")
    (tmp_path / "b.tgz").write_bytes(b"")
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed/a.txt").write_text("text")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for pattern, message in [
        (str(tmp_path / "pipe"), "matches no file, .*/pipe is a pipe or device; write its output to a file"),
        ("", "--input: '' is an empty pattern; give text or jsonl files"),
        (str(tmp_path / "shards/*"), "matches only shards; give the text that they were made from"),
        (str(tmp_path / "*.GZ"), r"a\.tar\.GZ is a \.tar file"),
        (str(tmp_path / "*.tgz"), r"b\.tgz is a \.tgz file"),
        (str(tmp_path / "nowhere"), "matches no file; give text or jsonl files"),
    ]:
        with pytest.raises(ConfigError, match=message):
            find_inputs([pattern])
    look = os.stat

    def refuse(path: str, **settings: bool) -> os.stat_result:
        if os.fspath(path).endswith("closed/a.txt"):
            raise PermissionError(13, "Permission denied", path)
        return look(path, **settings)

    monkeypatch.setattr("colt5dist.data.inputs.files.os.stat", refuse)
    with pytest.raises(ConfigError, match=r"--input: .*closed/a\.txt cannot be read \(Permission denied\); fix"):
        find_inputs([str(tmp_path / "closed/*")])


def test_the_progress_is_told_now_and_then(inputs: Path, tmp_path: Path) -> None:
    """The progress is reported at most ten times per second."""
    (tmp_path / "many.jsonl").write_text('{"text": "a document"}\n' * 3000)
    told: list[int] = []
    many = config(inputs, tmp_path / "shards", input=[str(tmp_path / "many.jsonl")])
    start = time.monotonic()
    prepare(many, lambda done, total, writer: told.append(done))
    assert 1 <= len(told) <= 10 * (time.monotonic() - start) + 1
