"""Loss spikes: what counts as one, and the way back to the last checkpoint past the samples around it."""

import statistics
from pathlib import Path

import numpy as np

from colt5dist.data import SkipList
from colt5dist.errors import ConfigError
from colt5dist.train.checkpoint import (
    Saver,
    TrainerState,
    find_checkpoints,
    find_damage,
    folder_step,
    load_checkpoint,
    put_damaged_aside,
)
from colt5dist.train.config.schema import RunConfig
from colt5dist.train.engine.fragments import refresh_parameters
from colt5dist.train.ranks import Ranks, gather_objects, raise_together

NORMAL_MAD = 1.4826
"""Standard deviation of a normal distribution whose median absolute deviation is 1."""
SMALLEST_DEVIATION = 1e-3
"""Smallest standard deviation that is divided by, as a share of the median: a loss that hardly moves has no spikes."""


def skip_list(config: RunConfig, state: TrainerState) -> SkipList:
    """The samples that the run passes over: those of data.skip, and those around spikes that it was rolled back for."""
    return SkipList(ranges_to_skip(config, state))


def ranges_to_skip(config: RunConfig, state: TrainerState) -> list[list[int]]:
    """Those samples as ranges [first, sample after the last]."""
    return [*config.data.skip, *state.rolled_back_samples]


def spike_score(recent: list[float], loss: float) -> float:
    """How far a loss lies above the recent ones: in standard deviations, by median and median absolute deviation."""
    median = statistics.median(recent)
    deviation = NORMAL_MAD * statistics.median(abs(value - median) for value in recent)
    return (loss - median) / max(deviation, SMALLEST_DEVIATION * abs(median), 1e-12)


def observe(state: TrainerState, config: RunConfig, loss: float) -> float | None:
    """Note the loss of the applied step that the state has just counted.

    The window is of the applied steps before, and starts anew where data.length_schedule changes the lengths; before it
    is full nothing is told.

    Returns:
        The loss's score if it is a spike, else None.
    """
    health = config.health
    if config.stage_at(state.step) is not config.stage_at(state.step - 1):
        state.recent_losses.clear()
    recent = state.recent_losses[-health.spike_window :]
    score = spike_score(recent, loss) if len(recent) == health.spike_window else 0.0
    state.recent_losses = [*recent[-health.spike_window + 1 :], loss]
    return score if score > health.spike_threshold else None


def samples_around(
    config: RunConfig, before: TrainerState, checkpoint: TrainerState, num_steps: int
) -> tuple[int, int]:
    """The samples of the last `num_steps` steps, as [first, sample after the last]; none that a checkpoint has used."""
    earlier = before.step - checkpoint.step - num_steps
    first = checkpoint.samples_consumed
    if earlier > 0:
        taken = skip_list(config, before).take(first, earlier * config.train.global_batch_size)
        first = int(np.max(taken)) + 1
    return first, before.samples_consumed


def roll_back(saver: Saver, config: RunConfig, state: TrainerState, ranks: Ranks) -> Path | None:
    """Go back to the newest whole checkpoint, in weights, moments and state; every rank calls this after its step.

    What stays of the part that is undone: the counts of spikes and rollbacks, and the range of samples that are passed
    over from now on. The next checkpoint holds them. A run that is killed before it starts from the same checkpoint,
    meets the same spike, and does the same again. A checkpoint that was changed after it was written, or cannot be
    read, is renamed, and passed over for the next older one, which is said.

    Returns:
        The checkpoint; None, and weights, moments and state are as they were, if there is none.

    Raises:
        ConfigError: on all ranks, if some rank cannot read its part.
        SaveError: on all ranks, if the checkpoint that was being written failed and the run is to stop then.
    """
    saver.finish()  # one that is being written in the background may be the newest
    engine = saver.engine
    whole, _ = find_checkpoints(saver.root, saver.run_id)
    whole = [folder for folder in whole if folder_step(folder) <= state.step]
    for folder in reversed(gather_objects(whole)[0]):  # as rank 0 sees them
        damage = find_damage(folder, ranks)
        if damage is None:
            break
        if ranks.is_first:
            saver.say(f"passed over {folder}: {damage}; {put_damaged_aside(folder, damage)}")
    else:
        return None
    problem = None
    engine.torch_optimizer.state.clear()  # a checkpoint of before the first applied step has no moments to put there
    try:
        loaded = load_checkpoint(folder, engine)
    except ConfigError as error:
        problem = str(error)
    raise_together(problem)
    refresh_parameters(engine)
    around = samples_around(config, state, loaded, config.health.skip_steps)
    loaded.rolled_back_samples = [*state.rolled_back_samples, list(around)]
    loaded.spikes, loaded.rollbacks = state.spikes, state.rollbacks + 1
    vars(state).update(vars(loaded))  # in place: the caller and its callers hold it
    return folder
