"""The samples for the held-out loss, and the loss that a model reaches on them that knows only token frequencies."""

import numpy as np
from numpy.typing import NDArray

from colt5dist.data.config import DataConfig
from colt5dist.data.order.batch_layout import BatchLayout
from colt5dist.data.read.batch import FILLER, Batch, make_batch
from colt5dist.data.read.samples import Samples
from colt5dist.data.read.shards import ShardSet
from colt5dist.data.read.sources import Sources, as_sources

HELD_OUT_SEED = 0
"""Random seed of the held-out samples: the same for all runs, so that their held-out losses can be compared."""


def held_out_samples(shards: ShardSet | Sources, config: DataConfig) -> Samples:
    """Return what makes the held-out samples.

    Args:
        shards: the training set; its held-out documents are read.
        config: lengths and mixture.
    """
    return Samples(as_sources(shards).validation, config, seed=HELD_OUT_SEED, in_turn=True)


def held_out_batches(
    shards: ShardSet | Sources,
    config: DataConfig,
    *,
    num_samples: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    inputs_of_previous: bool = False,
) -> list[Batch]:
    """Return one rank's share of the held-out samples 0..num_samples-1.

    The objectives take turns: sample i of a set has objective number i modulo the number of objectives. Of pairs, each
    is there once at most, so there may be fewer.

    Args:
        shards: the training set; its held-out documents are read.
        config: lengths and mixture.
        num_samples: samples of all ranks together. A small held-out set shows its text several times, with other masks.
        micro_batch_size: rows (samples) per batch.
        rank: number of this rank.
        world_size: number of ranks.
        inputs_of_previous: whether each sample gets the input of the sample before it, and the first that of the last.

    Returns:
        The same number of batches for every rank; rows without a sample have sample_index -1 and masks that are False.
    """
    samples = held_out_samples(shards, config)
    chosen = held_out_numbers(samples, num_samples)
    samples_per_batch = world_size * micro_batch_size
    numbers = np.full(-(-len(chosen) // samples_per_batch) * samples_per_batch, FILLER)
    numbers[: len(chosen)] = chosen
    layout = BatchLayout(world_size=world_size, micro_batch_size=micro_batch_size)
    batches = [make_batch(samples, batch) for batch in layout.micro_batches(numbers, rank).tolist()]
    if inputs_of_previous:
        others = np.full_like(numbers, FILLER)
        others[: len(chosen)] = np.roll(chosen, 1)
        for batch, rows in zip(batches, layout.micro_batches(others, rank).tolist(), strict=True):
            other = make_batch(samples, rows)
            batch["input_ids"], batch["input_mask"] = other["input_ids"], other["input_mask"]
    return batches


def held_out_numbers(samples: Samples, num_samples: int) -> NDArray[np.int64]:
    """Return the numbers of the held-out samples that are measured: the first ones, but no pair a second time.

    Args:
        samples: what `held_out_samples` returns.
        num_samples: most samples.
    """
    if samples.num_pairs is None:
        return np.arange(num_samples)
    number, wanted = 0, min(num_samples, sum(samples.num_pairs))
    found: list[int] = []
    while len(found) < wanted:
        source, place = samples.place_in_set(number)
        if place < samples.num_pairs[source]:
            found.append(number)
        number += 1
    return np.array(found, dtype=np.int64)


def unigram_entropy(shards: ShardSet | Sources, config: DataConfig, *, num_samples: int) -> float:
    """Return the entropy of the target tokens of the held-out samples 0..num_samples-1, in nats per token.

    It is the loss of a model that knows the frequencies of these tokens and nothing else. Sentinels and end tokens
    count, as they do in the loss.

    Args:
        shards: the training set; its held-out documents are read.
        config: lengths and mixture.
        num_samples: number of held-out samples.
    """
    batches = held_out_batches(shards, config, num_samples=num_samples, micro_batch_size=1, rank=0, world_size=1)
    tokens = np.concatenate([batch["target_ids"][batch["target_mask"]].numpy() for batch in batches])
    counts = np.bincount(tokens)
    shares = counts[counts > 0] / len(tokens)
    return float(-(shares * np.log(shares)).sum())
