"""Writes all documents of the inputs to a partial folder of shards, and resumes there after a kill.

Every few seconds everything is flushed to disk and the position in the inputs is written to the state file. A new start
cuts off what was written after that and resumes from there.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from colt5dist.data.inputs.documents import EXAMPLES, Item, Problems, TextKey, read_items
from colt5dist.data.inputs.files import InputFile
from colt5dist.data.inputs.megatron import TokenIds
from colt5dist.data.inputs.pairs import Pair
from colt5dist.data.prepare.duplicates import SeenTexts
from colt5dist.data.prepare.held_out_split import CorpusWriter
from colt5dist.data.prepare.settings import PrepareConfig
from colt5dist.data.prepare.tokenize_texts import Document, Encode, Text
from colt5dist.data.tokenizer import Tokenizer
from colt5dist.errors import ConfigError
from colt5dist.files import write_whole
from colt5dist.wording import count

STATE_NAME = "state.json"
STATE_FORMAT = 2
"""Number of the form of the state: raised whenever that changes."""
LOCK_NAME = "lock"
SEEN_NAME = "seen-texts"
TRAINED_PATTERN = "trained-*.json"
NOT_A_PAIR = "without tokens on one side, or with the end token in a text"
REPORT_SECONDS = 0.1
UNKNOWN_CHARACTERS = 1 << 16  # of a document, searched for parts to show
UNKNOWN_SHOWN = 20

Report = Callable[[int, int, CorpusWriter], None]
Place = dict[str, int]


def write_shards(
    config: PrepareConfig,
    job: dict[str, Any],
    tokenizer: Tokenizer,
    encode: Encode,
    files: list[InputFile],
    partial: Path,
    report: Report | None,
) -> None:
    """Write all documents and both manifests to `partial`, resuming from the state that is saved there.

    They are written a second time where the first time held out far too many or too few tokens.

    Args:
        config: the settings.
        job: everything that decides the result; an earlier start must have had the same.
        tokenizer: makes the ids.
        encode: calls the tokenizer, perhaps in other processes.
        files: the inputs.
        partial: the folder; the caller holds its lock.
        report: called up to ten times per second with the bytes of the inputs that are done, all bytes, and the writer.

    Raises:
        ConfigError: there is no text; the folder was begun with other inputs or settings; or a document cannot be read
            and the settings are strict.
    """
    work = (config, job, tokenizer, encode, files, partial, report)
    writer, problems = _write_documents(*work)
    if moved := writer.moved_texts():
        # killed just after this, a new start comes to the same decision
        _clear(partial)
        writer, problems = _write_documents(*work, moved)
    source: dict[str, Any] = {"job": job, "left_out": problems.counts, "unwanted": problems.unwanted}
    if writer.num_unknown:
        source["unknown"] = {"tokens": writer.num_unknown, "parts": problems.unknown}
    if writer.num_moved:
        source["moved"] = writer.num_moved
    try:
        writer.close({**source, "document_lengths": writer.length_counts})
    except ConfigError:
        remove(partial)
        raise


def _write_documents(
    config: PrepareConfig,
    job: dict[str, Any],
    tokenizer: Tokenizer,
    encode: Encode,
    files: list[InputFile],
    partial: Path,
    report: Report | None,
    moved: dict[int, bool] | None = None,
) -> tuple[CorpusWriter, Problems]:
    """Write all documents, but no manifest; the writer, and what was left out.

    `moved` has the texts that are not in the set of their hash; None where that is not known, or in the state.
    """
    state = read_state(partial, job)
    place = state["place"] if state else _start(0)
    problems = Problems(**state["problems"]) if state else Problems()
    check_strict(config.strict, problems, partial)
    if not state:
        _clear(partial)  # shards of an earlier start that saved no state; their inputs may have been others
    writer = CorpusWriter(
        partial,
        tokenizer,
        validation_fraction=config.validation_fraction,
        shard_bytes=config.shard_bytes,
        moved=moved,
        state=state["writer"] if state else None,
        pairs=config.pairs,
    )
    seen = SeenTexts(partial / SEEN_NAME, state["seen"] if state else None) if config.deduplicate else None

    def save() -> None:
        state = {"format": STATE_FORMAT, "job": job, "place": place, "problems": asdict(problems)}
        state |= {"writer": writer.save(), "seen": seen.save() if seen else 0}
        write_whole(partial / STATE_NAME, json.dumps(state).encode())

    def add(document: Document) -> str:
        """Add a document; return the kind of its problem, or an empty string."""
        if not len(document.tokens):
            return NOT_A_PAIR if config.pairs else "empty"
        if len(document.tokens) < config.min_document_tokens:
            problems.leave_out(f"of fewer than {config.min_document_tokens} tokens")
        elif seen and not seen.add(document.digest):
            problems.leave_out("duplicate")
        else:
            writer.add_document(document)
        return ""

    def show_unknown(text: Text) -> None:
        """Keep the first few parts of the text that the vocabulary lacks."""
        if isinstance(text, TokenIds):
            return
        text = f"{text.input}\n{text.target}" if isinstance(text, Pair) else text
        text = text[:UNKNOWN_CHARACTERS].decode(errors="ignore") if isinstance(text, bytes) else text
        for part in tokenizer.unknown_parts(text[:UNKNOWN_CHARACTERS]):
            if len(problems.unknown) < EXAMPLES and part[:UNKNOWN_SHOWN] not in problems.unknown:
                problems.unknown.append(part[:UNKNOWN_SHOWN])

    saved, reported = time.monotonic(), -math.inf
    bytes_before = [0]
    for file in files:
        bytes_before.append(bytes_before[-1] + file.bytes)

    def tell(item: tuple[int, Item], share: float = 1.0) -> None:
        """Report how far the reading is, at most so often; `share` of the item is done."""
        nonlocal reported
        if report and time.monotonic() - reported >= REPORT_SECONDS:
            reported = time.monotonic()
            report(bytes_before[item[0]] + int(share * item[1].file_position), job["bytes"], writer)

    for (number, item), document in encode(_read_all(files, config.keys, place), tell):
        if document and files[number].held_out is not None:
            document = replace(document, held_out=files[number].held_out)
        kind = item.problem if document is None else add(document)
        if document and item.text and document.num_unknown and len(problems.unknown) < EXAMPLES:
            show_unknown(item.text)
        if kind:
            problems.add(kind, files[number], item)
            if item.ends_file and not item.text:
                problems.unread_bytes += max(0, files[number].bytes - item.file_position)
            if config.strict:
                where = f"{files[number].place}:{item.line}" if item.line else files[number].place
                reason = f" ({item.reason})" if item.reason else ""
                raise ConfigError(
                    f"{where}: is {kind}{reason}; fix the file and delete {partial}, or continue without --strict"
                )
        place = {"file": number, "offset": item.offset, "line": item.line} if not item.ends_file else _start(number + 1)
        if time.monotonic() - saved >= config.commit_seconds:
            save()
            saved = time.monotonic()
        tell((number, item))
    place = _start(len(files))
    if not writer.num_documents:
        remove(partial)
        left_out = "".join(f"; {line}" for line in problems.lines())
        raise ConfigError(f"--input: no document in {count(len(files), 'file')}{left_out}; give files with text")
    save()
    if seen:
        seen.close()
    return writer, problems


def _read_all(
    files: list[InputFile], text_key: TextKey, place: Place
) -> Iterator[tuple[tuple[int, Item], Text | None]]:
    """((number of the file, item), text) of everything from `place` on."""
    for number, file in enumerate(files[place["file"] :], start=place["file"]):
        for item in read_items(file, text_key=text_key, offset=place["offset"], line=place["line"]):
            yield (number, item), item.text
        place = _start(number + 1)


def check_strict(strict: bool, problems: Problems, folder: Path) -> None:
    """Check that no earlier start without --strict left documents out.

    Raises:
        ConfigError: one did, and `strict` is True.
    """
    if strict and problems.counts:
        lines = Problems(counts=problems.counts, examples=problems.examples).lines()
        raise ConfigError(
            f"--output: {folder} was made without --strict; {'; '.join(lines)}; fix the files and delete the folder, "
            "or leave out --strict"
        )


def _clear(partial: Path) -> None:
    """Remove what an earlier start wrote, except the lock, which is held, and a tokenizer that was trained for it."""
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK_NAME and not path.match(TRAINED_PATTERN):
            path.unlink()


def remove(partial: Path) -> None:
    """Remove a folder from which nothing can be resumed; the lock file last, since it marks the folder as ours."""
    _clear(partial)
    shutil.rmtree(partial)


def _start(file: int) -> dict[str, int]:
    """The place at the start of an input file."""
    return {"file": file, "offset": 0, "line": 0}


def read_state(partial: Path, job: dict[str, Any]) -> dict[str, Any] | None:
    """Read the state of an earlier start; None if there is none.

    Raises:
        ConfigError: the earlier start had another job, or was one of another version of this package.
    """
    try:
        state = json.loads((partial / STATE_NAME).read_bytes())
    except FileNotFoundError:
        return None
    if state.get("format") != STATE_FORMAT:
        raise ConfigError(f"--output: {partial} was begun by another version of colt5dist; delete it")
    if state["job"] != job:
        raise ConfigError(
            f"--output: {partial} was begun with other inputs or settings; delete it, or repeat the earlier command"
        )
    return state
