"""The settings of prepare, and the command line of launch/prepare.py."""

import argparse
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NoReturn

from colt5dist.data.inputs.documents import TextKey
from colt5dist.data.inputs.pairs import PairKeys
from colt5dist.data.inputs.text_keys import split_text_keys, text_key_problems
from colt5dist.data.prepare.train_tokenizer import SMALLEST_VOCABULARY


@dataclass(kw_only=True)
class PrepareConfig:
    """What `prepare` reads and writes."""

    input: list[str]
    """Glob patterns, files and folders of text, tables, data sets and token files."""
    output: Path
    """Folder that is made."""
    tokenizer: Path | None = None
    """A Hugging Face tokenizer.json; None: the ids are bytes."""
    train_tokenizer: int | None = None
    """Train a tokenizer with this number of ids on the inputs first."""
    validation_fraction: float = 0.01
    """Share of the documents that is held out, above 0 and at most 0.5; at least one is."""
    text_key: str = "text"
    """Key of the text in a jsonl line, column of the text in a table."""
    text_keys: list[tuple[str, str]] = field(default_factory=list)
    """(pattern of paths, key) where the text has another key; the first pattern that matches counts."""
    pairs: bool = False
    """Each object or row is a pair of an input and a target, not a text."""
    input_key: str = PairKeys.input_key
    """Of a pair, key or column of the input."""
    target_key: str = PairKeys.target_key
    """Of a pair, key or column of the target."""
    min_document_tokens: int = 0
    """Documents with fewer tokens are left out."""
    deduplicate: bool = False
    """Keep the first of several documents with the same text."""
    workers: int = 0
    """Processes that tokenize (0: the main process tokenizes)."""
    strict: bool = False
    """Stop at the first document that cannot be read, instead of leaving it out."""
    shard_bytes: int = 1 << 29
    """Largest size of a shard in bytes."""
    commit_seconds: float = 10.0
    """Seconds between saves of the state."""

    @property
    def keys(self) -> TextKey:
        """Where the text of a document, or the two of a pair, are in an object or a row."""
        if self.pairs:
            return PairKeys(input_key=self.input_key, target_key=self.target_key)
        return self.text_key

    def problems(self) -> list[str]:
        """Return everything that is wrong with these settings, one line each."""
        problems = self._pair_problems()
        if not 0 < self.validation_fraction <= 0.5:
            problems.append(
                f"--validation-fraction: {self.validation_fraction} is out of range; give more than 0 and at most 0.5"
            )
        if self.train_tokenizer is not None:
            if self.train_tokenizer < SMALLEST_VOCABULARY:
                problems.append(
                    f"--train-tokenizer: {self.train_tokenizer} ids are too few; give {SMALLEST_VOCABULARY} or more"
                )
            if self.tokenizer:
                problems.append("--train-tokenizer: cannot be used with --tokenizer; leave one of them out")
        for name in ("workers", "min_document_tokens"):
            if getattr(self, name) < 0:
                problems.append(f"--{name.replace('_', '-')}: {getattr(self, name)} is negative; give 0 or more")
        if self.shard_bytes < 1 << 20:
            problems.append(f"--shard-bytes: {self.shard_bytes} is too small; give 1048576 or more")
        return problems + text_key_problems(self.text_key, self.text_keys)

    def _pair_problems(self) -> list[str]:
        """What does not go together with pairs, and what needs them."""
        defaults = {known.name: known.default for known in fields(self)}
        given = [name for name in ("input_key", "target_key") if getattr(self, name) != defaults[name]]
        if not self.pairs:
            return [f"--{name.replace('_', '-')}: is for pairs; give --pairs as well" for name in given]
        problems = [
            f"--{name.replace('_', '-')}: cannot be used with --pairs; leave it out{why}"
            for name, why in (
                ("text_key", ", and name the two texts with --input-key and --target-key"),
                ("train_tokenizer", ", and give --tokenizer: the one of the model that you start from"),
                ("min_document_tokens", ": a pair is kept whole"),
            )
            if getattr(self, name) != defaults[name] or (name == "text_key" and self.text_keys)
        ]
        for name in given:
            try:
                getattr(self, name).encode()
            except UnicodeEncodeError:  # the command line held bytes that are not UTF-8
                option = f"--{name.replace('_', '-')}"
                problems.append(f"{option}: {getattr(self, name)!r} is not UTF-8; give the key exactly as in the files")
        if self.input_key == self.target_key:
            problems.append(f"--target-key: {self.target_key!r} is the key of the input too; name the target's")
        return problems


USAGE = """prepare.py --input GLOB [GLOB ...] --output DIR [option ...]
       prepare.py verify SHARDS
       prepare.py info SHARDS
       prepare.py show SHARDS --config FILE --sample N"""


