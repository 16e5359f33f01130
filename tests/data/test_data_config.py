"""Settings of the data room: every error names its key and how to fix it."""

from collections.abc import Callable

import pytest
from omegaconf import OmegaConf

from colt5dist.data.compatibility import data_problems
from colt5dist.data.config import DataConfig
from colt5dist.data.read.shards import ShardSet
from colt5dist.data.sample_lengths import required_sentinels


def test_the_default_is_right() -> None:
    """And OmegaConf takes it."""
    assert DataConfig().problems() == []
    assert OmegaConf.to_object(OmegaConf.structured(DataConfig)) == DataConfig()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input_length": 15}, "data.input_length: 15 is too small; give 16 or more"),
        ({"target_length": 3}, "data.target_length: 3 is too small; give 4 or more"),
        ({"num_workers": -1}, "data.num_workers: -1 is too small; give 0 or more"),
        ({"min_document_tokens": -5}, "data.min_document_tokens: -5 is too small; give 0 or more"),
        ({"shards": ""}, "data.shards: is empty"),
        ({"mixture": "ul3"}, "data.mixture: 'ul3' is unknown; choose some of colt5, ul2, causal, prefix_lm"),
        ({"num_sentinels": 100}, "data.num_sentinels: 100 are too few, the mixture colt5 needs 227"),
    ],
)
def test_problems_name_the_key(settings: dict[str, object], message: str) -> None:
    """One line each."""
    (problem,) = DataConfig(**settings).problems()  # type: ignore[arg-type]
    assert problem.startswith(message) and "\n" not in problem


def test_all_problems_at_once() -> None:
    """A user can fix them all at once."""
    assert len(DataConfig(input_length=1, target_length=1, mixture="x").problems()) == 3


def test_vocabulary_and_sentinels(shards: ShardSet) -> None:
    """The model's embedding must hold the tokenizer's ids and the sentinels; the message has the number to set."""
    config = DataConfig(input_length=4096, target_length=910)
    needed = 259 + required_sentinels(config)
    assert data_problems(config, shards, needed) == []
    (problem,) = data_problems(config, shards, needed - 1)
    assert problem.startswith(f"model.vocab_size: {needed - 1} is too small for the 259 ids")
    assert problem.endswith("and 227 sentinels; set 512 or more")
    (problem,) = data_problems(DataConfig(num_sentinels=300), shards, needed)
    assert problem.endswith("and 300 sentinels; set 640 or more")


def test_a_limit_that_leaves_nothing(make_shards: Callable[..., ShardSet]) -> None:
    """min_document_tokens above the longest document of a set."""
    shards = make_shards(["x" * 100, "y" * 200, "z" * 300])
    problems = data_problems(DataConfig(min_document_tokens=301), shards, 1024)
    assert len(problems) == 2 and all(
        problem.startswith("data.min_document_tokens: 301 leaves") for problem in problems
    )
    assert data_problems(DataConfig(min_document_tokens=100), shards, 1024) == []
