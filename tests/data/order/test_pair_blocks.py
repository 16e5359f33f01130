"""The order of pairs: every pair once an epoch and whole, shuffled over the set, a pure function of (seed, i)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colt5dist.data.order.pair_blocks import PairBlocks
from colt5dist.data.order.plan import Plan


def documents_of(plan: Plan, first: int, count: int, ends: np.ndarray) -> list[int]:
    """Numbers of the documents that some samples are, each whole."""
    found = []
    for number in range(first, first + count):
        chunk = plan.sample(number).chunk
        (start,), (stop,) = chunk.starts.tolist(), chunk.stops.tolist()
        document = int(np.searchsorted(ends, stop))
        assert ends[document] == stop and start == (ends[document - 1] if document else 0) and not chunk.ended[0]
        found.append(document)
    return found


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(3, 60) | st.integers(60, 5000), min_size=1, max_size=120),
    block_tokens=st.integers(8, 2000),
    seed=st.integers(0, 1000),
)
def test_an_epoch_shows_every_pair_once(lengths: list[int], block_tokens: int, seed: int) -> None:
    ends = np.cumsum(np.array(lengths, dtype=np.int64))
    blocks = PairBlocks(ends, block_tokens)
    assert blocks.bounds[0] == 0 and blocks.bounds[-1] == ends[-1] and (np.diff(blocks.bounds) > 0).all()
    assert blocks.counts.sum() == len(lengths) and (blocks.counts > 0).all()
    assert set(blocks.bounds[1:].tolist()) <= set(ends.tolist())
    # a block is at most one pair longer than asked for
    assert np.diff(blocks.bounds).max() <= 1.5 * block_tokens + max(lengths) + 1
    plan = Plan(ends, [block_tokens], seed=seed, pairs=True)
    for epoch in range(3):
        assert plan.epoch_samples(epoch) == len(lengths)
        assert sorted(documents_of(plan, epoch * len(lengths), len(lengths), ends)) == list(range(len(lengths)))


def test_epochs_differ_and_samples_come_from_everywhere() -> None:
    """Neighbours in the order are no neighbours in the set; another seed gives another order; any sample at once."""
    rng = np.random.default_rng(0)
    ends = np.cumsum(rng.integers(200, 3000, size=6000))
    plan = Plan(ends, [1500], seed=3, pairs=True)
    assert plan.blocks.num_blocks > 16
    first, second = (documents_of(plan, epoch * 6000, 6000, ends) for epoch in range(2))
    other = documents_of(Plan(ends, [1500], seed=4, pairs=True), 0, 6000, ends)
    for order in (first, second, other):
        assert np.abs(np.diff(order)).mean() == pytest.approx(2000, rel=0.05)  # as in a random order
        # about a hundred blocks are divided at random between the windows
        assert abs(np.corrcoef(order, np.arange(6000))[0, 1]) < 3 / np.sqrt(plan.blocks.num_blocks)
    assert len({tuple(first), tuple(second), tuple(other)}) == 3
    again = Plan(ends, [1500], seed=3, pairs=True)
    assert documents_of(again, 9000, 10, ends) == second[3000:3010]
