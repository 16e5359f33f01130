"""Measure: `python launch/benchmark.py NAME [options]`; `NAME --help` explains one benchmark and lists its options.

Each prints a table. With `--output` it also writes the figures as JSON, and those that compare implementations a plot.
"""

import ast
import pkgutil
import sys
from importlib import import_module
from pathlib import Path

import colt5dist.benchmark
from colt5dist.errors import ConfigError


def summary(name: str) -> str:
    """Return the first line of a benchmark's docstring, without importing the benchmark."""
    source = Path(colt5dist.benchmark.__path__[0], f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def main(arguments: list[str]) -> int:
    """Run the benchmark that the first argument names.

    Returns:
        The exit status: 0, 1 if a result is wrong, 2 if the command is wrong or the machine lacks what it needs.
    """
    names = sorted(module.name for module in pkgutil.iter_modules(colt5dist.benchmark.__path__))
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, names))
        print("\n".join([f"{__doc__}\nBenchmarks:", *(f"  {name:{width}}  {summary(name)}" for name in names)]))
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
