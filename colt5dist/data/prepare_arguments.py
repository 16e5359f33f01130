"""The command line of launch/prepare.py."""

import argparse
import os
from pathlib import Path
from typing import NoReturn

from colt5dist.data.prepare_config import PrepareConfig

USAGE = """prepare.py --input GLOB [GLOB ...] --output DIR [option ...]
       prepare.py verify SHARDS
       prepare.py info SHARDS
       prepare.py show SHARDS --config FILE --sample N"""
PLOT = "needs matplotlib: pip install 'colt5dist[bench]'"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error is said."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see --help\n")


def _parser(description: str | None, usage: str | None = None) -> Parser:
    return Parser(
        description=description, usage=usage, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def parse_prepare(arguments: list[str], description: str | None) -> tuple[PrepareConfig, Path | None]:
    """The settings of a preparation, and where a picture of the lengths is wanted."""
    defaults = PrepareConfig
    parser = _parser(description, USAGE)
    add = parser.add_argument
    kinds = "text (a document a file), .jsonl, .parquet; text and jsonl also .gz and .zst"
    add("--input", nargs="+", required=True, metavar="GLOB", help=f"patterns of files, or folders: {kinds}")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to be made")
    add("--tokenizer", type=Path, metavar="FILE", help="a Hugging Face tokenizer.json (default: bytes)")
    add("--train-tokenizer", type=int, metavar="IDS", help="make a tokenizer of so many ids from the inputs first")
    add(
        "--workers",
        type=int,
        default=defaults.workers,
        metavar="N",
        help="processes that tokenize, beside the one that writes (default: 0, which does both in one process)",
    )
    add("--text-key", default=defaults.text_key, metavar="KEY", help="key or column of the text (default: %(default)s)")
    share = "share of the documents to hold out; at least one is (default: %(default)s)"
    add("--validation-fraction", type=float, default=defaults.validation_fraction, metavar="SHARE", help=share)
    add("--min-document-tokens", type=int, default=0, metavar="N", help="leave shorter documents out")
    add("--deduplicate", action="store_true", help="keep the first of several documents with the same text")
    add("--strict", action="store_true", help="stop at the first document that cannot be read")
    size = "largest size of a shard (default: %(default)s)"
    add("--shard-bytes", type=int, default=defaults.shard_bytes, metavar="BYTES", help=size)
    add("--histogram", type=Path, metavar="PNG", help=f"draw how long the documents are ({PLOT})")
    options = vars(parser.parse_args(arguments))
    histogram = options.pop("histogram")
    return PrepareConfig(**options), histogram


def parse_verify(arguments: list[str]) -> argparse.Namespace:
    """`verify`: folder, workers."""
    parser = _parser("Read everything in a folder of shards and name what is damaged: status 0 whole, 1 damaged.")
    parser.add_argument("shards", type=Path)
    workers = min(8, len(os.sched_getaffinity(0)))
    parser.add_argument("--workers", type=int, default=workers, metavar="N", help="processes (default: %(default)s)")
    return parser.parse_args(arguments)


def parse_info(arguments: list[str]) -> argparse.Namespace:
    """`info`: folder or address, histogram."""
    parser = _parser("Say what a folder of shards holds and what it was made from.")
    parser.add_argument("shards")
    parser.add_argument("--histogram", type=Path, metavar="PNG", help=f"draw how long the documents are ({PLOT})")
    return parser.parse_args(arguments)


def parse_show(arguments: list[str]) -> argparse.Namespace:
    """`show`: folder, configuration, sample."""
    parser = _parser("Show a sample as the model sees it, where its text comes from, and which step and rank gets it.")
    parser.add_argument("shards", nargs="?", help="folder or address (default: those of the configuration)")
    parser.add_argument("--config", required=True, metavar="FILE", help="a configuration of launch/pretrain.py")
    parser.add_argument("--sample", type=int, required=True, metavar="N", help="number of the sample in the run")
    parser.add_argument("--world-size", type=int, default=1, metavar="W", help="GPUs of the run (default: 1)")
    parser.add_argument("--colour", choices=("auto", "always", "never"), default="auto")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace those of the file")
    return parser.parse_intermixed_args(arguments)
