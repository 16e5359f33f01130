"""Shards of the running Python's own standard library: real, long documents that are on every machine.

The files of a package are joined, and long ones split between lines, into documents of about 4k to 64k bytes;
`pydoc_data.topics` adds English prose. Another set holds pairs: questions on the modules with their answers
(inputs/source_questions.py), of which those on some packages are held out. The shards are in a cache folder whose name
contains the hash of all sources.
"""

import errno
import hashlib
import os
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from platform import python_version

from colt5dist.data.inputs.pairs import Pair
from colt5dist.data.inputs.source_questions import ANSWER_CHARACTERS, INPUT_BYTES, questions
from colt5dist.data.manifest import FORMAT, VERSION
from colt5dist.data.prepare.held_out_split import CorpusWriter
from colt5dist.data.prepare.tokenize_texts import encode_document
from colt5dist.data.tokenizer import ByteTokenizer
from colt5dist.errors import ConfigError
from colt5dist.files import cache_folder, fsync_path, fsync_tree, locked, name_of_this_process

STANDARD_LIBRARY = "python-stdlib"
"""The value of data.shards that selects these shards."""
STANDARD_LIBRARY_PAIRS = "python-stdlib-pairs"
"""The value that selects the pairs."""
STANDARD_LIBRARIES = (STANDARD_LIBRARY, STANDARD_LIBRARY_PAIRS)

SMALLEST, LARGEST = 4 << 10, 64 << 10  # bytes per document
VALIDATION_FRACTION = 0.04
HELD_OUT_PAIRS = 0.1  # most of the pairs that are held out, in whole packages
PAIRS_VERSION = 1  # of the questions: another one makes other shards
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


def find_standard_library_shards(name: str = STANDARD_LIBRARY) -> Path | None:
    """Return the folder of the standard library's shards, if they have been made.

    Args:
        name: one of STANDARD_LIBRARIES.
    """
    output = _place(name, _hashes(read_sources()))
    return output if output.exists() else None


def ensure_standard_library_shards(name: str = STANDARD_LIBRARY) -> Path:
    """Return the folder of the standard library's shards; the first call makes them, which takes a few seconds.

    Any number of processes may call it at the same time. They are in `cache_folder()`.

    Args:
        name: one of STANDARD_LIBRARIES.

    Raises:
        ConfigError: this Python has no sources, or the cache folder cannot be written.
    """
    sources = read_sources()
    hashes = _hashes(sources)
    output = _place(name, hashes)
    cache = output.parent
    try:
        if output.exists():
            return output
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / f"{output.name}.lock", wait=True) as is_alone:
            if not output.exists():
                if is_alone:
                    for leftover in cache.glob(f"{output.name}.*partial"):  # of a process that was killed
                        shutil.rmtree(leftover, ignore_errors=True)
                _build(name, output, sources, hashes)
    except OSError as error:
        raise ConfigError(
            f"COLT5DIST_CACHE: {error.filename or cache} cannot be written ({error.strerror}); set this variable to "
            "another folder, or give data.shards"
        ) from None
    return output


def _hashes(sources: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in sources.items()}


def _place(name: str, hashes: dict[str, str]) -> Path:
    """The folder of the shards that are made from sources with these hashes."""
    settings = f"{SMALLEST} {LARGEST} {VALIDATION_FRACTION}"
    if name == STANDARD_LIBRARY_PAIRS:
        settings = f"pairs {PAIRS_VERSION} {INPUT_BYTES} {ANSWER_CHARACTERS} {HELD_OUT_PAIRS}"
    digest = hashlib.sha256(f"{FORMAT} {VERSION} {settings} {hashes}".encode()).hexdigest()
    return cache_folder() / f"{name}-{python_version()}-{digest[:16]}"


def read_sources() -> dict[str, bytes]:
    """Return name and content of the standard library's sources, with the files of a package next to each other.

    Raises:
        ConfigError: there are none, or one cannot be read.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in LEFT_OUT]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    if not paths:
        raise ConfigError(f"data.shards: {root} holds no sources of Python's standard library; give a folder of shards")
    try:
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(paths)}
    except OSError as error:
        raise ConfigError(
            f"data.shards: {error.filename} of Python's standard library cannot be read ({error.strerror}); give "
            "a folder of shards"
        ) from None


def make_documents(sources: dict[str, bytes]) -> Iterator[str]:
    """Yield documents of about SMALLEST to LARGEST bytes.

    The files of a package are joined, large modules are documents of their own, and short ones are joined.

    Args:
        sources: what `read_sources` returns.
    """
    groups: dict[str, list[str]] = {}
    for name, content in sources.items():
        groups.setdefault(name.split("/", maxsplit=1)[0], []).append(content.decode(errors="replace"))
    short = []
    for texts in [_topics(), *groups.values()]:
        if sum(map(len, texts)) < SMALLEST:
            short.extend(texts)
        else:
            yield from _pack(texts)
    yield from _pack(short)


def make_pairs(sources: dict[str, bytes]) -> Iterator[tuple[Pair, bool]]:
    """Yield pairs of a question on a module and its answer, and whether it is held out.

    The pairs of a package are all held out, or none is. Hashes of the packages' names decide, as far as at most
    HELD_OUT_PAIRS of all pairs are held out.

    Args:
        sources: what `read_sources` returns.
    """
    packages: dict[str, list[Pair]] = {}
    for name, content in sources.items():
        if content.isascii():
            module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            packages.setdefault(name.split("/", maxsplit=1)[0], []).extend(questions(module, content.decode()))
    allowed = HELD_OUT_PAIRS * sum(map(len, packages.values()))
    held_out: set[str] = set()
    for package in sorted(packages, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if packages[package] and len(packages[package]) <= allowed:
            held_out.add(package)
            allowed -= len(packages[package])
    for package, pairs in packages.items():
        yield from ((pair, package in held_out) for pair in pairs)


def _topics() -> list[str]:
    """Python's help texts, which are English prose."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [text for _, text in sorted(topics.items())]


def _pack(texts: list[str]) -> Iterator[str]:
    """Join texts into documents of at most LARGEST characters; a longer text is split into equal parts at line ends."""
    document = ""
    for text in texts:
        num_parts = -(-len(text) // LARGEST)
        start = 0
        for part in range(num_parts):
            nominal = (part + 1) * len(text) // num_parts
            end = len(text) if part == num_parts - 1 else text.rfind("\n", start, nominal) + 1 or nominal
            if document and len(document) + end - start > LARGEST:
                yield document
                document = ""
            document += text[start:end]
            start = end
    if document:
        yield document


def _build(name: str, output: Path, sources: dict[str, bytes], hashes: dict[str, str]) -> None:
    """Write the shards under a name of this process and rename them to `output`, if no other process was faster."""
    partial = output.with_name(f"{output.name}.{name_of_this_process()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer, pairs = ByteTokenizer(), name == STANDARD_LIBRARY_PAIRS
    writer = CorpusWriter(partial, tokenizer, validation_fraction=VALIDATION_FRACTION, pairs=pairs)
    if pairs:
        for pair, held_out in make_pairs(sources):
            writer.add_document(replace(encode_document(tokenizer, pair), held_out=held_out))
    else:
        for document in make_documents(sources):
            writer.add(document)
    writer.close({"python": python_version(), "sha256": hashes})
    fsync_tree(partial)
    try:
        os.rename(partial, output)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        shutil.rmtree(partial, ignore_errors=True)  # the other process made the same shards
    fsync_path(output.parent)
