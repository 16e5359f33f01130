"""Checks whether settings, shards and model fit together, before any GPU work starts."""

from collections.abc import Iterator, Mapping

import numpy as np

from colt5dist.data.config import DataConfig
from colt5dist.data.order.mixture import parse_mixture
from colt5dist.data.read.shards import ShardSet
from colt5dist.data.read.sources import Sources, as_sources
from colt5dist.data.sample_lengths import required_sentinels

VOCABULARY_MULTIPLE = 128  # of the size that an error message proposes


def data_problems(config: DataConfig, shards: ShardSet | Sources, vocab_size: int) -> list[str]:
    """Return everything that does not fit, one line each, which begins with the key.

    Args:
        config: settings that are valid by themselves.
        shards: the opened training set, or several.
        vocab_size: rows of the model's embedding (model.vocab_size).
    """
    problems = []
    num_sentinels = required_sentinels(config) if config.num_sentinels is None else config.num_sentinels
    sources = as_sources(shards)
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


def validation_problems(config: DataConfig, sets: Mapping[str, Sources]) -> list[str]:
    """Return which validation sets have no document to measure, one line each.

    Args:
        config: settings that are valid by themselves.
        sets: the sets by name, made with the tokenizer of the training text.
    """
    parts = [(part, f"held-out documents of {name}") for name, group in sets.items() for part in group.validation.parts]
    return [line for part, documents in parts for line in _without_documents(config, part, documents)]


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
