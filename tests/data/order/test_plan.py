"""The order of samples: every token once per epoch, equal shares, global shuffle, pure functions of (seed, i)."""

import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colt5dist.data.config import DataConfig
from colt5dist.data.order.blocks import Blocks
from colt5dist.data.order.plan import DEALS, Plan, block_tokens
from colt5dist.data.read.samples import Samples
from colt5dist.data.read.shards import ShardSet


def ends_of(lengths: list[int] | np.ndarray) -> np.ndarray:
    """Ends of documents with given lengths."""
    return np.cumsum(np.asarray(lengths, dtype=np.int64))


def show_counts(plan: Plan, epoch_start: int, num_samples: int, num_tokens: int) -> np.ndarray:
    """How often each token of the set is shown by a range of samples."""
    shown = np.zeros(num_tokens, dtype=np.int64)
    for number in range(epoch_start, epoch_start + num_samples):
        chunk = plan.sample(number).chunk
        for start, stop in zip(chunk.starts.tolist(), chunk.stops.tolist(), strict=True):
            shown[start:stop] += 1
    return shown


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 400) | st.integers(400, 6000), min_size=1, max_size=60),
    raw_lengths=st.lists(st.integers(4, 300), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_an_epoch_shows_every_token_once(lengths: list[int], raw_lengths: list[int], seed: int) -> None:
    """Except for less than one sample per block; and pieces stay inside documents."""
    ends = ends_of(lengths)
    plan = Plan(ends, raw_lengths, seed=seed)
    first = 0
    for epoch in range(3):
        num_samples = plan.epoch_samples(epoch)
        shown = show_counts(plan, first, num_samples, int(ends[-1]))
        assert shown.max() == 1
        assert (shown == 0).sum() <= plan.blocks.num_blocks * (max(raw_lengths) - 1)
        for number in range(first, first + num_samples):
            sample = plan.sample(number)
            chunk, raw_tokens = sample.chunk, plan.raw_lengths[sample.objective]
            assert sample.epoch == epoch and sample.index == number
            block = plan.blocks.counts[sample.block, sample.objective]
            assert chunk.num_tokens == raw_tokens or (block == 1 and 2 <= chunk.num_tokens < raw_tokens)
            # no piece crosses the end of a document
            pieces = chunk.stops > chunk.starts
            documents = np.searchsorted(ends, chunk.starts[pieces], side="right")
            assert (chunk.stops[pieces] <= ends[documents]).all()
        first += num_samples


def test_an_epoch_of_ten_thousand_documents() -> None:
    """Every token once, except for less than one sample per block, here less than one token in a hundred."""
    rng = np.random.default_rng(0)
    ends = ends_of(np.maximum(rng.lognormal(np.log(300), 1.0, 10_000), 1).astype(np.int64))
    plan = Plan(ends, [500, 700, 600, 650], seed=0)
    shown = show_counts(plan, 0, plan.epoch_samples(0), int(ends[-1]))
    assert shown.max() == 1
    left = int((shown == 0).sum())
    assert left <= plan.blocks.num_blocks * 699 and left < 0.01 * len(shown)


def test_long_documents_are_cut_into_consecutive_chunks() -> None:
    """A long document fills a row alone; tails and short documents are joined with end tokens between them."""
    blocks = Blocks(ends_of([25, 7, 10, 4]), 1000, (10,))
    assert blocks.num_blocks == 1 and blocks.counts.tolist() == [[3 + 1]]
    layout = blocks.layout(0, 0)
    chunks = [layout.chunk(number, 0) for number in range(4)]
    assert [(c.starts.tolist(), c.stops.tolist(), c.ended.tolist()) for c in chunks[:3]] == [
        ([0], [10], [False]),
        ([10], [20], [False]),
        ([32], [42], [False]),
    ]
    # the tail of the first, an end token, and the beginning of the second
    assert (chunks[3].starts.tolist(), chunks[3].stops.tolist()) == ([20, 25], [25, 29])
    assert chunks[3].ended.tolist() == [True, False] and chunks[3].num_tokens == 10
    # joined: 5 + 1, 7 + 1, 4 + 1 tokens; 9 are left over, before or behind
    assert layout.num_offsets == 10
    last = layout.chunk(3, 9)
    assert (last.starts.tolist(), last.stops.tolist(), last.ended.tolist()) == ([28, 42], [32, 46], [True, True])


def test_blocks_end_at_documents_where_they_can() -> None:
    """Short documents are never split by a block; a document longer than a block continues in the next one."""
    rng = np.random.default_rng(0)
    ends = ends_of(rng.integers(1, 50, 2000))
    blocks = Blocks(ends, 1000, (20,))
    assert set(blocks.bounds[1:].tolist()) <= set(ends.tolist())
    assert np.abs(np.diff(blocks.bounds) - 1000).max() <= 510
    long = Blocks(ends_of([10, 10_000, 10]), 1000, (20,))
    assert long.num_blocks == 10 and np.ptp(np.diff(long.bounds)) <= 1
    # the tail of its part gets no end token until the document ends
    last_pieces = [long.layout(block, 0) for block in range(long.num_blocks)]
    ended = [bool(layout.chunk(layout.num_chunks - 1, layout.num_offsets - 1).ended[-1]) for layout in last_pieces]
    assert ended == [False] * 9 + [True]
    # the counts of Blocks for all blocks at once are those of the layouts
    for cut in (blocks, long):
        for block in range(cut.num_blocks):
            assert cut.layout(block, 0).num_chunks == cut.counts[block, 0]


def test_short_documents_can_be_left_out() -> None:
    """min_document_tokens applies to the whole document, not to its part in a block."""
    lengths = [5, 5000, 9, 10, 11, 3] * 10
    ends = ends_of(lengths)
    plan = Plan(ends, [8, 13], seed=1, min_document_tokens=10)
    shown = show_counts(plan, 0, plan.epoch_samples(0), int(ends[-1]))
    short = np.repeat(np.array(lengths) < 10, lengths)
    assert not shown[short].any() and shown[~short].mean() > 0.95


def test_counting_many_documents_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound on memory does not change the result."""
    ends = ends_of(np.random.default_rng(1).integers(1, 300, 5000))
    whole = Blocks(ends, 2000, (50, 70), min_document_tokens=20).counts
    monkeypatch.setattr("colt5dist.data.order.blocks.DOCUMENTS_AT_ONCE", 37)
    assert np.array_equal(Blocks(ends, 2000, (50, 70), min_document_tokens=20).counts, whole)


def test_objectives_share_the_samples_equally() -> None:
    """Over an epoch of a large set each objective has its share, although they take different lengths of text."""
    ends = ends_of(np.random.default_rng(2).integers(100, 3000, 20_000))
    plan = Plan(ends, [400, 1000, 500, 600], seed=0)
    num_samples = plan.epoch_samples(0)
    counts = np.bincount([plan.sample(number).objective for number in range(num_samples)], minlength=4)
    assert num_samples > 30_000
    assert np.abs(counts / num_samples - 0.25).max() < 0.005
    # and so has any range of the run, as with random draws
    stretch = np.bincount([plan.sample(number).objective for number in range(2000, 4000)], minlength=4)
    assert np.abs(stretch - 500).max() < 5 * (2000 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("num_documents", [3, 10, 40])
def test_small_sets_balance_over_the_epochs(num_documents: int) -> None:
    """Where an epoch has too few blocks for equal shares, the next epochs compensate."""
    plan = Plan(ends_of([900] * num_documents), [100, 250, 120, 150], seed=0)
    num_samples = sum(plan.epoch_samples(epoch) for epoch in range(20))
    counts = np.bincount([plan.sample(number).objective for number in range(num_samples)], minlength=4)
    assert np.ptp(counts) <= 2 * plan.blocks.counts.max()


def test_a_single_block_shows_all_objectives_in_turn() -> None:
    """A set of one short document gives a short sample with another objective in every epoch."""
    plan = Plan(ends_of([50]), [400, 500, 600, 700], seed=0)
    samples = [plan.sample(number) for number in range(8)]
    assert Counter(sample.objective for sample in samples) == {0: 2, 1: 2, 2: 2, 3: 2}
    assert all(sample.chunk.num_tokens == 51 and sample.epoch == sample.index for sample in samples)


def test_neighbours_in_order_are_not_neighbours_in_the_set() -> None:
    """A range as long as a batch comes from all parts of a window; windows are spread over the set."""
    ends = ends_of(np.random.default_rng(3).integers(100, 3000, 40_000))
    plan = Plan(ends, [500, 600], seed=0)
    blocks = np.array([plan.sample(number).block for number in range(4096)])
    num_blocks = plan.blocks.num_blocks
    assert num_blocks > 3 * plan.window_blocks
    # 256 samples of a window with 64 blocks: 256 draws leave about one block in 55 untouched
    for start in range(0, 2048, 256):
        assert len(set(blocks[start : start + 256].tolist())) >= 50
    # the blocks of a window are a random subset: their mean place is near the middle
    assert abs(blocks[:2000].mean() / num_blocks - 0.5) < 5 * (1 / 12 / plan.window_blocks) ** 0.5


def test_epochs_and_seeds_differ() -> None:
    """Another epoch or seed gives another order; the same ones give the same order."""
    ends = ends_of([3000] * 40)

    def order(seed: int, first: int) -> list[tuple[int, ...]]:
        plan = Plan(ends, [100, 120], seed=seed)
        return [tuple(plan.sample(number).chunk.starts.tolist()) for number in range(first, first + 50)]

    second = Plan(ends, [100, 120], seed=1).epoch_samples(0)
    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, second)
    assert order(1, 0) != order(2, 0)


def test_any_sample_is_found_at_once() -> None:
    """Sample i is the same whatever was asked before, also after many epochs, beyond the repetition of the deals."""
    ends = ends_of([70, 900, 30, 450, 800, 20, 610])
    walked = Plan(ends, [40, 55, 70], seed=4)
    total = sum(walked.epoch_samples(epoch) for epoch in range(DEALS + 3))
    expected = [walked.sample(number) for number in range(total)]
    for number in [total - 1, 0, total // 2, 17, total - 40]:
        found, known = Plan(ends, [40, 55, 70], seed=4).sample(number), expected[number]
        assert (found.epoch, found.objective, found.block) == (known.epoch, known.objective, known.block)
        assert np.array_equal(found.chunk.starts, known.chunk.starts)
        assert np.array_equal(found.chunk.stops, known.chunk.stops)
    assert expected[-1].epoch == DEALS + 2
    epochs = [sample.epoch for sample in expected]
    assert epochs == sorted(epochs)
    # deals repeat, orders do not
    first, again = [[s for s in expected if s.epoch == epoch] for epoch in (1, DEALS + 1)]
    assert len(first) == len(again)
    assert [s.chunk.starts.tolist() for s in first] != [s.chunk.starts.tolist() for s in again]


def test_blocks_are_sized_for_the_input() -> None:
    """About 64 samples per block, fewer for long inputs and small sets, at least 8 unless the set is smaller."""
    assert block_tokens(4805, 1 << 40) == 64 * 4805
    assert block_tokens(76888, 1 << 40) == 32 * 76888
    assert block_tokens(4805, 10**6) == 10**6 // 16
    assert block_tokens(4805, 10**4) == 8 * 4805


def test_plan_of_ten_million_documents() -> None:
    """Planning, and the first sample far into the run, take little time and memory."""
    script = """
import numpy, re, time
from pathlib import Path
from colt5dist.data.order.plan import Plan
ends = numpy.cumsum(numpy.random.default_rng(0).integers(100, 1600, 10_000_000))
def peak_kib(): return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak_kib()
start = time.process_time()
Plan(ends, [4550, 4550, 4714, 4805], seed=0).sample(5_000_000)
print(time.process_time() - start, (peak_kib() - before) / 1024)
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ)
    seconds, megabytes = map(float, output.stdout.split())
    assert seconds < 3 and megabytes < 100  # processor seconds


