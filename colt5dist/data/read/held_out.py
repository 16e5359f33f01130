"""The samples that held-out loss is measured on, and the loss that token frequencies alone reach on them."""

import numpy as np

from colt5dist.data.config import DataConfig
from colt5dist.data.read.batch import FILLER, Batch, make_batch
from colt5dist.data.read.samples import Samples
from colt5dist.data.read.shards import ShardSet
from colt5dist.data.read.sources import Sources, as_sources

HELD_OUT_SEED = 0
"""The same for all runs, so that their held-out losses can be compared."""


def held_out_batches(
    shards: ShardSet | Sources,
    config: DataConfig,
    *,
    num_samples: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
) -> list[Batch]:
    """One rank's share of the held-out samples 0..num_samples-1; sample i of a set has objective i modulo their number.

    Args:
        shards: the training set; its held-out documents are read.
        config: lengths and mixture.
        num_samples: samples of all ranks together. A small held-out set shows its text several times, with other masks.
        micro_batch_size: rows of a batch.
        rank: number of this rank; it gets samples rank, rank + world_size, ...
        world_size: number of ranks.

    Returns:
        Equally many batches for every rank; rows without a sample have sample_index -1 and masks that are False.
    """
    samples = Samples(as_sources(shards).validation, config, seed=HELD_OUT_SEED, in_turn=True)
    num_batches = -(-num_samples // (world_size * micro_batch_size))
    numbers = np.arange(num_batches * micro_batch_size) * world_size + rank
    numbers[numbers >= num_samples] = FILLER
    return [make_batch(samples, part.tolist()) for part in numbers.reshape(num_batches, micro_batch_size)]


def unigram_entropy(shards: ShardSet | Sources, config: DataConfig, *, num_samples: int) -> float:
    """Nats per token of the targets of the held-out samples 0..num_samples-1, under their own token frequencies.

    It is the loss of a model that knows these frequencies and nothing else. Sentinels and end tokens count as they
    count in the loss.
    """
    batches = held_out_batches(shards, config, num_samples=num_samples, micro_batch_size=1, rank=0, world_size=1)
    tokens = np.concatenate([batch["target_ids"][batch["target_mask"]].numpy() for batch in batches])
    counts = np.bincount(tokens)
    shares = counts[counts > 0] / len(tokens)
    return float(-(shares * np.log(shares)).sum())
