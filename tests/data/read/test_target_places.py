"""Where the tokens of a target stand in their documents, compared with documents whose tokens say where they are."""

from pathlib import Path

import numpy as np
import pytest

from colt5dist.data import DataConfig, open_shards
from colt5dist.data.prepare.held_out_split import CorpusWriter
from colt5dist.data.read.held_out import held_out_samples
from colt5dist.data.tokenizer import ByteTokenizer

INPUT, TARGET = 96, 32


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 5 to 250 different bytes, which begin with their own length."""
    folder = tmp_path_factory.mktemp("telling") / "shards"
    writer = CorpusWriter(folder, ByteTokenizer(), validation_fraction=0.5)
    rng = np.random.default_rng(0)
    for length in rng.integers(5, 120, size=400).tolist():
        # position k of a document of n bytes is chr(k + 1); n follows from the largest
        writer.add("".join(chr(k + 1) for k in range(length)))
    writer.close({})
    return folder


@pytest.mark.parametrize("mixture", ["colt5", "ul2", "causal"])
def test_places_are_those_of_the_text(shards: Path, mixture: str) -> None:
    opened = open_shards(shards)
    input_length = 0 if mixture == "causal" else INPUT
    config = DataConfig(shards=str(shards), input_length=input_length, target_length=TARGET, mixture=mixture)
    samples = held_out_samples(opened, config)
    lengths_there = set(np.diff(opened.validation.index.document_ends, prepend=0).tolist())
    seen = 0
    for number in range(100):
        inputs, targets = np.zeros(input_length, dtype=np.int64), np.zeros(TARGET, dtype=np.int64)
        _, num_targets, _ = samples.write(number, inputs, targets)
        lengths, positions = samples.target_places(number)
        assert len(lengths) == len(positions) == num_targets
        text = (targets[:num_targets] >= 3) & (targets[:num_targets] < 259)
        assert (positions[text] == targets[:num_targets][text] - 3 - 1).all()
        assert (positions < lengths).all() and set(lengths.tolist()) <= lengths_there
        sentinels = np.flatnonzero(targets[:num_targets] >= 259)
        assert (positions[sentinels] == positions[sentinels + 1]).all()
        ends = np.flatnonzero(targets[:num_targets] == 1)[:-1]  # between documents
        assert (positions[ends] == lengths[ends] - 1).all()
        seen += len(ends)
    assert seen > 8
