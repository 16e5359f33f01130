"""Measure speed and correctness: `python launch/benchmark.py NAME [options]`.

`NAME --help` explains one benchmark and lists its options. Each prints a table. With `--output` it also writes the
figures as JSON, and those that compare implementations a plot.
"""

import pkgutil
import sys
from importlib import import_module
from pathlib import Path

import colt5dist.benchmark
from colt5dist.errors import ConfigError
from colt5dist.wording import summary

HELPERS = {"package_text", "side_by_side"}
"""Modules in the folder of the benchmarks that are none."""


def main(arguments: list[str]) -> int:
    """Run the benchmark that the first argument names.

    Returns:
        The exit status: 0, 1 if a result is wrong, 2 if the command is wrong or the machine lacks what it needs.
    """
    names = sorted({module.name for module in pkgutil.iter_modules(colt5dist.benchmark.__path__)} - HELPERS)
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, names))
        folder = Path(colt5dist.benchmark.__path__[0])
        lines = (f"  {name:{width}}  {summary(folder / f'{name}.py')}" for name in names)
        print("\n".join([f"{__doc__}\nBenchmarks:", *lines]))
        return 0
    if arguments[0] not in names:
        print(f"error: benchmark {arguments[0]!r} is unknown; use one of {', '.join(names)}", file=sys.stderr)
        return 2
    try:
        return import_module(f"colt5dist.benchmark.{arguments[0]}").main(arguments[1:])
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2


def command() -> int:
    """Run the command with the arguments of this process; returns the exit status."""
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(command())
