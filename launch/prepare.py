"""Make shards from text: `python launch/prepare.py --input 'docs/**/*.jsonl.gz' --output shards`.

Can be stopped at any moment and started again with the same command.
"""

import argparse
import io
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from colt5dist.data.corpus import CorpusWriter
from colt5dist.data.prepare import PrepareConfig, prepare, summary_lines
from colt5dist.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error is said."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"error: {message}; see --help\n")


def parse_arguments(arguments: list[str]) -> PrepareConfig:
    """The settings that the command line gives."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="GLOB", help="text files (a document each) or .jsonl, plain or .gz"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to be made")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="a Hugging Face tokenizer.json (default: bytes)")
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=PrepareConfig.validation_fraction,
        metavar="SHARE",
        help="share of the documents to hold out; at least one is (default: %(default)s)",
    )
    parser.add_argument(
        "--text-key",
        default=PrepareConfig.text_key,
        metavar="KEY",
        help="key of the text in a jsonl line (%(default)s)",
    )
    parser.add_argument(
        "--shard-bytes",
        type=int,
        default=PrepareConfig.shard_bytes,
        metavar="BYTES",
        help="largest size of a shard (default: %(default)s)",
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first document that cannot be read")
    return PrepareConfig(**vars(parser.parse_args(arguments)))


def main(arguments: list[str]) -> int:
    """Prepare the shards and say what they hold; the exit status."""
    config = parse_arguments(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name need not be UTF-8
    console = Console(stderr=True)
    columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}% {task.description}"), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
            task = bar.add_task("", total=None)

            def report(done: int, total: int, writer: CorpusWriter) -> None:
                counts = f"{writer.num_documents:,} documents, {writer.num_tokens:,} tokens"
                bar.update(task, completed=done, total=total, description=counts)

            prepared = prepare(config, report if console.is_terminal else None)
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on with {config.output}", file=sys.stderr)
        return 130
    print("\n".join(summary_lines(prepared)))
    print(f"{'was already there' if prepared.was_there else 'written'}: {config.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
