"""Pretrain a CoLT5: `deepspeed launch/pretrain.py [--config FILE] [key=value ...]`.

Without arguments it trains a tiny model on the running Python's standard library, on all GPUs, or on CPU processes.
`--print-config` prints the resolved configuration, `--dry-run` also what the run would need.
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from colt5dist.console import outlive_readers, status_of_report

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "tiny.yaml"


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument as one line, like all wrong input."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        from colt5dist.errors import ConfigError
        from colt5dist.train.ranks import exit_for_wrong_input

        sys.exit(exit_for_wrong_input(ConfigError(f"arguments: {message}; --help lists them")))


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the options; the `key=value` settings are returned as text."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    source = "YAML file, or the name of one that comes with colt5dist, like base (default: configs/tiny.yaml)"
    parser.add_argument("--config", default=str(DEFAULT_CONFIG), help=source)
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("--dry-run", action="store_true", help="print what the run would do and need, and exit")
    parser.add_argument("--gpus", type=int, metavar="N", help="with --dry-run: report and plan for N GPUs")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace those of the file")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    options = parse_arguments(arguments)
    is_first = (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") == "0"
    if is_first and not (options.print_config or options.dry_run):
        print("loading libraries and shards", flush=True)
    # OpenMP reads them as PyTorch is loaded: threads that wait for each other spin for some microseconds, then sleep
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000"}
    # imported late, so that --help and a wrong argument are answered at once
    from colt5dist.train.guard.launcher import launcher_processes

    launcher_processes()  # found before the long imports, because the launcher may end during them
    from colt5dist.errors import ConfigError, SaveError, TrainingFault
    from colt5dist.train.config.load import config_to_yaml, load_config
    from colt5dist.train.ranks import EXIT_SAVE_FAILED, exit_for_wrong_input, ranks_from_environment

    try:
        ranks = ranks_from_environment()
        if options.gpus is not None and not options.dry_run:
            raise ConfigError("--gpus: goes with --dry-run only, a run has the launcher's GPUs; leave it out")
        config = load_config(options.config, options.settings)
        if options.print_config:
            if ranks.is_first:
                print(config_to_yaml(config), end="")
            return status_of_report()
        if options.dry_run:
            from colt5dist.train.pretrain import check_start
            from colt5dist.train.report.dry_run import dry_run_report, plan_or_reason

            if ranks.is_first:
                print(dry_run_report(config, ranks.world_size, num_gpus=options.gpus), flush=True)
                if options.gpus is not None:
                    print(plan_or_reason(options.config, options.settings, options.gpus), flush=True)
                print("\n".join(check_start(config, ranks)))
            return status_of_report()
        from colt5dist.train.pretrain import pretrain

        return pretrain(config, ranks)
    except ConfigError as error:
        return exit_for_wrong_input(error)
    except SaveError as error:
        return exit_for_wrong_input(error, EXIT_SAVE_FAILED)
    except TrainingFault:
        return 1


def command() -> int:
    """Run the command with the arguments of this process, as its main script; returns the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save, Ctrl-C ends the start like SIGTERM
    outlive_readers()
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(command())
