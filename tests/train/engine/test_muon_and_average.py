"""Muon and the average of the weights at every ZeRO stage, on one and two processes, against plain PyTorch."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from colt5dist.storage.checkpoints import FragmentReader, read_index
from colt5dist.train.checkpoint import checkpoint_bytes
from colt5dist.train.config.load import load_config
from colt5dist.train.engine.engine import parameter_shapes

SCRIPT = Path(__file__).with_name("muon_and_average.py")
TINY = Path(__file__).resolve().parents[3] / "configs" / "tiny.yaml"
PROJECTIONS = ("to_qkv.weight", "to_q.weight", "to_kv.weight", "to_hidden.weight", "to_out.weight")
RUNS = [(2, "1flat"), (2, "2"), (2, "3flat"), (2, "3"), (1, "3flat")]
LOADED = [(2, "2x2:3"), (1, "2x3:1flat"), (1, "2x1flat:0")]
SETTINGS = (
    "train.micro_batch_size=2",
    "optimizer.name=muon",
    "optimizer.momentum=0.9",
    "optimizer.router_lr_factor=30",
    "train.ema=0.15",
    "zero.persistence_threshold=100",  # DeepSpeed keeps vectors gathered at stage 3, also when weights are written
)
Results = dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints by `{processes}x{stage}`, and what the reference has."""
    return tmp_path_factory.mktemp("muon")


@pytest.fixture(scope="module")
def results(run_ranks: Callable[..., str], folder: Path, micro_settings: tuple[str, ...]) -> Results:
    """By the number of processes."""
    found = {}
    for processes in (2, 1):
        trained, loaded = (",".join(name for number, name in of if number == processes) for of in (RUNS, LOADED))
        output = folder / f"{processes}.json"
        run_ranks(SCRIPT, str(output), str(folder), trained, loaded, *micro_settings, *SETTINGS, processes=processes)
        found[processes] = json.loads(output.read_text())
    return found


@pytest.mark.parametrize(("processes", "stage"), RUNS, ids=str)
def test_it_trains_as_plain_muon_does(results: Results, processes: int, stage: str) -> None:
    """Losses and gradient norms of two steps, and of two after a skipped one."""
    found = results[processes]
    for got, expected in zip(found[f"losses {stage}"], found["plain"]["losses"], strict=True):
        assert got == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize(("processes", "pair"), LOADED, ids=str)
def test_a_checkpoint_loads_at_another_stage_and_world_size(results: Results, processes: int, pair: str) -> None:
    """Two steps after it: the second shows that the momentum was loaded, too."""
    found = results[processes]
    for got, expected in zip(found[f"losses {pair}"], found["plain"]["losses"][2:], strict=True):
        assert got == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("key", ["weight", "ema"])
@pytest.mark.parametrize(("processes", "stage"), RUNS, ids=str)
def test_a_checkpoint_has_the_weights_and_their_average(
    results: Results, folder: Path, processes: int, stage: str, key: str
) -> None:
    """Those of the reference after two steps; what a skipped step leaves is not averaged."""
    assert results[processes][f"updates {stage}"] == 2
    source = folder / f"{processes}x{stage}" / "step_00000003"
    with FragmentReader(source, read_index(source)) as reader:
        for name, expected in load_file(folder / f"{key}.safetensors").items():
            got = torch.empty(expected.numel())
            reader.fill(name, key, tuple(expected.shape), 0, got)
            torch.testing.assert_close(got.view_as(expected), expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(("processes", "stage"), [*RUNS, *LOADED], ids=str)
def test_weights_come_back_to_the_bit_after_an_evaluation_of_the_average(
    results: Results, processes: int, stage: str
) -> None:
    """And that evaluation gives the loss of the reference's average; the same after going back to the checkpoint."""
    found = results[processes]
    (expected, _) = found["plain"]["averaged"][0]
    average = found[f"average {stage}"]
    assert average["comes_back"]
    assert average["averaged"] == pytest.approx(expected, rel=2e-6)
    assert average["own"] != pytest.approx(expected, rel=1e-4)
    assert (processes, stage) in LOADED or found[f"back {stage}"] == average


@pytest.mark.parametrize(("processes", "stage"), RUNS, ids=str)
def test_a_matrix_has_one_moment(
    results: Results, folder: Path, processes: int, stage: str, micro_settings: tuple[str, ...]
) -> None:
    """And the formula gives the size of a checkpoint."""
    assert results[processes]["plain"]
    index = read_index(folder / f"{processes}x{stage}" / "step_00000003")
    found = {(key, name.endswith(PROJECTIONS)) for name, key in index}
    both = {(key, is_matrix) for key in ("weight", "ema") for is_matrix in (True, False)}
    assert found == both | {("momentum_buffer", True), ("exp_avg", False), ("exp_avg_sq", False)}
    config = load_config(TINY, [*micro_settings, *SETTINGS])
    size = 4 * sum(math.prod(entry["shape"]) for entry in index.values())
    assert checkpoint_bytes(parameter_shapes(config), config) == size


def test_in_bf16_the_own_weights_come_back_to_the_bit(
    run_ranks: Callable[..., str], tmp_path: Path, micro_settings: tuple[str, ...]
) -> None:
    """Of the float32 weights and the bf16 copies; bf16 losses are those of float32 to 2e-3."""
    settings = (*micro_settings, *SETTINGS, "train.precision=bf16")
    output = tmp_path / "out.json"
    run_ranks(SCRIPT, str(output), str(tmp_path), "1flat", "2x1flat:3", *settings, processes=2)
    found = json.loads(output.read_text())
    for stage in ("1flat", "2x1flat:3"):
        assert found[f"average {stage}"]["comes_back"]
        got = [loss for loss, _ in found[f"losses {stage}"]]
        assert got == pytest.approx([loss for loss, _ in found["plain"]["losses"][-len(got) :]], rel=2e-3)
