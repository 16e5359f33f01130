"""Write a trained model as a folder that transformers opens: `python launch/export.py runs/tiny --output exported`.

PATH is a run folder (its newest whole checkpoint is taken), a checkpoint inside one, or an exported folder. The folder
holds weights, configuration, tokenizer and a model card; colt5dist loads it too, and `init_from` takes it.
"""

import argparse
import sys

from colt5dist.console import as_command, status_of_report
from colt5dist.errors import OneLineParser, step_or_best

TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the options."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("path", help="run folder, checkpoint, or exported folder")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write, which must not exist")
    parser.add_argument("--dtype", choices=TYPES, help="type of the weights (default: as stored, fp32 in checkpoints)")
    parser.add_argument("--step", type=step_or_best, help="step of the checkpoint, or best (default: the newest)")
    parser.add_argument("--ema", action="store_true", help="take the moving average of the weights (train.ema)")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    options = parse_arguments(arguments)
    # imported late, so that --help and a wrong argument are answered at once
    import torch

    from colt5dist.errors import ConfigError
    from colt5dist.pretrained.export import export

    dtype = getattr(torch, TYPES[options.dtype]) if options.dtype else None
    try:
        exported = export(options.path, options.output, dtype=dtype, step=options.step, ema=options.ema)
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    print(f"written: {exported.folder} ({exported.num_bytes / 1e6:,.1f} MB), from {exported.source}")
    return status_of_report()


command = as_command(main)

if __name__ == "__main__":
    sys.exit(command())
