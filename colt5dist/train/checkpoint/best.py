"""Which evaluation is the best so far, when a run ends because none is better, and the name of the best checkpoint.

What is decided follows from the trainer's state and the record of the evaluation, which are equal on all ranks; the
state is in every checkpoint, so a resumed run decides as the undisturbed one.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from colt5dist.files import write_whole
from colt5dist.storage.checkpoints import BEST, read_best, step_folder
from colt5dist.storage.complete_file import size_problem
from colt5dist.train.checkpoint.trainer_state import TrainerState
from colt5dist.train.config.evaluation_keys import best_key, smaller_is_better
from colt5dist.train.config.schema import RunConfig


def judge(state: TrainerState, config: RunConfig, record: Mapping[str, float | int | None]) -> None:
    """Count an evaluation in the state.

    Args:
        state: the trainer's state, of the step that was evaluated; changed here.
        config: the run.
        record: the evaluation's numbers; empty if it was cut short.
    """
    state.evaluation_left_out = not record
    key = best_key(config)
    if key is None or state.evaluation_left_out:
        return
    if state.best_key != key:  # a resumed run may choose another one
        state.best_key, state.best_value, state.best_step, state.evaluations_since_best = key, None, 0, 0
    value, best = record.get(key), state.best_value
    if value is None or not math.isfinite(value):
        state.evaluations_since_best += 1
    elif best is None or (value < best if smaller_is_better(key) else value > best):
        state.best_value, state.best_step, state.evaluations_since_best = value, state.step, 0
    else:
        state.evaluations_since_best += 1


def is_best(state: TrainerState, config: RunConfig) -> bool:
    """Whether a checkpoint of this step is due, because its evaluation is the best one so far."""
    return config.checkpoint.keep_best is not None and state.best_step == state.step > 0


def early_stop(state: TrainerState, config: RunConfig) -> str | None:
    """Why the run is finished before its last step; None: it is not."""
    patience = config.train.early_stopping_patience
    if patience is None or state.best_key != best_key(config) or state.evaluations_since_best < patience:
        return None
    best = "no finite value" if state.best_value is None else f"{state.best_value:.6g} at step {state.best_step}"
    evaluations = f"{state.evaluations_since_best} evaluation{'s' if state.evaluations_since_best > 1 else ''}"
    return f"train.early_stopping_patience: {evaluations} without a better {state.best_key} than {best}"


def name_best(root: Path, run_id: str, state: TrainerState, keep_best: str | None) -> int | None:
    """Make best.json name the checkpoint of the best evaluation, if that is whole, and remove it where none is kept.

    A checkpoint that could not be written leaves the name at the one before. A kill between a checkpoint and its name
    is made up for by the next start or save.

    Args:
        root: folder of the checkpoints.
        run_id: the run that they belong to.
        state: the trainer's state.
        keep_best: checkpoint.keep_best.

    Returns:
        The step that it names; None: there is no such file.

    Raises:
        OSError: it cannot be written.
    """
    if keep_best is None:
        (root / BEST).unlink(missing_ok=True)
        return None
    named = read_best(root)
    is_known = state.best_key == keep_best and state.best_step > 0
    if is_known and size_problem(step_folder(root, state.best_step), run_id) is None:
        content = {"step": state.best_step, "key": keep_best, "value": state.best_value}
        if named != content:
            write_whole(root / BEST, (json.dumps(content) + "\n").encode())
        return state.best_step
    return int(named["step"]) if named else None
