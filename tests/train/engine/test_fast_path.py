"""The logic of the fast path without a GPU: which micro-batches get a graph, the proof before it trains, fallbacks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from colt5dist.data.read.batch import Batch
from colt5dist.train.engine.compile import PassNumbers, difference
from colt5dist.train.engine.micro_batch_forms import first_cause
from colt5dist.train.engine.micro_batch_graph import arrange, is_padded

SCRIPT = Path(__file__).with_name("graph_logic.py")


@pytest.fixture(scope="module")
def results(
    run_ranks: Callable[..., str], tmp_path_factory: pytest.TempPathFactory, micro_settings: tuple[str, ...]
) -> dict[str, Any]:
    """What graph_logic.py finds."""
    output = tmp_path_factory.mktemp("graphs") / "out.json"
    run_ranks(SCRIPT, str(output), *micro_settings, processes=1)
    return json.loads(output.read_text())


@pytest.mark.parametrize("kind", ["graphs", "capture", "loss"])
def test_every_way_trains_alike(results: dict[str, Any], kind: str) -> None:
    for got, expected in zip(results[kind]["losses"], results["plain"]["losses"], strict=True):
        assert got == pytest.approx(expected, rel=2e-5)


def test_each_form_is_captured_once(results: dict[str, Any]) -> None:
    """Two forms: with and without padding; one line for each."""
    assert results["graphs"]["captures"] == 2 and results["graphs"]["graphs"]
    first, second = results["graphs"]["news"]
    assert "2 x 256 tokens without padding in one CUDA graph" in first
    assert "2 x 256 tokens with padding in one CUDA graph" in second


def test_routing_is_collected_beside_a_graph(results: dict[str, Any]) -> None:
    assert results["graphs"]["routing"] == results["plain"]["routing"] == 2


@pytest.mark.parametrize(
    ("kind", "words", "captures"),
    [("capture", "operation not permitted when stream is capturing", 1), ("loss", "in a CUDA graph, the loss is", 2)],
)
def test_a_graph_that_fails_or_computes_something_else_is_left(
    results: dict[str, Any], kind: str, words: str, captures: int
) -> None:
    assert not results[kind]["graphs"] and results[kind]["captures"] == captures
    note, first, second = results[kind]["news"]
    assert note.startswith("note: train.compile: no CUDA graph") and words in note
    assert first.startswith("compile: layers for 2 x 256 tokens without padding")
    assert second.startswith("compile: layers for 2 x 256 tokens with padding")


def numbers(loss: float, **norms: float) -> PassNumbers:
    """A pass that computed these."""
    return PassNumbers(torch.tensor(loss), {name: torch.tensor(norm) for name, norm in norms.items()})


@pytest.mark.parametrize(
    ("fast", "found"),
    [
        (numbers(100.1, a=1.02, b=0.011), None),
        (numbers(101.0, a=1.0, b=0.01), "the loss is 101, not 100"),
        (numbers(100.0, a=2.0, b=0.01), "the gradient of a has norm 2, not 1"),
        (numbers(100.0, a=0.5, b=0.01), "the gradient of a has norm 0.5, not 1"),
        (numbers(100.0, a=1.0, b=0.0), "the gradient of b has norm 0, not 0.01"),
        (numbers(float("nan"), a=1.0, b=0.01), "the loss is nan, not 100"),
        (numbers(100.0, a=float("nan"), b=0.01), "the gradient of a has norm nan, not 1"),
    ],
    ids=["rounding", "loss", "doubled", "halved", "lost", "NaN loss", "NaN gradient"],
)
def test_difference(fast: PassNumbers, found: str | None) -> None:
    assert difference(fast, numbers(100.0, a=1.0, b=0.01)) == found


def test_nothing_is_compared_with_a_pass_that_is_not_finite() -> None:
    assert difference(numbers(1.0, a=1.0), numbers(float("nan"), a=1.0)) is None


def test_the_first_cause_of_an_error_keeps_no_frames() -> None:
    try:
        try:
            raise KeyError("first")
        except KeyError:
            raise ValueError("second")  # noqa: B904
    except ValueError as error:
        cause = first_cause(error)
        assert isinstance(cause, KeyError) and cause.__traceback__ is None and error.__context__ is None


def batch(numbers: list[int], lengths: list[int]) -> Batch:
    """Rows of 4 tokens; the input of a row is its number, over and over."""
    ids = torch.tensor(numbers)[:, None].expand(-1, 4).contiguous()
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    index = torch.tensor(numbers)
    return Batch(
        input_ids=ids,
        input_mask=mask,
        decoder_input_ids=ids,
        target_ids=ids,
        target_mask=torch.ones_like(mask),
        objective=index % 4,
        sample_index=index,
        target_bytes=index,
    )


def test_rows_without_padding_come_first() -> None:
    arranged = arrange([batch([0, 1], [4, 3]), batch([2, 3], [4, 4]), batch([4, 5], [2, 4])])
    assert [is_padded(b) for b in arranged] == [False, False, True]
    assert [b["sample_index"].tolist() for b in arranged] == [[0, 2], [3, 5], [1, 4]]
    for part in arranged:
        for name, tensor in part.items():
            expected = part["sample_index"] % 4 if name == "objective" else part["sample_index"]
            if name in ("input_ids", "target_ids", "objective", "target_bytes"):
                assert torch.equal(tensor.reshape(2, -1)[:, 0], expected)  # type: ignore[attr-defined]
        assert part["input_mask"].sum(1).tolist() == [{1: 3, 4: 2}.get(n, 4) for n in part["sample_index"].tolist()]


@pytest.mark.parametrize("lengths", [[[4, 4], [4, 4]], [[4, 4], [3, 4]], [[3, 3], [3, 4]]])
def test_what_cannot_be_arranged_better_stays(lengths: list[list[int]]) -> None:
    batches = [batch([0, 1], lengths[0]), batch([2, 3], lengths[1])]
    assert arrange(batches) is batches
