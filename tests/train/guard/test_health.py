"""Bad numbers: a run ends after many skipped steps, loss spikes are logged and rolled back, restarts remember them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from colt5dist.data.order.skip import SkipList
from colt5dist.train.checkpoint import TrainerState, find_checkpoints
from colt5dist.train.config.load import load_config
from colt5dist.train.config.schema import HealthConfig, RunConfig
from colt5dist.train.guard.spikes import observe, samples_around, spike_score
from colt5dist.train.report.monitor import read_metrics

SCRIPT = Path(__file__).with_name("health_runs.py")
TINY = Path(__file__).resolve().parents[3] / "configs" / "tiny.yaml"


class Runs:
    """Results of health_runs.py."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results: dict[str, Any] = json.loads((folder / "out.json").read_text())

    def starts(self, name: str) -> list[dict[str, Any]]:
        """Return the outcome of each start of a run."""
        return self.results[name]["starts"]

    def directory(self, name: str) -> Path:
        """Return the folder of a run."""
        return self.folder / name.replace(", ", "-").replace(" ", "-")

    def numbers(self, name: str) -> list[tuple[int, float, float]]:
        """Return step, loss and gradient norm of each record."""
        return [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(self.directory(name))]


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    micro_settings: tuple[str, ...],
    short_texts: Path,
    run_ranks: Callable[..., str],
) -> Runs:
    """All runs, in one process."""
    folder = tmp_path_factory.mktemp("health")
    settings = [f"data.shards={short_texts}", "train.eval_samples=2", "train.routing_every=0"]
    run_ranks(SCRIPT, str(folder / "out.json"), str(folder), *micro_settings, *settings, processes=1)
    return Runs(folder)


def test_many_skipped_steps_in_a_row_end_the_run_with_a_diagnosis(runs: Runs) -> None:
    """Steps 3 to 5 are skipped, 3 are allowed: status 1, one line with what to type, and a file with the details."""
    first = runs.starts("given up")[0]
    assert first["status"] == 1 and first["status.json"]["status"] == "failed"
    (line,) = first["errors"].splitlines()
    assert "steps 3 to 5 were skipped" in line and "data.skip=[[16,40]]" in line and line.startswith("error: ")
    path = runs.directory("given up") / "failures" / "not_finite_00000005.json"
    assert str(path) in line
    found = json.loads(path.read_text())
    assert found["samples"] == [[16, 40]] and found["weights_not_finite"] == []
    again = found["last_batch_run_again"]
    assert [micro_batch["losses_not_finite"] for micro_batch in again] == [[32, 33, 34, 35], [36, 37, 38, 39]]
    assert all("embedding.weight" in micro_batch["gradients_not_finite"] for micro_batch in again)


def test_a_restart_of_a_run_that_was_given_up_ends_at_the_same_step(runs: Runs) -> None:
    """The checkpoint of step 4 holds the count of two skipped steps, so the next start also ends at step 5."""
    first, second, third = runs.starts("given up")
    assert first["checkpoint"] == second["checkpoint"] == "step_00000004"
    assert first["state"] == second["state"] and first["state"]["skipped_in_a_row"] == 2
    assert second["status"] == 1 and second["errors"] == first["errors"]
    # with the settings that the line names
    assert third["status"] == 0 and third["state"]["skipped_steps"] == 2 and third["state"]["skipped_in_a_row"] == 0
    losses = [loss for _, loss, _ in runs.numbers("given up")]
    assert losses[2:4] == [None, None] and None not in losses[4:]


def test_a_spike_is_logged_and_counted(runs: Runs) -> None:
    (start,) = runs.starts("warned")
    records = read_metrics(runs.directory("warned"))
    assert records[5]["loss"] > 2 * records[4]["loss"]
    assert f"step 6: the loss {records[5]['loss']:.4f} is a spike" in start["printed"]
    assert "robust standard deviations above" in start["printed"]
    counts = [(r["loss_spikes"], r["rollbacks"]) for r in records]
    assert counts == [(0, 0)] * 5 + [(1, 0)] * 3


def test_a_resumed_run_keeps_the_window_of_losses(runs: Runs) -> None:
    assert runs.starts("warned, resumed")[1]["state"] == runs.starts("warned")[0]["state"]
    assert runs.numbers("warned, resumed") == runs.numbers("warned")


