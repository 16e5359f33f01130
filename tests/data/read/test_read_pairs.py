"""Pairs as samples: the texts themselves, cut where they are too long; any number of ranks and workers; held out."""

from pathlib import Path

import numpy as np
import pytest

from colt5dist.data import DataConfig, Sources, data_problems, held_out_batches, pair_notes, training_batches
from colt5dist.data.inputs.pairs import Pair
from colt5dist.data.prepare.held_out_split import CorpusWriter
from colt5dist.data.prepare.tokenize_texts import encode_document
from colt5dist.data.read.batch import FILLER
from colt5dist.data.read.samples import Samples
from colt5dist.data.read.shards import ShardSet, open_shards
from colt5dist.data.read.sources import as_sources
from colt5dist.data.tokenizer import ByteTokenizer

INPUT, TARGET = 48, 16
PAIRS = [Pair(f"{n}: " + "abcdefgh" * (n % 9), f"<{n}>" + "xyz" * (n % 7)) for n in range(150)]
IDS = ByteTokenizer()


def write_pairs(folder: Path, pairs: list[Pair], fraction: float) -> ShardSet:
    """Write a set of pairs and open it."""
    writer = CorpusWriter(folder, IDS, validation_fraction=fraction, pairs=True)
    for pair in pairs:
        writer.add_document(encode_document(IDS, pair))
    writer.close({})
    return open_shards(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Pairs with inputs and targets of many lengths, also too long ones."""
    return write_pairs(tmp_path_factory.mktemp("pairs") / "shards", PAIRS, 0.2)


def config(**settings: object) -> DataConfig:
    """Small samples."""
    given = {"mixture": "pairs", "input_length": INPUT, "target_length": TARGET, "num_workers": 0, **settings}
    return DataConfig(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("side", ["end", "beginning"])
def test_samples_are_the_texts(shards: ShardSet, side: str) -> None:
    """With an end token each; what is too long loses tokens on the stated side, the target at its end."""
    samples = Samples(shards, config(cut_inputs_at=side), seed=1)
    seen, num_cut = set(), 0
    for number in range(shards.num_documents):
        inputs, targets = np.zeros(INPUT, dtype=np.int64), np.zeros(TARGET, dtype=np.int64)
        num_inputs, num_targets, objective = samples.write(number, inputs, targets)
        assert objective == 0 and inputs[num_inputs - 1] == targets[num_targets - 1] == IDS.eos_id
        assert not inputs[num_inputs:].any() and not targets[num_targets:].any()
        target = IDS.decode(targets[: num_targets - 1])
        pair = PAIRS[int(target[1 : target.index(">")])]
        most = INPUT - 1
        expected = pair.input[-most:] if side == "beginning" else pair.input[:most]
        assert IDS.decode(inputs[: num_inputs - 1]) == expected and target == pair.target[: TARGET - 1]
        lengths, positions = samples.target_places(number)
        assert set(lengths.tolist()) == {len(pair.input) + 1 + len(pair.target)}
        begin = len(pair.input) + 1
        assert positions.tolist() == [*range(begin, begin + num_targets - 1), begin + num_targets - 2]
        seen.add(pair)
        num_cut += expected != pair.input and target != pair.target
    assert len(seen) == shards.num_documents and num_cut > 5


def rows(shards: ShardSet, world_size: int, num_workers: int, first_sample: int) -> dict[int, tuple[int, ...]]:
    """The samples of three global batches by their numbers."""
    found = {}
    for rank in range(world_size):
        batches = training_batches(
            shards,
            config(num_workers=num_workers),
            seed=7,
            global_batch_size=8,
            micro_batch_size=2,
            rank=rank,
            world_size=world_size,
            first_sample=first_sample,
        )
        for _ in range(3):
            for batch in next(batches):
                for row, number in enumerate(batch["sample_index"].tolist()):
                    found[number] = (*batch["input_ids"][row].tolist(), *batch["target_ids"][row].tolist())
        batches.close()
    return found


def test_ranks_workers_and_restarts_change_nothing(shards: ShardSet) -> None:
    first = shards.num_documents - 10  # over the end of an epoch
    whole = rows(shards, 1, 0, first)
    assert sorted(whole) == list(range(first, first + 24))
    assert rows(shards, 2, 2, first) == whole and rows(shards, 4, 1, first) == whole
    later = rows(shards, 2, 0, first + 8)
    assert {number: later[number] for number in range(first + 8, first + 24)} == {
        number: whole[number] for number in range(first + 8, first + 24)
    }


def test_every_held_out_pair_is_measured_once(shards: ShardSet, tmp_path: Path) -> None:
    """Whatever the number of processes; of several sets each pair of each; or as many as are asked for."""
    small = write_pairs(tmp_path / "small", [Pair(f"in {n}", f"out {n}") for n in range(12)], 0.4)
    both = Sources((shards, small), (1.0, 3.0))
    for sets, most in ((as_sources(shards), 10_000), (both, 10_000), (as_sources(shards), 7)):
        expected = min(most, sum(part.validation.num_documents for part in sets.parts))
        numbers, texts = [], set()
        for world_size in (1, 3):
            numbers.append(set())
            for rank in range(world_size):
                for batch in held_out_batches(
                    sets, config(), num_samples=most, micro_batch_size=4, rank=rank, world_size=world_size
                ):
                    for row, number in enumerate(batch["sample_index"].tolist()):
                        assert (number == FILLER) == (not batch["target_mask"][row].any())
                        if number != FILLER:
                            assert number not in numbers[-1]
                            numbers[-1].add(number)
                            texts.add((*batch["input_ids"][row].tolist(), *batch["target_ids"][row].tolist()))
        assert numbers[0] == numbers[1] and len(numbers[0]) == len(texts) == expected


def test_the_input_of_the_pair_before(shards: ShardSet) -> None:
    """For the loss with another sample's input: same targets, and the inputs moved by one."""
    usual, others = (
        held_out_batches(
            shards,
            config(),
            num_samples=6,
            micro_batch_size=6,
            rank=0,
            world_size=1,
            inputs_of_previous=previous,
        )[0]
        for previous in (False, True)
    )
    assert (usual["target_ids"] == others["target_ids"]).all()
    assert (usual["input_ids"].roll(1, 0) == others["input_ids"]).all()


def test_sets_and_mixtures_have_to_fit(shards: ShardSet, make_shards: object) -> None:
    """Pairs are read as pairs and documents as documents; no sentinel is needed for pairs."""
    documents = make_shards(["some text " * 50] * 3)  # type: ignore[operator]
    assert data_problems(config(), shards, 259) == []
    (problem,) = data_problems(config(), documents, 512)
    assert problem.startswith("data.mixture: pairs does not fit") and "prepare.py --pairs" in problem
    (problem,) = data_problems(config(mixture="colt5"), shards, 512)
    assert problem.endswith("which holds pairs; set data.mixture=pairs")
    for settings, message in (
        ({"mixture": ["pairs", "colt5"]}, "data.mixture: pairs cannot be mixed with other entries"),
        ({"cut_inputs_at": "start"}, "data.cut_inputs_at: 'start' is no side; use end or beginning"),
        ({"min_document_tokens": 5}, "data.min_document_tokens: 5 is not used with data.mixture=pairs"),
    ):
        (problem,) = config(**settings).problems()
        assert problem.startswith(message)


def test_what_is_cut_and_padded_is_said(shards: ShardSet) -> None:
    long_inputs, long_targets = pair_notes(config(input_length=64), as_sources(shards))
    total = shards.num_documents + shards.validation.num_documents
    number = sum(len(pair.input) >= 64 for pair in PAIRS)
    assert f": {number} of the {total} pairs" in long_inputs and long_inputs.endswith("which are cut at their end")
    assert long_targets.startswith("data.target_length: ")
    (padding,) = pair_notes(config(input_length=1024, target_length=64), as_sources(shards))
    assert "of the inputs from" in padding and "is padding" in padding
