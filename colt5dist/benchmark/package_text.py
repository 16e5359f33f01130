"""Text for benchmarks that learn: the Python sources of packages, as documents, and as questions with their answers.

A package is one document, its files one after the other: a long one, and held out as a whole or not at all. The
questions on a package (data/inputs/source_questions.py) are held out with its document.
"""

import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path

import torch

from colt5dist.benchmark.step import with_children_ended
from colt5dist.data import open_shards
from colt5dist.data.inputs.pairs import Pair
from colt5dist.data.inputs.source_questions import SENTENCE_END, questions
from colt5dist.data.read.token_reader import TokenReader
from colt5dist.errors import ConfigError
from colt5dist.packaged import SCRIPTS

HELD_OUT_SHARE = 0.05
LONGEST_SOURCE = 400_000
"""Most bytes of a file on which questions are asked: longer ones are tables, and take long."""
FIRST_TOKENS = 200
"""Tokens of a document in which its first line ends."""


def default_text() -> list[str]:
    """Return the folders of all packages that this Python finds installed."""
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(Path(torch.__file__).parents[1])}
    return sorted(folders)


def package_files(places: Iterable[str]) -> Iterator[tuple[str, str, bytes]]:
    """Yield the package, the path in its folder, and the content of each file, ordered by package and path.

    A package is what has one name in a given folder, or at the first wildcard of a pattern. Left out are empty files,
    those that are no UTF-8, copies of earlier ones, and folders of vendored packages.

    Args:
        places: folders, of which the files *.py are taken, files, and patterns; ** is any number of folders.
    """
    files: dict[Path, tuple[str, str]] = {}
    for place in map(os.path.expanduser, places):
        if os.path.lexists(place):
            base = Path(place) if os.path.isdir(place) else Path(place).parent
            names: Iterable[Path] = base.rglob("*.py") if os.path.isdir(place) else [Path(place)]
        else:
            base = Path(*takewhile(lambda part: not glob.has_magic(part), Path(place).parts))
            names = map(Path, glob.glob(place, recursive=True))
        for path in names:
            inside = path.relative_to(base)
            if path.is_file() and not any("vendor" in part for part in inside.parts[:-1]):
                package = inside.parts[0] if len(inside.parts) > 1 else inside.stem
                files.setdefault(path.resolve(), (package, str(inside)))
    seen: set[bytes] = set()
    for path, (package, inside_package) in sorted(files.items(), key=lambda item: item[1]):
        try:
            content = path.read_bytes()
            content.decode()
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.sha256(content).digest()
        if content.strip() and digest not in seen:
            seen.add(digest)
            yield package, inside_package, content


def write_packages(places: Iterable[str], folder: Path) -> int:
    """Write one text file per package, each of its files after a comment with its path.

    Args:
        places: as of `package_files`.
        folder: where to write; it must not be there yet, and appears when it is whole.

    Returns:
        The number of bytes written.

    Raises:
        ConfigError: no text was found.
    """
    places = list(places)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    size = 0
    for package, inside_package, content in package_files(places):
        with open(partial / f"{package}.txt", "ab") as file:
            size += file.write(f"# {inside_package}\n".encode() + content + b"\n")
    if not size:
        raise ConfigError(f"--text: {' '.join(places)} holds no text; give folders or patterns of text files")
    partial.rename(folder)
    return size


def make_shards(patterns: Sequence[str], vocabulary: int | None, output: Path, deadline: float) -> Path | None:
    """Return the folder of the shards, made from the packages if it is not there; None if the time was up.

    Args:
        patterns: as the places of `package_files`.
        vocabulary: ids of the tokenizer that is trained; None: the tokens are bytes.
        output: folder of the text and the shards.
        deadline: when to stop, in seconds of `time.monotonic`.

    Raises:
        ConfigError: they cannot be made.
    """
    shards, text = output / "shards", output / "text"
    if shards.exists():
        return shards
    if not text.exists():
        print(f"text of {write_packages(patterns, text) / 1e6:,.1f} MB in {text}", flush=True)
    options = ["--validation-fraction", str(HELD_OUT_SHARE)]
    options += [] if vocabulary is None else ["--train-tokenizer", str(vocabulary)]
    workers = str(min(8, len(os.sched_getaffinity(0)) - 1))
    command = [sys.executable, str(SCRIPTS / "prepare.py"), "--input", str(text), "--output", str(shards)]
    process = subprocess.Popen([*command, *options, "--workers", workers], start_new_session=True)
    try:
        status = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        with_children_ended(process)  # it may be ended at any moment; the same command continues
    if status:
        raise ConfigError(f"{shards}: launch/prepare.py ended with status {status}; its lines above say why")
    return shards


def held_out_packages(shards: Path) -> set[str]:
    """Return the names of the packages whose documents are held out, by the comment with which each begins.

    Args:
        shards: a folder that `make_shards` made.
    """
    held_out = open_shards(str(shards)).validation
    reader = TokenReader(held_out, cache_bytes=1 << 24)
    names, start = set(), 0
    for end in held_out.index.document_ends.tolist():
        line = held_out.tokenizer.decode(reader.read(start, min(end, start + FIRST_TOKENS)).tolist()).split("\n")[0]
        names.add(package_of(line.removeprefix("# ")))
        start = end
    return names


def package_of(path: str) -> str:
    """Return the name of the package of a path in its folder."""
    return path.split("/", maxsplit=1)[0].removesuffix(".py")


def write_questions(places: Iterable[str], held_out: set[str], folder: Path, num_held_out: int) -> None:
    """Write the questions on all packages as `train.jsonl` and `held_out.jsonl`, objects with `input` and `output`.

    Held out are questions whose answer is that of no training question; a hash chooses and orders them.

    Args:
        places: as of `package_files`.
        held_out: names of the packages whose questions are held out.
        folder: where to write; it must not be there yet, and appears when it is whole.
        num_held_out: most questions that are held out.

    Raises:
        ConfigError: there are no questions, or none that is held out.
    """
    pairs: dict[bool, list[Pair]] = {False: [], True: []}
    for package, inside_package, content in package_files(places):
        if content.isascii() and len(content) <= LONGEST_SOURCE and inside_package.endswith(".py"):
            module = inside_package.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            try:
                pairs[package in held_out].extend(questions(module, content.decode()))
            except RecursionError:  # of Python's parser, on expressions that nest deeply
                continue
    known = {pair.target for pair in pairs[False]}
    asked = [pair for pair in pairs[True] if pair.target not in known]
    asked.sort(key=lambda pair: hashlib.sha256(pair.input.encode()).digest())
    if not known or not asked:
        which = "held-out questions" if known else "questions"
        raise ConfigError(f"--text: there are no {which} on it; give more packages with docstrings")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, chosen in {"train": pairs[False], "held_out": asked[:num_held_out]}.items():
        lines = (json.dumps({"input": pair.input, "output": pair.target}) + "\n" for pair in chosen)
        (partial / f"{name}.jsonl").write_text("".join(lines))
    partial.rename(folder)


DOCSTRING = re.compile(r'^\s*(?:async def|def|class) \w+[^"]*?:\s*\n\s*[rR]?"""\s*([^"\n]*)', re.MULTILINE)
"""That of a definition: the source may begin within a docstring, whose end looks like a beginning."""


def first_docstring(text: str) -> str:
    """Return the first sentence of the first docstring of a question's source: an answer that needs no model."""
    found = DOCSTRING.search(text.partition("\n\n")[2])
    line = found.group(1).strip() if found else ""
    end = SENTENCE_END.search(line)
    return line[: end.start()] if end else line