@pytest.mark.parametrize(
    "name",
    [
        "rolled back",
        "rolled back, resumed",
        "rolled back, beside a save",
        "rolled back, stopped there",
        "rolled back, past a damaged checkpoint",
    ],
)
def test_a_rolled_back_run_equals_the_run_without_those_samples(runs: Runs, name: str) -> None:
    """To the bit in metrics, TensorBoard and state; also if it was restarted after the rollback.

    Also if the checkpoint was still being written or is damaged, or a signal stops the run during the rollback.
    """
    assert "rolled back to" in runs.starts(name)[0]["printed"]
    assert "samples 32 to 47 are passed over" in runs.starts(name)[0]["printed"]
    assert runs.numbers(name) == runs.numbers("skipping")
    assert [step for step, _, _ in runs.numbers(name)] == list(range(1, 9))
    events = EventAccumulator(str(runs.directory(name) / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("1_loss/all/train")] == list(range(1, 9))
    assert [event.value for event in events.Scalars("1_loss/all/train")] == pytest.approx(
        [n[1] for n in runs.numbers("skipping")]
    )
    state, expected = runs.starts(name)[-1]["state"], runs.starts("skipping")[0]["state"]
    assert state == {**expected, "rolled_back_samples": [[32, 48]], "spikes": 1, "rollbacks": 1}


def test_a_rollback_renames_a_damaged_checkpoint(runs: Runs) -> None:
    name = "rolled back, past a damaged checkpoint"
    printed, root = runs.starts(name)[0]["printed"], runs.directory(name) / "checkpoints"
    assert f"passed over {root / 'step_00000004'}: rank_00000.safetensors was changed after it was written" in printed
    assert f"rolled back to {root / 'step_00000002'}" in printed and (root / "step_00000004.damaged").is_dir()


def test_after_a_stop_in_a_rollback_the_run_resumes(runs: Runs) -> None:
    first, second = runs.starts("rolled back, stopped there")
    assert first["status"] == 75 and first["checkpoint"] == "step_00000003"
    assert first["status.json"] == {"status": "stopped", "step": 3, "reason": "signal"}
    assert second["status"] == 0 and "resuming from" in second["printed"]


def test_a_stop_waits_for_the_save_in_the_background(runs: Runs) -> None:
    """Both checkpoints are whole: that of step 3, which was in progress, and that of the stop."""
    (start,) = runs.starts("stopped, beside a save")
    assert start["status"] == 75 and start["status.json"] == {"status": "stopped", "step": 4, "reason": "signal"}
    whole, others = find_checkpoints(runs.directory("stopped, beside a save") / "checkpoints")
    assert [folder.name for folder in whole] == ["step_00000003", "step_00000004"] and not others


def test_a_run_that_is_given_up_finishes_the_save_in_the_background(runs: Runs) -> None:
    """The checkpoint of step 4, between the skipped steps, holds their count."""
    (start,) = runs.starts("given up, beside a save")
    assert start["status"] == 1 and start["checkpoint"] == "step_00000004" and start["state"]["skipped_in_a_row"] == 2


def test_a_rollback_after_a_save_that_failed(runs: Runs) -> None:
    """The failure is reported, there is no checkpoint to go back to, and the run continues."""
    (start,) = runs.starts("no checkpoint, beside a save")
    failed = start["printed"].index("checkpoint of step 5 is not written: rank 0: ")
    assert failed < start["printed"].index("continuing: there is no whole checkpoint to roll back to")
    assert start["checkpoint"] == "step_00000006"


@pytest.mark.parametrize("stage", ["0", "2", "3", "3 offloaded"])
def test_every_stage_rolls_back(runs: Runs, stage: str) -> None:
    """Weights and moments in the engine are replaced at each ZeRO stage."""
    name = f"rolled back, stage {stage}"
    assert runs.starts(name)[0]["state"]["rollbacks"] == 1
    for got, expected in zip(runs.numbers(name), runs.numbers("skipping"), strict=True):
        assert got == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no checkpoint", "there is no whole checkpoint to roll back to"),
        ("no checkpoint, beside a save", "there is no whole checkpoint to roll back to"),
        ("used up", "health.max_rollbacks=0 rollbacks are used up"),
    ],
)
def test_a_spike_that_cannot_be_rolled_back_is_logged(runs: Runs, name: str, words: str) -> None:
    (start,) = runs.starts(name)
    assert f"continuing: {words}" in start["printed"]
    assert start["status"] == 0 and start["state"]["rollbacks"] == 0 and start["state"]["step"] == 6


def test_spike_score_is_robust_to_earlier_spikes() -> None:
    """Median 3, median absolute deviation 0.1; the spike would dominate a mean and a standard deviation."""
    recent = [2.9, 3.0, 3.1, 2.8, 3.2, 50.0, 3.0]
    assert spike_score(recent, 4.4826) == pytest.approx(10.0)
    assert spike_score(recent, 3.0) == 0.0
    assert spike_score([3.0] * 5, 3.03) == pytest.approx(
        10.0
    )  # a constant loss: the lower bound, a thousandth of the median


def small_config(**health: Any) -> RunConfig:
    """Configuration of a run with other lengths from step 7 on."""
    config = load_config(TINY, ["data.length_schedule=[{step: 7, target_length: 64}]", "data.skip=[[40,44]]"])
    config.health = HealthConfig(**health)
    return config


def test_the_window_starts_anew_with_other_lengths() -> None:
    config = small_config(spike_window=4, spike_threshold=5.0)
    state, spikes = TrainerState(), []
    for loss in (3.0, 3.1, 2.9, 3.0, 9.0, 3.0, 9.0, 9.1, 8.9, 9.0, 30.0):
        state.step += 1
        if observe(state, config, loss) is not None:
            spikes.append(state.step)
    assert spikes == [5, 11]
    assert state.recent_losses == [9.1, 8.9, 9.0, 30.0]


@pytest.mark.parametrize(("num_steps", "first"), [(1, 52), (2, 40), (3, 32), (5, 24), (100, 24)])
def test_samples_around_a_spike(num_steps: int, first: int) -> None:
    """Eight samples per step from 24 on, without 40 to 43: those of the last steps, but none before the checkpoint."""
    config = small_config()
    skip, position = SkipList([[40, 44]]), 24
    for _ in range(4):
        position = int(skip.take(position, 8)[-1]) + 1
    before = TrainerState(step=7, samples_consumed=position)
    assert samples_around(config, before, TrainerState(step=3, samples_consumed=24), num_steps) == (first, position)


def test_settings_are_checked() -> None:
    assert len(HealthConfig(max_skipped=0, spike_window=3, skip_steps=0, spike_threshold=0.0).problems()) == 4
    assert HealthConfig().problems() == []
