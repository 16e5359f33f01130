"""Measure the held-out loss of a trained model: `python launch/evaluate.py runs/tiny [--shards DIR ...] [--json]`.

PATH is a run folder (its newest whole checkpoint is taken), a checkpoint inside one, or an exported folder. Without
--shards, a run is measured on the held-out documents of its own shards. `torchrun` and `deepspeed` start it on several
processes, which share the samples.
"""

import argparse
import json
import sys
from typing import NoReturn

from colt5dist.console import as_command, status_of_report


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument as one line, like all wrong input."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        print(f"error: arguments: {message}; --help lists them", file=sys.stderr)
        sys.exit(2)


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the options."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("path", help="run folder, checkpoint, or exported folder")
    parser.add_argument("--shards", nargs="+", default=[], metavar="DIR", help="shard sets, each measured by itself")
    parser.add_argument("--samples", type=positive, help="samples of each set (default: train.eval_samples)")
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    options = parse_arguments(arguments)
    # imported late, so that --help and a wrong argument are answered at once
    from colt5dist.errors import ConfigError
    from colt5dist.pretrained.evaluate_shards import evaluate_stored
    from colt5dist.pretrained.processes import joined_processes
    from colt5dist.train.ranks import exit_for_wrong_input, ranks_from_environment

    try:
        ranks = ranks_from_environment()
        with joined_processes(ranks.world_size, ranks.local_rank) as device:
            report = evaluate_stored(
                options.path,
                options.shards,
                device=device,
                step=options.step,
                num_samples=options.samples,
                rank=ranks.rank,
                world_size=ranks.world_size,
            )
    except ConfigError as error:
        return exit_for_wrong_input(error)
    if ranks.is_first:
        print(json.dumps(report.as_json(), indent=1) if options.json else "\n".join(report.lines()))
    return status_of_report()


command = as_command(main)

if __name__ == "__main__":
    sys.exit(command())
