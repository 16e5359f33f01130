"""Measure: `python launch/benchmark.py NAME [options]`; `NAME --help` lists the options of one benchmark.

Each prints a table, and writes the figures behind it as JSON and a plot where `--output` says.
"""

import pkgutil
import sys
from importlib import import_module

import colt5dist.benchmark


def main(arguments: list[str]) -> int:
    """Run the benchmark that the first argument names; the exit status."""
    names = sorted(module.name for module in pkgutil.iter_modules(colt5dist.benchmark.__path__))
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{__doc__}\nbenchmarks: {', '.join(names)}")
        return 0
    if arguments[0] not in names:
        print(f"error: benchmark {arguments[0]!r} is unknown; use one of {', '.join(names)}", file=sys.stderr)
        return 2
    return import_module(f"colt5dist.benchmark.{arguments[0]}").main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
