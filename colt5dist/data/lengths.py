"""How long the documents of a set are: counted by powers of two, for the terminal and as a picture."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from colt5dist.errors import ConfigError

BAR_WIDTH = 40


def length_lines(counts: Sequence[int]) -> list[str]:
    """A line for each power of two that has documents: `counts[b]` of them have 2^(b-1) to 2^b - 1 tokens."""
    largest = max(counts)
    lines = ["documents by length in tokens:"]
    for bits, count in enumerate(counts):
        if count:
            lines.append(
                f"{1 << (bits - 1):>12,} to {(1 << bits) - 1:<12,} {count:>9,} {'#' * -(-BAR_WIDTH * count // largest)}"
            )
    return lines


def check_plot(path: Path | None) -> None:
    """ConfigError if a plot is wanted that cannot be drawn."""
    if path and find_spec("matplotlib") is None:
        raise ConfigError(f"--histogram: {path} needs matplotlib; pip install matplotlib, or leave it out")


def plot_lengths(counts: Sequence[int], path: Path) -> None:
    """Draw the same counts to a PNG file."""
    from matplotlib.figure import Figure

    used = [bits for bits, count in enumerate(counts) if count]
    bins = list(range(used[0], used[-1] + 1))
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.bar([str(1 << (bits - 1)) for bits in bins], [counts[bits] for bits in bins], width=0.9)
    axes.set_xlabel("tokens of a document: this many, to below twice as many")
    axes.set_ylabel("documents")
    axes.tick_params(axis="x", rotation=60)
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise ConfigError(f"--histogram: {path} cannot be written ({error.strerror}); name another file") from None
