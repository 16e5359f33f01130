"""Checks whether settings, shards and model fit together, before any GPU work starts."""

from collections.abc import Iterator, Mapping

import numpy as np

from colt5dist.data.config import DataConfig
from colt5dist.data.order.mixture import parse_mixture
from colt5dist.data.prepare.pair_lengths import PairLengths
from colt5dist.data.read.shards import ShardSet
from colt5dist.data.read.sources import Sources, as_sources
from colt5dist.data.sample_lengths import required_sentinels
from colt5dist.wording import count

VOCABULARY_MULTIPLE = 128  # of the size that an error message proposes
MUCH_PADDING = 0.5  # share of the inputs from which it is said


def data_problems(config: DataConfig, shards: ShardSet | Sources, vocab_size: int) -> list[str]:
    """Return everything that does not fit, one line each, which begins with the key.

    Args:
        config: settings that are valid by themselves.
        shards: the opened training set, or several.
        vocab_size: rows of the model's embedding (model.vocab_size).
    """
    sources = as_sources(shards)
    problems = [line for part in sources.parts for line in _of_another_kind(config, part)]
    num_sentinels = config.num_sentinels
    if num_sentinels is None:
        num_sentinels = 0 if config.is_pairs else required_sentinels(config)  # pairs use none
    num_modes = parse_mixture(config.mixture).num_modes
    needed = sources.tokenizer.vocab_size + num_modes + num_sentinels
    if vocab_size < needed:
        padded = -(-needed // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        problems.append(
            f"model.vocab_size: {vocab_size} is too small for the {sources.tokenizer.vocab_size} ids of the tokenizer "
            f"of {sources.parts[0].folder}{f', {num_modes} mode tokens' if num_modes else ''} and {num_sentinels} "
            f"sentinels; set {padded} or more"
        )
    for name, group in (("training", sources), ("held-out", sources.validation)):
        problems += [line for part in group.parts for line in _without_documents(config, part, f"{name} documents")]
    return problems


def pair_notes(config: DataConfig, shards: Sources) -> list[str]:
    """Return what these lengths mean for a set of pairs: how many are cut, and how much of the inputs is padding.

    The trainer prints these lines at start. They come from the lengths that were counted when the shards were made.

    Args:
        config: the settings, with data.mixture pairs.
        shards: the training sets.
    """
    notes = []
    for part in shards.parts:
        lengths = {side: PairLengths(counts) for side, counts in part.manifest.source["pairs"].items()}
        for side, key, most in (
            ("inputs", "input_length", config.input_length),
            ("targets", "target_length", config.target_length),
        ):
            number, is_exact = lengths[side].above(most - 1)  # the end token needs a place
            if number:
                cut_at = config.cut_inputs_at if side == "inputs" else "end"
                notes.append(
                    f"data.{key}: {'' if is_exact else 'up to '}{number:,} of the {count(lengths[side].total, 'pair')} "
                    f"of {part.folder} have longer {side}, which are cut at their {cut_at}"
                )
        padding = 1 - lengths["inputs"].mean(config.input_length - 1) / config.input_length
        if padding > MUCH_PADDING:
            notes.append(
                f"data.input_length: about {padding:.0%} of the inputs from {part.folder} is padding; 95% of them have "
                f"at most about {lengths['inputs'].quantile(0.95):,} tokens"
            )
    return notes


def validation_problems(config: DataConfig, sets: Mapping[str, Sources]) -> list[str]:
    """Return which validation sets have no document to measure, or none of the right kind, one line each.

    Args:
        config: settings that are valid by themselves.
        sets: the sets by name, made with the tokenizer of the training text.
    """
    parts = [(part, f"held-out documents of {name}") for name, group in sets.items() for part in group.validation.parts]
    problems = [line for group in sets.values() for part in group.parts for line in _of_another_kind(config, part)]
    return problems + [line for part, documents in parts for line in _without_documents(config, part, documents)]


def _of_another_kind(config: DataConfig, part: ShardSet) -> Iterator[str]:
    """Whether a set holds pairs where documents are needed, or the reverse."""
    if part.manifest.holds_pairs and not config.is_pairs:
        yield f"data.mixture: {config.mixture} does not fit {part.folder}, which holds pairs; set data.mixture=pairs"
    elif config.is_pairs and not part.manifest.holds_pairs:
        yield (
            f"data.mixture: pairs does not fit {part.folder}, which holds documents; make it with launch/prepare.py "
            "--pairs, or set data.mixture=colt5"
        )


def _without_documents(config: DataConfig, part: ShardSet, documents: str) -> Iterator[str]:
    lengths = np.diff(part.index.document_ends, prepend=0)
    longest = int(lengths.max()) if len(lengths) else 0
    if not longest:
        yield f"{part.folder}: holds no document; prepare the shards again"
    elif longest < config.min_document_tokens:
        yield (
            f"data.min_document_tokens: {config.min_document_tokens} leaves out all {documents} (the longest has "
            f"{longest} tokens); lower it to {longest} or less"
        )
