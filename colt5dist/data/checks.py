"""Whether settings, shards and model fit together; to be asked before a device is touched."""

import numpy as np

from colt5dist.data.config import DataConfig
from colt5dist.data.objectives import required_sentinels
from colt5dist.data.shards import ShardSet

VOCABULARY_MULTIPLE = 128


def data_problems(config: DataConfig, shards: ShardSet, vocab_size: int) -> list[str]:
    """Everything that does not fit, one line each, the key first.

    Args:
        config: settings without problems of their own.
        shards: the opened training set.
        vocab_size: rows of the model's embedding (model.vocab_size).
    """
    problems = []
    num_sentinels = required_sentinels(config) if config.num_sentinels is None else config.num_sentinels
    needed = shards.tokenizer.vocab_size + num_sentinels
    if vocab_size < needed:
        padded = -(-needed // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        problems.append(
            f"model.vocab_size: {vocab_size} is too small for {shards.tokenizer.vocab_size} ids of the tokenizer of "
            f"{shards.folder} and {num_sentinels} sentinels; set {padded} or more"
        )
    for name, part in (("training", shards), ("held-out", shards.validation)):
        longest = int(np.diff(part.index.document_ends, prepend=0).max())
        if longest < config.min_document_tokens:
            problems.append(
                f"data.min_document_tokens: {config.min_document_tokens} leaves out all {name} documents, of which the "
                f"longest has {longest} tokens; lower it to {longest} or less"
            )
    return problems
