"""Makes shards from text files: once started, it can be killed at any moment and started again.

The shards grow in `OUTPUT.partial`. Now and then everything is brought to the disk and the place in the inputs is
written to its state file; a new start cuts off what was written later and goes on from there. When all is written,
the folder gets its final name in one rename. The result depends on the inputs and the settings alone, byte by byte;
whether they are those of an earlier start is told by the files' names, sizes, and first and last 64 KiB.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from colt5dist.data.corpus import VALIDATION_FOLDER, WAITING_PATTERN, CorpusWriter
from colt5dist.data.documents import InputFile, Problems, find_inputs, read_items
from colt5dist.data.manifest import MANIFEST_NAME, Manifest, read_manifest
from colt5dist.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer
from colt5dist.errors import ConfigError
from colt5dist.files import fsync_path, fsync_tree, locked, write_whole

STATE_NAME = "state.json"
LOCK_NAME = "lock"
REPORT_SECONDS = 0.1


@dataclass(kw_only=True)
class PrepareConfig:
    """What `prepare` reads and writes."""

    input: list[str]
    """Glob patterns of text and jsonl files, plain or gzipped."""
    output: Path
    """Folder to be made."""
    tokenizer: Path | None = None
    """A Hugging Face tokenizer.json; None takes bytes."""
    validation_fraction: float = 0.01
    """Share of the documents that is held out, above 0 and at most 0.5; at least one is."""
    text_key: str = "text"
    """Key of the text in a jsonl line."""
    strict: bool = False
    """Stop at the first document that cannot be read, instead of leaving it out."""
    shard_bytes: int = 1 << 29
    """Largest size of a shard in bytes."""
    commit_seconds: float = 10.0
    """How often the state is saved."""

    def problems(self) -> list[str]:
        """Everything that is wrong with these settings, one line each."""
        problems = []
        if not 0 < self.validation_fraction <= 0.5:
            problems.append(
                f"--validation-fraction: {self.validation_fraction} is out of range; give more than 0 and at most 0.5"
            )
        if self.shard_bytes < 1 << 20:
            problems.append(f"--shard-bytes: {self.shard_bytes} is too small; give 1048576 or more")
        try:
            self.text_key.encode()
        except UnicodeEncodeError:  # from bytes on the command line that are none
            problems.append(f"--text-key: {self.text_key!r} is not UTF-8; give the key as it stands in the files")
        return problems


@dataclass(frozen=True)
class Prepared:
    """What `prepare` made."""

    manifest: Manifest
    """Of the training set."""
    validation: Manifest
    """Of the held-out set."""
    problems: Problems
    """Documents left out; without places if the folder was already there."""
    was_there: bool
    """The folder was already there, made from the same inputs with the same settings."""


Report = Callable[[int, int, CorpusWriter], None]


def prepare(config: PrepareConfig, report: Report | None = None) -> Prepared:
    """Make `config.output` from the inputs, or finish an earlier start of the same work.

    Args:
        config: what to read and write.
        report: called up to ten times a second with the bytes of the inputs that are done, all bytes, and the writer.

    Raises:
        ConfigError: the inputs or settings are wrong, or the output folder holds something else.
    """
    if problems := config.problems():
        raise ConfigError("\n".join(problems))
    tokenizer = JsonTokenizer(config.tokenizer) if config.tokenizer else ByteTokenizer()
    # without links: a link could not be replaced by the finished folder
    output = Path(os.path.realpath(config.output))
    if output.is_mount():
        raise ConfigError(f"--output: {output} cannot be made by renaming; give a new folder below it")
    partial = output.with_name(output.name + ".partial")
    files = find_inputs(config.input, made=(partial,))
    job = {
        "tokenizer": tokenizer.fingerprint,
        "files": len(files),
        "bytes": sum(file.bytes for file in files),
        "inputs": _inputs_key(files),
        "validation_fraction": config.validation_fraction,
        "text_key": config.text_key,
        "shard_bytes": config.shard_bytes,
    }
    try:
        if not _is_empty(output):
            return _already_there(output, job, config.strict)
        if not _is_empty(partial) and not any((partial / name).exists() for name in (LOCK_NAME, MANIFEST_NAME)):
            raise ConfigError(f"--output: {partial} is needed, and holds something else; move it, or give a new folder")
        partial.mkdir(parents=True, exist_ok=True)
        with locked(partial / LOCK_NAME, wait=False):
            if not (partial / MANIFEST_NAME).exists():
                _write_shards(config, job, tokenizer, files, partial, report)
            problems_found = _publish(partial, output, job, config.strict)
            return Prepared(
                read_manifest(output), read_manifest(output / VALIDATION_FOLDER), problems_found, was_there=False
            )
    except BlockingIOError:
        raise ConfigError(f"--output: {output} is being written by another prepare; wait for it to end") from None
    except OSError as error:
        where = error.filename or output
        raise ConfigError(f"--output: {where} cannot be written ({error.strerror}); mend it and start again") from None


def _inputs_key(files: list[InputFile]) -> str:
    try:
        return hashlib.sha256("".join(file.content_key for file in files).encode()).hexdigest()
    except OSError as error:
        raise ConfigError(f"--input: {error.filename} cannot be read ({error.strerror}); mend its rights") from None


def _is_empty(output: Path) -> bool:
    return not output.exists() or (output.is_dir() and not any(output.iterdir()))


def _already_there(output: Path, job: dict[str, Any], strict: bool) -> Prepared:
    """The finished work of an earlier start; ConfigError if the folder holds anything else."""
    if not (output / MANIFEST_NAME).exists():
        raise ConfigError(f"--output: {output} exists and holds no shards; give a new folder")
    manifest = read_manifest(output)
    if manifest.source.get("job") != job:
        raise ConfigError(f"--output: {output} holds shards of other inputs or settings; give a new folder")
    problems = Problems(counts=manifest.source["left_out"])
    _check_strict(strict, problems, output)
    return Prepared(manifest, read_manifest(output / VALIDATION_FOLDER), problems, was_there=True)


def _check_strict(strict: bool, problems: Problems, folder: Path) -> None:
    """ConfigError if an earlier start without --strict left documents out."""
    if strict and problems.counts:
        raise ConfigError(
            f"--output: {folder} was made without --strict; {'; '.join(problems.lines())}; mend the files and delete "
            "it, or leave out --strict"
        )


def _write_shards(
    config: PrepareConfig,
    job: dict[str, Any],
    tokenizer: Tokenizer,
    files: list[InputFile],
    partial: Path,
    report: Report | None,
) -> None:
    """Write all documents and both manifests to `partial`, going on from the state that is saved there."""
    state = _read_state(partial, job)
    place = state["place"] if state else _start(0)
    problems = Problems(**state["problems"]) if state else Problems()
    _check_strict(config.strict, problems, partial)
    if not state:
        _clear(partial)  # shards of an earlier start that saved no state; they may be of other inputs
    writer = CorpusWriter(
        partial,
        tokenizer,
        validation_fraction=config.validation_fraction,
        shard_bytes=config.shard_bytes,
        state=state["writer"] if state else None,
    )

    def save() -> None:
        state = {"job": job, "place": place, "problems": asdict(problems), "writer": writer.save()}
        write_whole(partial / STATE_NAME, json.dumps(state).encode())

    saved, reported = time.monotonic(), -math.inf
    bytes_before = sum(file.bytes for file in files[: place["file"]])
    for number, file in enumerate(files[place["file"] :], start=place["file"]):
        for item in read_items(file, text_key=config.text_key, offset=place["offset"], line=place["line"]):
            kind = item.problem
            if item.text is not None and not writer.add(item.text):
                kind = "empty"
            if kind:
                problems.add(kind, file, item.line)
                if config.strict:
                    where = f"{file.path}:{item.line}" if item.line else f"{file.path}"
                    raise ConfigError(
                        f"{where}: is {kind}; mend the file and delete {partial}, or leave out --strict to go on"
                    )
            place = (
                {"file": number, "offset": item.offset, "line": item.line} if not item.ends_file else _start(number + 1)
            )
            if time.monotonic() - saved >= config.commit_seconds:
                save()
                saved = time.monotonic()
            if report and time.monotonic() - reported >= REPORT_SECONDS:
                reported = time.monotonic()
                report(bytes_before + item.file_position, job["bytes"], writer)
        bytes_before += file.bytes
        place = _start(number + 1)
    if not writer.num_documents:
        _remove(partial)
        left_out = "".join(f"; {line}" for line in problems.lines())
        raise ConfigError(f"--input: {len(files)} files hold no document{left_out}; name files with text in them")
    save()
    try:
        writer.close({"job": job, "left_out": problems.counts, "document_lengths": writer.length_counts})
    except ConfigError:
        _remove(partial)
        raise


def _clear(partial: Path) -> None:
    """Remove what an earlier start wrote; the lock is held and stays."""
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK_NAME:
            path.unlink()


def _remove(partial: Path) -> None:
    """Remove a folder in which there is nothing to go on from, the lock last: it tells that the folder is ours."""
    _clear(partial)
    shutil.rmtree(partial)


def _start(file: int) -> dict[str, int]:
    """The place where an input file begins."""
    return {"file": file, "offset": 0, "line": 0}


def _read_state(partial: Path, job: dict[str, Any]) -> dict[str, Any] | None:
    """The state of an earlier start; None if there is none, ConfigError if it was another work."""
    try:
        state = json.loads((partial / STATE_NAME).read_bytes())
    except FileNotFoundError:
        return None
    if state["job"] != job:
        raise ConfigError(
            f"--output: {partial} was begun with other inputs or settings; delete it, or repeat the command of then"
        )
    return state


def _publish(partial: Path, output: Path, job: dict[str, Any], strict: bool) -> Problems:
    """Give the finished folder its name; returns what was left out."""
    state = _read_state(partial, job)
    manifest = read_manifest(partial)
    if manifest.source["job"] != job:
        raise ConfigError(f"--output: {partial} was made from other inputs or settings; delete it")
    problems = Problems(**state["problems"]) if state else Problems(counts=manifest.source["left_out"])
    _check_strict(strict, problems, partial)
    for name in (STATE_NAME, LOCK_NAME):
        (partial / name).unlink(missing_ok=True)
    for leftover in (*partial.glob(WAITING_PATTERN), *partial.glob("**/*.tmp")):
        leftover.unlink()
    fsync_tree(partial)
    os.rename(partial, output)
    fsync_path(output.parent)
    return problems


def summary_lines(prepared: Prepared) -> list[str]:
    """What was made, for the terminal: counts, what was left out, and how long the documents are."""
    training, validation = prepared.manifest, prepared.validation
    lines = [
        f"{name}: {part.documents:,} documents, {part.tokens:,} tokens, {len(part.shards)} shards"
        for name, part in (("training", training), ("held out", validation))
    ]
    lines += prepared.problems.lines()
    counts = training.source["document_lengths"]
    largest = max(counts)
    lines.append("documents by length in tokens:")
    for bits, count in enumerate(counts):
        if count:
            lines.append(
                f"{1 << (bits - 1):>12,} to {(1 << bits) - 1:<12,} {count:>9,} {'#' * -(-40 * count // largest)}"
            )
    return lines