def test_a_sample_depends_on_seed_and_number_alone(shards: ShardSet) -> None:
    """The order of access and a new start change nothing; another seed does."""
    config = DataConfig(input_length=64, target_length=32)

    def read(seed: int, numbers: list[int]) -> dict[int, tuple[list[int], list[int]]]:
        samples = Samples(shards, config, seed=seed)
        rows = {}
        for number in numbers:
            inputs, targets = np.zeros(64, dtype=np.int64), np.zeros(32, dtype=np.int64)
            samples.write(number, inputs, targets)
            rows[number] = inputs.tolist(), targets.tolist()
        return rows

    numbers = [0, 5, 9000, 17, 123456, 6]
    assert read(1, numbers) == read(1, sorted(numbers)) == read(1, numbers[::-1])
    assert read(1, numbers) != read(2, numbers)


def test_every_sample_has_a_mask_of_its_own(shards: ShardSet) -> None:
    """Samples of one objective are corrupted at different positions; a text changes positions in the next epoch."""
    samples = Samples(shards, DataConfig(input_length=64, target_length=32), seed=1)
    masks = []
    for number in range(400):
        inputs, targets = np.zeros(64, dtype=np.int64), np.zeros(32, dtype=np.int64)
        samples.write(number, inputs, targets)
        if samples.planned(number).objective == 1:
            masks.append(tuple(np.flatnonzero(inputs >= shards.tokenizer.vocab_size)))
    assert len(masks) > 60 and len(set(masks)) > 0.9 * len(masks)


def test_every_block_is_cut_at_a_place_of_its_own() -> None:
    """Equal blocks begin their joined text at different places, and at others in the next epoch."""
    plan = Plan(ends_of([900] * 4000), [1000], seed=0)
    assert plan.blocks.num_blocks > 20
    cuts = [[plan._make_layout(epoch, block, 0)[1] for block in range(plan.blocks.num_blocks)] for epoch in (0, 1)]
    assert len(set(cuts[0])) > len(cuts[0]) / 2
    assert cuts[0] != cuts[1]
