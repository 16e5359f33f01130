"""Makes shards from text files. It can be killed at any moment and started again.

The shards are written to `OUTPUT.partial`. When everything is written, the folder gets its final name in one rename.
The result depends, to the byte, only on the inputs and the settings. Inputs are recognized as those of an earlier start
by the names, the sizes, and the first and last 64 KiB of the files.
"""

import hashlib
import json
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from colt5dist.data.inputs.documents import Problems, TextKey, read_items
from colt5dist.data.inputs.files import InputFile, Inputs, find_inputs
from colt5dist.data.inputs.pairs import PairKeys
from colt5dist.data.inputs.text_keys import with_text_keys
from colt5dist.data.manifest import MANIFEST_NAME, VALIDATION_FOLDER, Manifest, read_manifest
from colt5dist.data.prepare.held_out_split import WAITING_PATTERN, held_out_below
from colt5dist.data.prepare.resume import (
    LOCK_NAME,
    SEEN_NAME,
    STATE_NAME,
    TRAINED_PATTERN,
    Report,
    check_strict,
    read_state,
    write_shards,
)
from colt5dist.data.prepare.settings import PrepareConfig
from colt5dist.data.prepare.tokenize_texts import encoder
from colt5dist.data.prepare.train_tokenizer import training_process
from colt5dist.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer
from colt5dist.errors import ConfigError
from colt5dist.files import fsync_path, fsync_tree, locked, write_whole

TRAINED = "trained, {} ids"
"""The tokenizer of a job that trains one."""


@dataclass(frozen=True)
class Prepared:
    """The result of `prepare`."""

    manifest: Manifest
    """Manifest of the training set."""
    validation: Manifest
    """Manifest of the held-out set."""
    problems: Problems
    """Documents that were left out; without file and line if the folder was already there."""
    inputs: Inputs
    """What was read, and what is beside it."""
    notes: tuple[str, ...]
    """What was done otherwise than asked for, one sentence each."""
    was_there: bool
    """Whether the folder was already there, made from the same inputs with the same settings."""


def prepare(config: PrepareConfig, report: Report | None = None) -> Prepared:
    """Make the shards in `config.output`, or finish an earlier start of the same job.

    Args:
        config: what to read and write.
        report: called up to ten times per second with the bytes of the inputs that are done, all bytes, and the writer.

    Raises:
        ConfigError: the inputs or settings are wrong, or the output folder holds something else.
    """
    if problems := config.problems():
        raise ConfigError("\n".join(problems))
    given = JsonTokenizer(config.tokenizer) if config.tokenizer else ByteTokenizer()
    # symbolic links are resolved: the finished folder could not replace a link
    output = Path(os.path.realpath(config.output))
    if output.is_mount():
        raise ConfigError(
            f"--output: {output} cannot be made by renaming, since it is a mount point; give a new folder below it"
        )
    partial = output.with_name(output.name + ".partial")
    inputs = find_inputs(config.input, made=(partial,), pairs=config.pairs)
    files = with_text_keys(inputs.files, config.text_keys)
    tokens = next((file for file in files if file.is_tokens), None)
    if tokens and not config.tokenizer:
        raise ConfigError(
            f"--input: {tokens.path} holds ids, not text; give as --tokenizer the tokenizer.json that made them"
        )
    job: dict[str, Any] = {
        "tokenizer": TRAINED.format(config.train_tokenizer) if config.train_tokenizer else given.fingerprint,
        "files": len(files),
        "bytes": sum(file.bytes for file in files),
        "inputs": _inputs_key(files),
        "validation_fraction": config.validation_fraction,
        "text_key": config.text_key,
        "shard_bytes": config.shard_bytes,
        "min_document_tokens": config.min_document_tokens,
        "deduplicate": config.deduplicate,
    }
    if isinstance(config.keys, PairKeys):
        del job["text_key"]
        job["pairs"] = asdict(config.keys)
    if config.text_keys:
        job["text_keys"] = [f"{pattern}={key}" for pattern, key in config.text_keys]
    try:
        if not _is_empty(output):
            return _already_there(output, job, config.strict, inputs, given.notes)
        if not _is_empty(partial) and not any((partial / name).exists() for name in (LOCK_NAME, MANIFEST_NAME)):
            raise ConfigError(f"--output: {partial} is needed, and holds something else; move it, or give a new folder")
        if config.pairs:
            check_pairs(files, config.keys)
        partial.mkdir(parents=True, exist_ok=True)
        tokenizer = _trained_tokenizer(config, job, files, partial) if config.train_tokenizer else given
        # the workers are started before the lock is taken, so that none keeps it when this process is killed
        with encoder(tokenizer, config.workers) as encode, locked(partial / LOCK_NAME, wait=False) as is_alone:
            if not is_alone:
                print(
                    f"note: --output: {partial} has no file locks; make sure that no other prepare writes to it",
                    file=sys.stderr,
                    flush=True,
                )
            if not (partial / MANIFEST_NAME).exists():
                write_shards(config, job, tokenizer, encode, files, partial, report)
            problems_found = _rename_finished(partial, output, job, config.strict)
            return _prepared(output, problems_found, inputs, given.notes, was_there=False)
    except BlockingIOError:
        raise ConfigError(f"--output: {output} is being written by another prepare; wait for it to end") from None
    except OSError as error:
        where = error.filename or output
        raise ConfigError(
            f"--output: {where} cannot be written ({error.strerror}); fix this and run the command again"
        ) from None


