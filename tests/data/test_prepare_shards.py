"""From files to shards: inputs, errors counted, restart after a kill at any point, the same bytes."""

import gzip
import hashlib
import json
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from colt5dist.data.documents import Problems, find_inputs
from colt5dist.data.manifest import Manifest
from colt5dist.data.prepare import PrepareConfig, prepare
from colt5dist.data.shards import open_shards
from colt5dist.data.stream import TokenReader
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
    """The folder of a run that nothing disturbed."""
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
    # the cut file gives what stands before the cut, which is the beginning of a.jsonl again
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
    """The error names file and line; without --strict the same folder goes on."""
    with pytest.raises(ConfigError, match=r"a\.jsonl:6: is not JSON"):
        prepare(config(inputs, tmp_path / "shards", strict=True))
    assert not (tmp_path / "shards").exists()
    assert prepare(config(inputs, tmp_path / "shards")).problems.counts["unreadable"] == 1


def killed(work: Callable[[], object], arm: Callable[[Callable[[], None]], object]) -> bool:
    """Run `work` in a process of its own, where what `arm` sets up may kill it; whether it was killed."""

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
    """Killed after every so many calls that bring bytes to the disk, the result is that of an undisturbed run."""
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

    # the state is saved after every document; each start gets a little further, as the end must be reached in one go
    while killed(lambda: prepare(config(inputs, output, commit_seconds=0)), arm):
        assert not output.exists()
        kills += 1
    assert kills >= 2
    assert hashes(output) == hashes(undisturbed)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("place", ["validation manifest", "manifest", "rename", "after"])
def test_killed_at_the_end(inputs: Path, undisturbed: Path, tmp_path: Path, place: str) -> None:
    """While the manifests are written and the folder gets its name."""
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
    """The ids are the tokenizer's, and its copy lies with the shards."""
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
    """Each is one line with the argument and the mend, and leaves nothing behind."""
    (tmp_path / "table.parquet").write_bytes(b"PAR1")
    (tmp_path / "empty.jsonl").write_text("\n\n{}\n")
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep this")
    wrong: list[tuple[dict[str, object], str]] = [
        ({"input": [str(tmp_path / "*.none")]}, r"--input: .* matches no file; name text or jsonl files"),
        ({"input": [str(inputs)]}, r"--input: .* matches no file; give its files, as .*\*\.txt"),
        ({"input": [str(tmp_path / "*.parquet")]}, r"--input: .*table\.parquet is a \.parquet file"),
        (
            {"input": [str(tmp_path / "*.jsonl")]},
            r"--input: 1 files hold no document; left out, no text under 'text': 1",
        ),
        ({"tokenizer": tmp_path / "none.json"}, r"none\.json: cannot be read"),
        ({"validation_fraction": 0.0}, "--validation-fraction: 0.0 is out of range"),
        ({"validation_fraction": float("nan")}, "--validation-fraction: nan is out of range"),
        ({"shard_bytes": 10}, "--shard-bytes: 10 is too small"),
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
    """Other settings do not go on from a partial folder, and two processes do not write one."""
    with pytest.raises(ConfigError):
        prepare(config(inputs, tmp_path / "shards", strict=True, commit_seconds=0))
    with pytest.raises(ConfigError, match="was begun with other inputs or settings"):
        prepare(config(inputs, tmp_path / "shards", text_key="id"))
    with (
        locked(tmp_path / "shards.partial/lock", wait=False),
        pytest.raises(ConfigError, match="is being written by another prepare"),
    ):
        prepare(config(inputs, tmp_path / "shards"))
    prepare(config(inputs, tmp_path / "shards"))


def test_inputs_are_listed_once_in_one_order(inputs: Path) -> None:
    """Overlapping patterns do not double a file; the order does not depend on that of the patterns."""
    patterns = [str(inputs / "**/*"), str(inputs / "*.jsonl"), str(inputs / "sub/*.txt")]
    files = find_inputs(patterns)
    assert [file.name for file in files] == [file.name for file in find_inputs(patterns[::-1])]
    assert len(files) == len({file.path for file in files}) == 12
    assert [file.name for file in files[:2]] == ["a.jsonl", "b.jsonl.gz"]


def test_problem_lines_without_places() -> None:
    """A finished folder knows how many were left out, but not where."""
    assert Problems(counts={"empty": 3}).lines() == ["left out, empty: 3"]


def test_other_text_of_the_same_name_and_size_is_other_work(inputs: Path, tmp_path: Path) -> None:
    """What a finished folder was made from is told by content, not by names and sizes."""
    text = tmp_path / "x.txt"
    text.write_text("a" * 20_000)
    prepare(config(inputs, tmp_path / "shards", input=[str(text)]))
    text.write_text("b" * 20_000)
    with pytest.raises(ConfigError, match="holds shards of other inputs or settings"):
        prepare(config(inputs, tmp_path / "shards", input=[str(text)]))


def test_shards_among_the_inputs_are_no_text(inputs: Path, tmp_path: Path) -> None:
    """The same command twice, with the output inside the pattern, and the shards of another tokenizer beside it."""
    (tmp_path / "a.txt").write_text("some text " * 5000)
    everything = [str(tmp_path / "**" / "*")]
    one = prepare(config(inputs, tmp_path / "one", input=everything))
    assert prepare(config(inputs, tmp_path / "one", input=everything)).was_there
    two = prepare(config(inputs, tmp_path / "two", input=everything))
    assert two.manifest.documents == one.manifest.documents and two.manifest.tokens == one.manifest.tokens


def test_links_and_archives(inputs: Path, tmp_path: Path) -> None:
    """A link that leads back does not double a file; an archive is refused; zeros mean a binary file."""
    (tmp_path / "a.txt").write_text("some text " * 5000)
    (tmp_path / "zeros.txt").write_text("some\0text")
    (tmp_path / "loop").symlink_to(tmp_path)
    files = find_inputs([str(tmp_path / "**" / "*.txt")])
    assert [file.name for file in files] == ["a.txt", "zeros.txt"]
    done = prepare(config(inputs, tmp_path / "shards", input=[str(tmp_path / "*.txt")]))
    assert done.problems.counts == {"binary": 1}
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"a\.tar\.gz is a"):
        find_inputs([str(tmp_path / "*.gz")])


def test_a_name_that_is_not_utf_8(inputs: Path, tmp_path: Path) -> None:
    """It is read, and printed where something is wrong with it."""
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
