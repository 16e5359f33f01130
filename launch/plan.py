"""Plan a run: `python launch/plan.py --config C --gpus N [--gpu-memory GB] [--hosts H] [--tokens T] [key=value ...]`.

For each ZeRO stage, micro-batch and activation checkpointing: memory per GPU, whether it fits, and how long the run
takes. It recommends one and prints the command to type. It needs no GPU and no shards. A `key=value` of ZeRO stage,
micro-batch or activation checkpointing is kept.
"""

import argparse
import sys
from pathlib import Path

from colt5dist.console import as_command, status_of_report
from colt5dist.errors import OneLineParser

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "base.yaml"


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the options; the `key=value` settings are returned as text."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--config", default=str(DEFAULT_CONFIG), help="YAML file, or a name like base (default: configs/base.yaml)"
    )
    parser.add_argument("--gpus", type=int, required=True, help="GPUs in all")
    parser.add_argument("--hosts", type=int, help="hosts that they are in (default: eight GPUs a host)")
    parser.add_argument("--gpu", default="H100", help="name of the GPU, for its peak rate and memory (default: H100)")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="of one GPU (default: by its name, else 80)")
    parser.add_argument(
        "--tokens", type=float, help="tokens to read, for instance 1e11 (default: those of train.steps)"
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace those of the file")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    options = parse_arguments(arguments)
    # imported late, so that --help and a wrong argument are answered at once
    from colt5dist.errors import ConfigError
    from colt5dist.train.ranks import exit_for_wrong_input
    from colt5dist.train.report.plan import cluster, plan_report

    try:
        gpus = cluster(options.gpus, options.hosts, options.gpu_memory, options.gpu)
        print(plan_report(options.config, options.settings, gpus, options.tokens), flush=True)
    except ConfigError as error:
        return exit_for_wrong_input(error)
    return status_of_report()


command = as_command(main)

if __name__ == "__main__":
    sys.exit(command())