def _inputs_key(files: list[InputFile]) -> str:
    try:
        return hashlib.sha256("".join(file.content_key for file in files).encode()).hexdigest()
    except OSError as error:
        raise ConfigError(f"--input: {error.filename} cannot be read ({error.strerror}); fix its permissions") from None


def check_pairs(files: list[InputFile], keys: TextKey) -> None:
    """Read each file until its first pair, so that a wrong key is found before hours of work.

    Raises:
        ConfigError: no pair of a file is whole.
    """
    for file in files:
        problems = Problems()
        for item in read_items(file, text_key=keys):
            if item.text:
                break
            if item.problem:
                problems.add(item.problem, file, item)
        else:
            found = ", ".join(f"{kind}: {count:,}" for kind, count in problems.counts.items()) or "it is empty"
            raise ConfigError(
                f"--input: {file.place} holds no whole pair ({found}); leave it out, or name the keys of its two texts "
                "with --input-key and --target-key"
            )


def _trained_tokenizer(config: PrepareConfig, job: dict[str, Any], files: list[InputFile], partial: Path) -> Tokenizer:
    """The tokenizer that is trained on the inputs; it is trained only once, even if the job is interrupted later."""
    assert config.train_tokenizer is not None
    key = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]
    path = partial / TRAINED_PATTERN.replace("*", key)
    if not path.exists():
        below = held_out_below(config.validation_fraction)
        training = training_process(
            files, vocab_size=config.train_tokenizer, text_key=config.text_key, held_out_below=below
        )
        with training as train, locked(partial / LOCK_NAME, wait=False):
            if not path.exists():
                write_whole(path, train())
    return JsonTokenizer(path)


def _is_empty(output: Path) -> bool:
    return not output.exists() or (output.is_dir() and not any(output.iterdir()))


def _prepared(output: Path, problems: Problems, inputs: Inputs, notes: tuple[str, ...], *, was_there: bool) -> Prepared:
    training, validation = read_manifest(output), read_manifest(output / VALIDATION_FOLDER)
    asked, made = training.source["job"]["tokenizer"], training.tokenizer.vocab_size
    if (wanted := re.fullmatch(TRAINED.format("([0-9]+)"), asked)) and made < int(wanted[1]):
        fewer = (
            f"the trained tokenizer has {made:,} ids, not {int(wanted[1]):,}: the text has no more pieces that repeat"
        )
        notes = (*notes, fewer)
    return Prepared(training, validation, problems, inputs, (*inputs.notes, *notes), was_there)


def _already_there(output: Path, job: dict[str, Any], strict: bool, inputs: Inputs, notes: tuple[str, ...]) -> Prepared:
    """The result of an earlier start that finished; ConfigError if the folder holds anything else."""
    if not (output / MANIFEST_NAME).exists():
        raise ConfigError(f"--output: {output} exists and holds no shards; give a new folder")
    manifest = read_manifest(output)
    if manifest.source.get("job") != job:
        raise ConfigError(f"--output: {output} holds shards of other inputs or settings; give a new folder")
    problems = _problems_of(manifest)
    check_strict(strict, problems, output)
    return _prepared(output, problems, inputs, notes, was_there=True)


def _problems_of(manifest: Manifest) -> Problems:
    """What was left out, without file and line."""
    source = manifest.source
    return Problems(counts=source["left_out"], unwanted=source["unwanted"])


def _rename_finished(partial: Path, output: Path, job: dict[str, Any], strict: bool) -> Problems:
    """Remove temporary files, give the finished folder its final name, and return what was left out."""
    state = read_state(partial, job)
    manifest = read_manifest(partial)
    if manifest.source["job"] != job:
        raise ConfigError(f"--output: {partial} was made from other inputs or settings; delete it")
    problems = Problems(**state["problems"]) if state else _problems_of(manifest)
    check_strict(strict, problems, partial)
    for name in (STATE_NAME, SEEN_NAME, LOCK_NAME):
        (partial / name).unlink(missing_ok=True)
    for leftover in (*partial.glob(WAITING_PATTERN), *partial.glob(TRAINED_PATTERN), *partial.glob("**/*.tmp")):
        leftover.unlink()
    fsync_tree(partial)
    os.rename(partial, output)
    fsync_path(output.parent)
    return problems
