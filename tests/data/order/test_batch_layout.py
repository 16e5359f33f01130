"""Which rank, micro-batch and row a sample gets: one place each, and both directions agree."""

import numpy as np
import pytest

from colt5dist.data.order.batch_layout import BatchLayout, SamplePlace


def test_rank_r_of_w_gets_samples_r_and_every_w_th_after_it() -> None:
    layout = BatchLayout(world_size=2, micro_batch_size=3)
    samples = np.arange(100, 112)
    assert layout.micro_batches(samples, 0).tolist() == [[100, 102, 104], [106, 108, 110]]
    assert layout.micro_batches(samples, 1).tolist() == [[101, 103, 105], [107, 109, 111]]
    assert layout.place(9) == SamplePlace(rank=1, micro_batch=1, row=1)


@pytest.mark.parametrize(
    "world_size, micro_batch_size, num_micro_batches", [(1, 1, 1), (1, 4, 3), (3, 1, 2), (4, 2, 5)]
)
def test_place_and_micro_batches_agree(world_size: int, micro_batch_size: int, num_micro_batches: int) -> None:
    layout = BatchLayout(world_size=world_size, micro_batch_size=micro_batch_size)
    samples = np.random.default_rng(0).permutation(world_size * micro_batch_size * num_micro_batches)
    shares = [layout.micro_batches(samples, rank) for rank in range(world_size)]
    for position, sample in enumerate(samples.tolist()):
        place = layout.place(position)
        assert shares[place.rank][place.micro_batch, place.row] == sample
    assert sum(share.size for share in shares) == len(samples)