class Parser(argparse.ArgumentParser):
    """Prints an error in one line, in the form of all other errors."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        self.exit(2, f"error: {message}; see --help\n")


def _pattern(text: str) -> str:
    """A leading ~ is the home folder, also where quotes keep the shell from saying so; a name that exists is itself."""
    return text if os.path.lexists(text) else os.path.expanduser(text)


def _path(text: str) -> Path:
    return Path(_pattern(text))


def _parser(description: str | None, usage: str | None = None) -> Parser:
    return Parser(
        description=description, usage=usage, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def parse_prepare(arguments: list[str], description: str | None) -> tuple[PrepareConfig, Path | None]:
    """Return the settings of prepare, and the path of the plot of the document lengths (None: no plot)."""
    defaults = PrepareConfig
    parser = _parser(description, USAGE)
    add = parser.add_argument
    kinds = "text (one document per file), .jsonl, .json (these also as .gz and .zst), .parquet, data set folders, .bin"
    add(
        "--input",
        type=_pattern,
        nargs="+",
        required=True,
        metavar="GLOB",
        help=f"patterns of files, or folders: {kinds}",
    )
    add("--output", type=_path, required=True, metavar="DIR", help="folder that is made")
    add("--tokenizer", type=_path, metavar="FILE", help="a Hugging Face tokenizer.json (default: bytes)")
    add("--train-tokenizer", type=int, metavar="IDS", help="train a tokenizer with IDS ids on the inputs first")
    add(
        "--workers",
        type=int,
        default=defaults.workers,
        metavar="N",
        help="processes that tokenize, besides the one that writes (default: 0, one process does both)",
    )
    key = f"key of the text in a jsonl line, column in a table (default: {defaults.text_key}); or 'PATTERN=KEY'"
    add("--text-key", action="append", default=[], metavar="KEY", help=key)
    pairs = "each object or row is a pair of an input and a target; also SCROLLS's zip archives"
    add("--pairs", action="store_true", help=pairs)
    key = "with --pairs: key of the {} (default: %(default)s)"
    add("--input-key", default=defaults.input_key, metavar="KEY", help=key.format("input"))
    add("--target-key", default=defaults.target_key, metavar="KEY", help=key.format("target"))
    share = "share of the documents to hold out, at least one document (default: %(default)s)"
    add("--validation-fraction", type=float, default=defaults.validation_fraction, metavar="SHARE", help=share)
    add("--min-document-tokens", type=int, default=0, metavar="N", help="leave out documents with fewer tokens")
    add("--deduplicate", action="store_true", help="keep the first of several documents with the same text")
    add("--strict", action="store_true", help="stop at the first document that cannot be read")
    size = "largest size of a shard in bytes (default: %(default)s)"
    add("--shard-bytes", type=int, default=defaults.shard_bytes, metavar="BYTES", help=size)
    add("--histogram", type=_path, metavar="PNG", help="draw a plot of the document lengths")
    options = vars(parser.parse_args(arguments))
    histogram = options.pop("histogram")
    options["text_key"], options["text_keys"] = split_text_keys(options["text_key"], defaults.text_key)
    return PrepareConfig(**options), histogram


def parse_verify(arguments: list[str]) -> argparse.Namespace:
    """Return the options of `verify`: shards, workers."""
    parser = _parser("Read everything in a folder of shards and report damage: exit status 0 without, 1 with damage.")
    parser.add_argument("shards", type=_path, help="folder of the shards")
    workers = min(8, len(os.sched_getaffinity(0)))
    parser.add_argument("--workers", type=int, default=workers, metavar="N", help="processes (default: %(default)s)")
    return parser.parse_args(arguments)


def parse_info(arguments: list[str]) -> argparse.Namespace:
    """Return the options of `info`: shards (folder or address), histogram."""
    parser = _parser("Print what a folder of shards holds and what it was made from.")
    parser.add_argument("shards", type=_pattern, help="folder or address of the shards")
    parser.add_argument("--histogram", type=_path, metavar="PNG", help="draw a plot of the document lengths")
    return parser.parse_args(arguments)


def parse_show(arguments: list[str]) -> argparse.Namespace:
    """Return the options of `show`: shards, config, sample, world_size, colour, settings."""
    parser = _parser("Show a sample as the model sees it, the source of its text, and the step and rank that get it.")
    parser.add_argument("shards", nargs="?", help="folder or address of the shards (default: as in the configuration)")
    parser.add_argument("--config", required=True, metavar="FILE", help="a configuration of launch/pretrain.py")
    parser.add_argument("--sample", type=int, required=True, metavar="N", help="number of the sample in the run")
    parser.add_argument("--world-size", type=int, default=1, metavar="W", help="GPUs of the run (default: 1)")
    colour = "colour sentinels, mode tokens and end tokens (default: if stdout is a terminal)"
    parser.add_argument("--colour", choices=("auto", "always", "never"), default="auto", help=colour)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace those of the file")
    return parser.parse_intermixed_args(arguments)
