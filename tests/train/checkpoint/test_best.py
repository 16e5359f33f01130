"""Which evaluation is the best, when a run ends early, and how the best checkpoint is kept and named."""

import json
from pathlib import Path

import pytest
import torch
from conftest import MICRO_SETTINGS, ROOT
from stored_runs import write_checkpoint

from colt5dist.errors import ConfigError
from colt5dist.storage.stored_model import open_stored
from colt5dist.train.checkpoint import TrainerState, early_stop, find_checkpoints, is_best, judge
from colt5dist.train.checkpoint.best import name_best
from colt5dist.train.checkpoint.commit import Retention, delete_old, wait_for_deletions
from colt5dist.train.config.load import load_config
from colt5dist.train.config.schema import RunConfig
from colt5dist.train.resume import StartPlan

RUN_ID = "0123456789abcdef"


def config(*settings: str) -> RunConfig:
    return load_config(ROOT / "configs" / "tiny.yaml", [*MICRO_SETTINGS, *settings])


def decisions(run: RunConfig, state: TrainerState, values: list[float | None]) -> list[tuple[bool, bool]]:
    """Judge evaluations of steps 1, 2, ...: for each, whether it is the best so far, and whether the run ends."""
    found = []
    for value in values:
        state.step += 1
        key = run.checkpoint.keep_best or "eval/loss"
        judge(state, run, {"eval/loss": 0.0, key: value})
        found.append((is_best(state, run), early_stop(state, run) is not None))
    return found


def test_a_run_whose_last_evaluation_was_cut_short_is_not_finished() -> None:
    """The next start makes up for it."""
    for keep_best in ("eval/loss", "null"):
        run, state = config(f"checkpoint.keep_best={keep_best}"), TrainerState(step=4)
        judge(state, run, {})
        plan = StartPlan(None, None, state, ())
        assert not plan.is_finished(run)
        judge(state, run, {"eval/loss": 1.0})
        assert plan.is_finished(run)


def test_losses_are_better_when_smaller_and_scores_when_greater() -> None:
    values = [2.0, 3.0, 1.0, 1.0, float("nan"), None, 0.5]
    smaller = decisions(config("checkpoint.keep_best=eval/loss"), TrainerState(), values)
    assert [best for best, _ in smaller] == [True, False, True, False, False, False, True]
    pairs = ("data.mixture=pairs", "train.eval_generate_samples=4", "checkpoint.keep_best=eval/f1")
    greater = decisions(config(*pairs), TrainerState(), values)
    assert [best for best, _ in greater] == [True, True, False, False, False, False, False]


@pytest.mark.parametrize("keep", ["eval/bits_per_byte", "null"])
def test_the_run_ends_after_so_many_evaluations_without_a_better_one(keep: str) -> None:
    run = config("train.early_stopping_patience=2", f"checkpoint.keep_best={keep}")
    state = TrainerState()
    found = []
    for value in (3.0, 3.0, 2.0, 2.5, None):
        state.step += 1
        judge(state, run, {"eval/loss": value, "eval/bits_per_byte": value})
        found.append(early_stop(state, run) is not None)
    assert found == [False, False, False, False, True]
    assert (state.best_step, state.best_value) == (3, 2.0)
    assert "2 evaluations without a better eval/" in str(early_stop(state, run))
    assert early_stop(state, config("train.early_stopping_patience=3", f"checkpoint.keep_best={keep}")) is None
    assert early_stop(state, config(f"checkpoint.keep_best={keep}")) is None


def test_an_evaluation_that_was_cut_short_does_not_count() -> None:
    run = config("checkpoint.keep_best=eval/loss", "train.early_stopping_patience=1")
    state = TrainerState(step=1)
    judge(state, run, {"eval/loss": 1.0})
    state.step = 2
    judge(state, run, {})
    assert state.evaluation_left_out and not is_best(state, run) and early_stop(state, run) is None
    judge(state, run, {"eval/loss": 0.5})
    assert not state.evaluation_left_out and is_best(state, run)


def test_where_nothing_depends_on_it_nothing_is_judged() -> None:
    state = TrainerState(step=1)
    judge(state, config(), {"eval/loss": 1.0})
    assert state == TrainerState(step=1)
    judge(state, config(), {})  # but the next start makes up for what was cut short
    assert state == TrainerState(step=1, evaluation_left_out=True)


def test_another_key_begins_anew() -> None:
    state = TrainerState()
    decisions(config("checkpoint.keep_best=eval/loss"), state, [1.0, 2.0])
    other = config("checkpoint.keep_best=eval/bits_per_byte", "train.early_stopping_patience=1")
    assert early_stop(state, other) is None
    assert decisions(other, state, [5.0]) == [(True, False)]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder with checkpoints of the steps 1 to 4, of a model that is a vector."""
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, torch.nn.RMSNorm(3), step, num_ranks=1)
    settings = {"model": {}, "data": {}, "train": {}}
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    return tmp_path


def state_with_best(step: int) -> TrainerState:
    return TrainerState(step=4, best_key="eval/loss", best_value=1.5, best_step=step)


def test_the_best_checkpoint_is_named_and_kept_until_a_better_one_is_whole(run_dir: Path) -> None:
    root = run_dir / "checkpoints"
    for best, expected in ((2, [2, 4]), (4, [4])):
        named = name_best(root, RUN_ID, state_with_best(best), "eval/loss")
        assert named == best
        assert json.loads((root / "best.json").read_text()) == {"step": best, "key": "eval/loss", "value": 1.5}
        delete_old(root, RUN_ID, 4, Retention(keep_last=1, keep_every=0, best=named))
        assert [folder.name for folder in find_checkpoints(root)[0]] == [f"step_{step:08d}" for step in expected]
        assert open_stored(run_dir, "best").step == best
    wait_for_deletions()


def test_a_best_checkpoint_that_was_not_written_leaves_the_one_before(run_dir: Path) -> None:
    root = run_dir / "checkpoints"
    name_best(root, RUN_ID, state_with_best(2), "eval/loss")
    (root / "step_00000003" / "COMPLETE").unlink()
    assert name_best(root, RUN_ID, state_with_best(3), "eval/loss") == 2
    assert open_stored(run_dir, "best").step == 2
    assert name_best(root, RUN_ID, state_with_best(3), None) is None and not (root / "best.json").exists()


def test_step_best_without_a_name_or_its_checkpoint_is_refused(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"step: best, but .* has no best\.json"):
        open_stored(run_dir, "best")
    (run_dir / "checkpoints" / "best.json").write_text('{"step": 7, "key": "eval/loss", "value": 1.0}')
    with pytest.raises(ConfigError, match="step: 7: no whole checkpoint"):
        open_stored(run_dir, "best")
    (run_dir / "checkpoints" / "best.json").write_text('{"step": ')
    with pytest.raises(ConfigError, match=r"has no best\.json"):
        open_stored(run_dir, "best")
