"""Describes a folder of shards: lines for the terminal, and a plot of the document lengths."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from colt5dist.data.inputs.documents import Problems
from colt5dist.data.inputs.files import Inputs
from colt5dist.data.manifest import Manifest
from colt5dist.data.prepare.pair_lengths import PairLengths
from colt5dist.data.read.shards import ShardSet
from colt5dist.errors import ConfigError
from colt5dist.wording import count

BAR_WIDTH = 40
WARNED_SHARE = 0.05
WARNED_EXCESS = 3.0  # times more tokens, or fewer, than the validation fraction


def summary_lines(training: Manifest, validation: Manifest, problems: Problems) -> list[str]:
    """Return lines with the counts of both sets, what was left out, and the document lengths."""
    noun = _noun(training)
    lines = [
        f"{name}: {count(part.documents, noun)}, {count(part.tokens, 'token')}, {count(len(part.shards), 'shard')}"
        for name, part in (("training", training), ("held out", validation))
    ]
    if moved := training.source.get("moved"):
        lines.append(
            f"not in the set that the hash names: {count(moved, 'text')}, because by hash alone far too many or too "
            "few tokens would be held out"
        )
    if unknown := training.source.get("unknown"):
        share = unknown["tokens"] / (training.tokens + validation.tokens)
        parts = f", such as {', '.join(map(repr, unknown['parts']))}" if unknown["parts"] else ""
        lines.append(f"unknown to the tokenizer: {count(unknown['tokens'], 'token')} ({share:.2%}){parts}")
    lines += problems.lines()
    for side, lengths in training.source.get("pairs", {}).items():
        of_side = PairLengths(lengths)
        middle, most = (of_side.quantile(share) for share in (0.5, 0.95))
        lines.append(f"{side}: about {count(middle, 'token')} in the median, 95% have at most about {most:,}")
    counts = training.source.get("document_lengths")
    return lines + (length_lines(counts, f"{noun}s") if counts else [])


def warning_lines(training: Manifest, validation: Manifest, problems: Problems, inputs: Inputs) -> list[str]:
    """Return why the shards may hold much less text than was meant, one line each; usually there are none.

    Args:
        training: manifest of the training set.
        validation: manifest of the held-out set.
        problems: what was left out.
        inputs: what the shards were made from.
    """
    source, noun = training.source, _noun(training)
    left_out = sum(problems.counts.values())
    tokens = training.tokens + validation.tokens
    measured = [
        (left_out, left_out + training.documents + validation.documents, f"{noun}s", "left out because of problems"),
        (inputs.other_endings, inputs.other_endings + len(inputs.files), "files in the folders", "not read"),
        (problems.unread_bytes, source["job"]["bytes"], "bytes", "unread, after damage in files"),
        (source.get("unknown", {}).get("tokens", 0), tokens, "tokens", "unknown to the tokenizer"),
    ]
    lines = [
        f"WARNING: {part:,} of {whole:,} {what} ({part / whole:.0%}) are {how}; see above"
        for part, whole, what, how in measured
        if part > WARNED_SHARE * whole
    ]
    documents, wanted = training.documents + validation.documents, source["job"]["validation_fraction"]
    share = validation.tokens / tokens
    if source.get("cut"):
        lines.append(
            f"WARNING: all text is one document, so its last {share:.0%} are held out and the rest is trained on; give "
            "more documents, or one document per line of a .jsonl file"
        )
    elif source.get("split_by_files"):
        pass  # the files say what is held out
    elif share > WARNED_EXCESS * wanted and share > WARNED_SHARE:
        lines.append(
            f"WARNING: {share:.0%} of the tokens are held out, not {wanted:.0%}: the {count(documents, noun)} "
            f"are too few or too unequal in length; give more {noun}s"
        )
    elif share * WARNED_EXCESS < wanted:
        lines.append(
            f"WARNING: only {share:.2%} of the tokens are held out, not {wanted:.0%}: the "
            f"{count(documents, noun)} are too few or too unequal in length; give more {noun}s"
        )
    return lines


def _noun(manifest: Manifest) -> str:
    """What a document of the set is called."""
    return "pair" if manifest.holds_pairs else "document"


def info_lines(shards: ShardSet) -> list[str]:
    """Return the same lines for opened shards, after their tokenizer, their bytes, and what they were made from."""
    manifest, entry = shards.manifest, shards.manifest.tokenizer
    source = manifest.source
    problems = Problems(counts=source.get("left_out", {}), unwanted=source.get("unwanted", {}))
    size = sum(part.bytes for held in (manifest, shards.validation.manifest) for part in held.shards)
    lines = [
        f"fingerprint: {manifest.checksum}",
        f"tokenizer: {entry.kind}, {entry.vocab_size:,} ids ({manifest.dtype}), pad {entry.pad_id}, end {entry.eos_id}",
        f"bytes: {size:,}",
    ]
    if manifest.holds_pairs:
        lines.append("holds pairs of an input and a target (data.mixture: pairs)")
    for key, value in source.get("job", {}).items():
        said = ", ".join(f"{name}={named}" for name, named in value.items()) if isinstance(value, dict) else value
        lines.append(f"made with {key.replace('_', ' ')}: {said}")
    return lines + summary_lines(manifest, shards.validation.manifest, problems)


def length_lines(counts: Sequence[int], what: str = "documents") -> list[str]:
    """Return a histogram of the document lengths, one line per power of two.

    Args:
        counts: `counts[b]` documents have 2^(b-1) to 2^b - 1 tokens.
        what: what is counted.
    """
    largest = max(counts)
    lines = [f"{what} by length in tokens:"]
    for bits, number in enumerate(counts):
        if number:
            bar = "#" * -(-BAR_WIDTH * number // largest)
            lines.append(f"{1 << (bits - 1):>12,} to {(1 << bits) - 1:<12,} {number:>9,} {bar}")
    return lines


def check_plot(path: Path | None) -> None:
    """Check that a plot can be drawn, if one is wanted.

    Raises:
        ConfigError: matplotlib is missing.
    """
    if path and find_spec("matplotlib") is None:
        raise ConfigError(f"--histogram: {path} needs matplotlib; pip install matplotlib, or leave it out")


def plot_lengths(counts: Sequence[int] | None, path: Path) -> None:
    """Draw the histogram of `length_lines` as a PNG file.

    Raises:
        ConfigError: the file cannot be written, or the shards do not say how long their documents are (counts is None).
    """
    from matplotlib.figure import Figure

    if counts is None:
        raise ConfigError("--histogram: these shards do not say how long their documents are; leave it out")

    used = [bits for bits, number in enumerate(counts) if number]
    bins = list(range(used[0], used[-1] + 1))
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.bar([str(1 << (bits - 1)) for bits in bins], [counts[bits] for bits in bins], width=0.9)
    axes.set_xlabel("tokens per document: from this number to below twice this number")
    axes.set_ylabel("documents")
    axes.tick_params(axis="x", rotation=60)
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise ConfigError(f"--histogram: {path} cannot be written ({error.strerror}); name another file") from None
