"""`python -m colt5dist` lists what is installed: the commands, those for several GPUs, jobs and configurations."""

import sys

from colt5dist import __version__
from colt5dist.console import outlive_readers, status_of_report
from colt5dist.packaged import CONFIGS, command_files, config_names, job_files
from colt5dist.wording import summary


def listing() -> str:
    """What the command prints."""
    width = max(len(path.stem) for path in command_files())
    return "\n".join(
        [
            f"colt5dist {__version__}. The commands; each explains itself with --help:",
            *(f"  colt5dist-{path.stem:{width}}  {summary(path).partition(':')[0]}" for path in command_files()),
            "On several GPUs:",
            "  deepspeed --module colt5dist.launch.pretrain [--config FILE] [key=value ...]",
            "  torchrun --nproc-per-node 8 -m colt5dist.launch.pretrain [--config FILE] [key=value ...]",
            "Jobs for Slurm and Kubernetes, to be copied and edited:",
            *(f"  {path}" for path in job_files()),
            f"Configurations for --config, in {CONFIGS}:",
            f"  {', '.join(config_names())}",
            "In a checkout, launch/pretrain.py is the command colt5dist-pretrain, and so on.",
        ]
    )


def main(arguments: list[str]) -> int:
    """Print the list; returns the exit status, which is 2 for any argument but --help."""
    if arguments and arguments not in (["-h"], ["--help"]):
        print(f"error: arguments: {arguments[0]!r}; python -m colt5dist takes none, it lists commands", file=sys.stderr)
        return 2
    print(listing())
    return status_of_report()


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main(sys.argv[1:]))
