"""Evaluate a trained model: `python launch/evaluate.py runs/tiny [--shards DIR ... | --pairs FILE] [--json]`.

PATH is a run folder (its newest whole checkpoint is taken), a checkpoint inside one, or an exported folder. Measured is
the loss on held-out documents, of --shards or of the run's own shards; or, with --pairs, how well the texts that the
model writes agree with the targets. `torchrun` and `deepspeed` start several processes, which share the samples.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from colt5dist.console import as_command, status_of_report
from colt5dist.errors import OneLineParser, step_or_best


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the options."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("path", help="run folder, checkpoint, or exported folder")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--shards", nargs="+", default=[], metavar="DIR", help="shard sets, each measured by itself")
    what.add_argument("--pairs", type=Path, metavar="JSONL", help="inputs with their targets, an object a line")
    add("--routing-map", type=Path, metavar="PNG", help="instead draw what is routed in a held-out document")
    add("--samples", type=positive, help="samples of each set (default: train.eval_samples; of pairs: all)")
    add("--step", type=step_or_best, help="step of the checkpoint, or best (default: the newest)")
    add("--ema", action="store_true", help="take the moving average of the weights (train.ema)")
    add("--json", action="store_true", help="print one JSON object")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    add = parser.add_argument_group("with --pairs", argument_default=argparse.SUPPRESS).add_argument
    of_pairs = [
        add("--predictions", type=Path, metavar="JSONL", help="file for what was written, with its scores"),
        add("--metrics", nargs="+", metavar="NAME", help="some of rouge, f1, exact_match (default: all)"),
        add("--input-key", help="key of the input (default: input)"),
        add("--target-key", help="key of the target (default: output)"),
        add("--id-key", help="key that is the same in all pairs of one input (default: id)"),
        add("--max-new-tokens", type=positive, help="most tokens of a text (default: 256)"),
        add("--num-beams", type=positive, help="beams of a beam search (default: 1, none)"),
        add("--length-penalty", type=float, help="exponent of a beam's length (default: 1.0)"),
        add("--batch-size", type=positive, help="texts at a time (default: 8)"),
    ]
    options = parser.parse_args(arguments)
    given = [action for action in of_pairs if hasattr(options, action.dest)]
    if given and options.pairs is None:
        parser.error(f"{', '.join(action.option_strings[0] for action in given)}: of no use without --pairs")
    if options.routing_map and (options.pairs or options.samples):
        parser.error("--routing-map: draws one document of --shards; leave --pairs and --samples out")
    options.of_pairs = {action.dest: getattr(options, action.dest) for action in given}
    return options


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    options = parse_arguments(arguments)
    # imported late, so that --help and a wrong argument are answered at once
    from colt5dist.errors import ConfigError
    from colt5dist.pretrained.evaluate_pairs import evaluate_stored_pairs
    from colt5dist.pretrained.evaluate_shards import evaluate_stored
    from colt5dist.pretrained.processes import joined_processes
    from colt5dist.pretrained.routing.of_trained_model import draw_trained
    from colt5dist.train.ranks import exit_for_wrong_input, ranks_from_environment

    report: Any
    try:
        ranks = ranks_from_environment()
        common: dict[str, Any] = {"step": options.step, "ema": options.ema, "num_samples": options.samples}
        common |= {"rank": ranks.rank, "world_size": ranks.world_size}
        with joined_processes(ranks.world_size, ranks.local_rank) as device:
            if options.routing_map is not None:
                common = {"step": options.step, "ema": options.ema, "device": device, "is_first": ranks.is_first}
                report = draw_trained(options.path, options.routing_map, options.shards, **common)
            elif options.pairs is not None:
                of_pairs = options.of_pairs
                report = evaluate_stored_pairs(options.path, options.pairs, device=device, **common, **of_pairs)
            else:
                report = evaluate_stored(options.path, options.shards, device=device, **common)
    except ConfigError as error:
        return exit_for_wrong_input(error)
    if ranks.is_first:
        print(json.dumps(report.as_json(), indent=1) if options.json else "\n".join(report.lines()))
    return status_of_report()


command = as_command(main)

if __name__ == "__main__":
    sys.exit(command())
