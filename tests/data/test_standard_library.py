"""Shards of the standard library: made once, by any number of processes, from whatever this Python has."""

import multiprocessing
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from colt5dist.data import standard_library
from colt5dist.data.inputs.source_questions import questions
from colt5dist.data.read.shards import open_shards
from colt5dist.data.read.token_reader import TokenReader
from colt5dist.data.standard_library import (
    LARGEST,
    SMALLEST,
    STANDARD_LIBRARY_PAIRS,
    cache_folder,
    ensure_standard_library_shards,
    make_documents,
    read_sources,
)
from colt5dist.errors import ConfigError

DOCSTRING = re.compile(r"""["']{1,3}\s*([^.\n"']*)""")
"""The first sentence of a text in quotes."""


def test_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several processes at once get the same folder, and it is not made again."""
    monkeypatch.setenv("COLT5DIST_CACHE", str(tmp_path))
    with multiprocessing.get_context("fork").Pool(3) as pool:
        folders = [pool.apply_async(ensure_standard_library_shards) for _ in range(3)]
        (folder,) = {result.get() for result in folders}
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder]
    before = (folder / "manifest.json").stat()
    assert ensure_standard_library_shards() == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == before.st_mtime_ns

    shards = open_shards(folder)
    lengths = np.diff(shards.index.document_ends, prepend=0)
    # characters are counted when documents are cut, and a few take more than a byte
    assert shards.num_tokens > 5_000_000 and lengths.max() <= 1.2 * LARGEST
    assert np.mean(lengths >= SMALLEST) > 0.99 and np.median(lengths) > 4 * SMALLEST
    assert shards.validation.num_documents >= 4
    assert 0.01 < shards.validation.num_tokens / shards.num_tokens < 0.1
    assert len(shards.manifest.source["sha256"]) == len(read_sources())
    # other sources give other shards
    sources = {"a.py": b"x = 1\n" * 3000, "b.py": b"y = 1\n" * 3000}
    monkeypatch.setattr(standard_library, "read_sources", lambda: sources)
    assert ensure_standard_library_shards() != folder


def test_documents_hold_all_sources() -> None:
    """Joining and splitting loses and repeats nothing; lines are not split."""
    sources = {
        "big.py": b"line of code\n" * 20_000,
        "package/a.py": b"a = 1\n" * 4000,
        "package/b.py": b"b = 1\n" * 4000,
        "package/c.py": b"c = 1\n" * 4000,
        "small.py": b"s = 1\n" * 10,
        "tiny/__init__.py": b"t = 1\n",
    }
    documents = list(make_documents(sources))
    text = b"".join(sources.values()).decode()
    ours = [document for document in documents if document.splitlines()[0] in set(text.splitlines())]
    assert sorted("".join(ours).splitlines()) == sorted(text.splitlines())
    # 260,000 characters in four parts; two files of the package, then its third; what is short together
    assert [document[:1] for document in ours] == ["l"] * 4 + ["a", "c", "s"]
    assert max(map(len, documents)) <= LARGEST


def test_questions_have_their_answers_in_the_source(shard_cache: Path) -> None:
    """Once, after the definition that the question names; and the held-out packages are others."""
    folder = ensure_standard_library_shards(STANDARD_LIBRARY_PAIRS)
    assert folder.parent == shard_cache and folder.name.startswith("python-stdlib-pairs-")
    shards = open_shards(folder)
    packages, targets, lengths, right = [], [], [], np.zeros(2)
    for part in (shards, shards.validation):
        assert part.manifest.holds_pairs
        packages.append(set())
        ids = TokenReader(part, cache_bytes=1 << 26).read(0, part.num_tokens)
        for document in np.split(ids, part.index.document_ends[:-1])[::3]:
            place = int((document == part.tokenizer.eos_id).argmax())
            given, target = (part.tokenizer.decode(side) for side in (document[:place], document[place + 1 :]))
            question, shown = given.split("\n\n", maxsplit=1)
            name = question.removeprefix("What does ").removesuffix(" do?")
            assert place <= 2047 and shown.count(target) == 1 and target not in question
            assert re.findall(r"\b(?:def|class) (\w+)", shown).count(name.rsplit(".", maxsplit=1)[1]) == 1
            assert re.search(rf"\b(def|class) {name.rsplit('.', maxsplit=1)[1]}\b", shown[: shown.index(target)])
            packages[-1].add(name.split(".")[0])
            targets.append(target)
            lengths.append(place)
            places = 0, re.search(rf"\b(def|class) {name.rsplit('.', maxsplit=1)[1]}\b", shown).end()
            right += [said is not None and said[1] == target for said in (DOCSTRING.search(shown, p) for p in places)]
    assert len(lengths) > 700 and not packages[0] & packages[1]
    assert 0.05 < shards.validation.num_documents / (shards.num_documents + shards.validation.num_documents) <= 0.1
    assert np.median(lengths) > 1500
    # the commonest answer, the first docstring, and the first one after the definition that is asked for
    assert Counter(targets).most_common(1)[0][1] < 0.01 * len(targets)
    first, named = right / len(targets)
    assert first < 0.2 and named > 0.8


@pytest.mark.parametrize(
    ("source", "answers"),
    [
        ('def f():\n    """Return the first of them. And more."""\n', ["Return the first of them"]),
        ('class C:\n    def f(self):\n        """Return the first of them"""\n', ["Return the first of them"]),
        ('def f():\n    """Return the first of\n    them all."""\n', []),
        ('def f():\n    """Return these things:"""\n', []),
        ('def f():\n    """Return the first of them."""\n\ndef f():\n    pass\n', []),
        ('def f():\n    """Return the first of them."""\n    # Return the first of them\n', []),
        ("def f(:\n", []),
    ],
    ids=["sentence", "method", "two-lines", "colon", "defined-twice", "answer-twice", "no-python"],
)
def test_what_is_asked_for(source: str, answers: list[str]) -> None:
    assert [pair.target for pair in questions("m", source)] == answers


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """COLT5DIST_CACHE, then XDG_CACHE_HOME, then the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("COLT5DIST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / "home/.cache/colt5dist"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/colt5dist"
    monkeypatch.setenv("COLT5DIST_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_the_cache_folder_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder of this user for temporary files; one that belongs to somebody else is refused."""
    monkeypatch.setenv("HOME", "/proc/nowhere")
    monkeypatch.delenv("COLT5DIST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = cache_folder()
    assert folder == tmp_path / f"colt5dist-{os.getuid()}" and folder.stat().st_mode & 0o777 == 0o700
    assert cache_folder() == folder
    folder.rmdir()
    folder.symlink_to("/")  # another user's link, which leads to where this user would write
    monkeypatch.setattr("os.getuid", lambda: 54321)
    folder.rename(tmp_path / "colt5dist-54321")
    with pytest.raises(ConfigError, match=r"COLT5DIST_CACHE: .*colt5dist-54321 belongs to another user; set this"):
        cache_folder()


def test_what_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One line that names the variable to set."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COLT5DIST_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"COLT5DIST_CACHE: .* cannot be written"):
        ensure_standard_library_shards()


def test_a_python_without_sources_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A Python that keeps its library in an archive has no files to make shards from."""
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError, match=r"data\.shards: .* holds no sources"):
        ensure_standard_library_shards()


def test_a_source_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One line with the file, whatever the reason."""
    (tmp_path / "module.py").mkdir()
    (tmp_path / "package").mkdir()
    (tmp_path / "package/gone.py").symlink_to(tmp_path / "nowhere.py")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError, match=r"data\.shards: .*/gone\.py of Python's standard library cannot be read"):
        ensure_standard_library_shards()
