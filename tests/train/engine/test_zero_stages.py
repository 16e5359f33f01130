"""All ZeRO stages and world sizes train alike, skip a bad step alike, and load each other's checkpoints.

This also probes the semi-private places of DeepSpeed that colt5dist/train/engine/fragments.py relies on.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STAGES = (0, 1, 2, 3)
ALL_PAIRS = [(written, loaded) for written in STAGES for loaded in STAGES]
OTHER_SIZE = {
    (2, 1): [(written, written) for written in STAGES],
    (1, 2): [(written, (written + 1) % 4) for written in STAGES],
}
"""Stages that write and load a checkpoint at another number of processes: each of them writes and loads once."""
SCRIPT = Path(__file__).with_name("zero_matrix.py")


Matrix = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run_matrix(run_ranks: Callable[..., str]) -> Matrix:
    """Run zero_matrix.py on CPU processes."""

    def run(
        output: Path, folder: Path, settings: tuple[str, ...], processes: int, stages: str = "0123"
    ) -> dict[str, Any]:
        run_ranks(SCRIPT, str(output), str(folder), stages, *settings, processes=processes)
        return json.loads(output.read_text())

    return run


@pytest.fixture(scope="module")
def results_of(
    run_matrix: Matrix, tmp_path_factory: pytest.TempPathFactory, micro_settings: tuple[str, ...]
) -> dict[tuple[int, int], dict[str, Any]]:
    """By the numbers of processes that saved and that loaded; where these are one, trained by them, too."""
    found = {}
    for saved in (2, 1):
        folder = tmp_path_factory.mktemp("matrix")
        for loaded, micro_batch_size in ((2, 2), (1, 8)) if saved == 2 else ((1, 8), (2, 4)):
            settings = (*micro_settings, f"train.micro_batch_size={micro_batch_size}")
            if (saved, loaded) == (2, 2):
                settings = (*settings, "--load-micro-batch=4")
            else:  # what two processes wrote is loaded by one, and the reverse
                pairs = OTHER_SIZE.get((saved, loaded), [])
                settings = (*settings, "--loads=" + ",".join(f"{one}{other}" for one, other in pairs))
            found[saved, loaded] = run_matrix(folder / f"{loaded}.json", folder, settings, loaded)
    return found


@pytest.fixture(scope="module")
def results(results_of: dict[tuple[int, int], dict[str, Any]]) -> dict[str, Any]:
    """Trained, saved and loaded with 2 processes."""
    return results_of[2, 2]


def close(values: list[list[float]], reference: list[list[float]]) -> None:
    """Losses and gradient norms agree to the noise of float32 sums."""
    for got, expected in zip(values, reference, strict=True):
        assert got == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_stages_train_alike(results: dict[str, Any], stage: int) -> None:
    """The losses of two steps, of two after a skipped one, and the gradient norms."""
    close(results[f"train {stage}"], results["train 0"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_is_skipped(results: dict[str, Any], stage: int) -> None:
    """One rank's NaN: nobody applies the step; that the steps after it agree with stage 0 is tested above."""
    assert results[f"nan {stage}"] == {"applied": False, "finite": True}


@pytest.mark.parametrize("stage", STAGES)
def test_ten_rollbacks_take_no_memory(results: dict[str, Any], stage: int) -> None:
    """And what follows is as it was: also after one to before the first step, which leaves no moments."""
    before, after_ten, after_fresh = results[f"memory {stage}"]
    moments = results[f"moments {stage}"] / (2 if stage else 1)
    assert abs(after_ten - before) < 0.02 * moments
    assert after_ten - after_fresh == pytest.approx(moments, rel=0.1)
    close(results[f"again {stage}"], results[f"train {stage}"][2:3])
    close(results[f"anew {stage}"], results[f"train {stage}"][:1])


@pytest.mark.parametrize(
    ("saved", "loaded", "written", "stage"),
    [(2, 2, *pair) for pair in ALL_PAIRS] + [(*sizes, *pair) for sizes, of in OTHER_SIZE.items() for pair in of],
)
def test_a_checkpoint_loads_at_every_stage_and_world_size(
    results_of: dict[tuple[int, int], dict[str, Any]], saved: int, loaded: int, written: int, stage: int
) -> None:
    """Going on from a checkpoint equals the run that wrote it, cut into other micro-batches, too."""
    close(results_of[saved, loaded][f"load {written} {stage}"], results_of[saved, saved][f"train {written}"][2:])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("written", STAGES)
def test_a_rank_reads_only_what_it_needs(results: dict[str, Any], written: int, stage: int) -> None:
    """Of two ranks the first reads half of a checkpoint where the stage shares the states out, and all at stage 0."""
    share = results[f"share read {written} {stage}"]
    assert share == pytest.approx(0.5 if stage else 1, abs=0.05)


@pytest.fixture(scope="module")
def bf16(
    run_matrix: Matrix, tmp_path_factory: pytest.TempPathFactory, micro_settings: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    """Stages 1-3 in bf16 on 2 processes, with and without the optimizer in host memory."""
    found = {}
    for offload in ("none", "optimizer"):
        folder = tmp_path_factory.mktemp(offload)
        own = ("train.micro_batch_size=2", "train.precision=bf16", f"zero.offload={offload}")
        settings = (*micro_settings, *own, "--loads=12,23,31")
        found[offload] = run_matrix(folder / "out.json", folder, settings, 2, stages="123")
    return found


@pytest.mark.parametrize("stage", STAGES[1:])
@pytest.mark.parametrize("offload", ["none", "optimizer"])
def test_bf16_trains_alike_with_and_without_offload(bf16: dict[str, dict[str, Any]], offload: str, stage: int) -> None:
    """Also after a step that was skipped; losses to 1e-3, as bf16 has 8 bits."""
    expected = [loss for loss, _ in bf16["none"]["train 1"]]
    assert [loss for loss, _ in bf16[offload][f"train {stage}"]] == pytest.approx(expected, rel=1e-3)
    assert bf16[offload][f"nan {stage}"] == {"applied": False, "finite": True}
    written = {1: 3, 2: 1, 3: 2}[stage]  # each loads what another one wrote
    loaded = [loss for loss, _ in bf16[offload][f"load {written} {stage}"]]
    assert loaded == pytest.approx(expected[2:], rel=1e-3)
