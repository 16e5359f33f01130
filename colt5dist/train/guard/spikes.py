"""Loss spikes: what counts as one, and the rollback to the last checkpoint, which passes over the samples around it."""

import statistics
from pathlib import Path

import numpy as np

from colt5dist.data import SkipList
from colt5dist.train.checkpoint import (
    Saver,
    TrainerState,
    find_checkpoints,
    find_damage,
    folder_step,
    load_checkpoint,
    rename_damaged,
)
from colt5dist.train.config.schema import RunConfig
from colt5dist.train.engine.fragments import refresh_parameters
from colt5dist.train.ranks import Ranks, errors_on_all_ranks, gather_objects

NORMAL_MAD = 1.4826
"""Standard deviation of a normal distribution with median absolute deviation 1."""
SMALLEST_DEVIATION = 1e-3
"""Lower bound of the standard deviation, as a share of the median: a loss that hardly changes has no spikes."""


def skip_list(config: RunConfig, state: TrainerState) -> SkipList:
    """Samples that the run passes over: those of data.skip, and those around spikes that were rolled back."""
    return SkipList(ranges_to_skip(config, state))


def ranges_to_skip(config: RunConfig, state: TrainerState) -> list[list[int]]:
    """The samples of `skip_list` as ranges [first, sample after the last]."""
    return [*config.data.skip, *state.rolled_back_samples]


def spike_score(recent: list[float], loss: float) -> float:
    """Distance of a loss above the median of recent losses, in robust standard deviations.

    Args:
        recent: losses of the steps before.
        loss: the loss to compare.

    Returns:
        (loss - median) / (1.4826 * median absolute deviation), with a lower bound for the divisor.
    """
    median = statistics.median(recent)
    deviation = NORMAL_MAD * statistics.median(abs(value - median) for value in recent)
    return (loss - median) / max(deviation, SMALLEST_DEVIATION * abs(median), 1e-12)


def observe(state: TrainerState, config: RunConfig, loss: float) -> float | None:
    """Add the loss of the applied step that the state has just counted to the window, and compare it with the window.

    The window holds the applied steps before, and is emptied where data.length_schedule changes the lengths. Before it
    is full, no loss counts as a spike.

    Args:
        state: the trainer's state; its `recent_losses` are updated.
        config: the run.
        loss: training loss of the step.

    Returns:
        The score of the loss if it is a spike, else None.
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
    """Samples of the last steps before a rollback.

    Args:
        config: the run.
        before: state after the step with the spike.
        checkpoint: state of the checkpoint that the run goes back to.
        num_steps: how many steps, counted back from the spike and including it.

    Returns:
        (first, sample after the last); no sample that the checkpoint has already used.
    """
    earlier = before.step - checkpoint.step - num_steps
    first = checkpoint.samples_consumed
    if earlier > 0:
        taken = skip_list(config, before).take(first, earlier * config.train.global_batch_size)
        first = int(np.max(taken)) + 1
    return first, before.samples_consumed


def roll_back(saver: Saver, config: RunConfig, state: TrainerState, ranks: Ranks) -> Path | None:
    """Load the newest whole checkpoint into weights, moments and state; collective.

    What is kept from the steps that are undone: the counts of spikes and rollbacks, and the range of samples to pass
    over from now on. The next checkpoint stores them. A run that is killed before that resumes from the same
    checkpoint, meets the same spike, and rolls back again. A checkpoint that is damaged or cannot be read is renamed
    and passed over for the next older one, with a message.

    Args:
        saver: writes the checkpoints of the run.
        config: the run.
        state: the trainer's state; replaced in place.
        ranks: place of this rank.

    Returns:
        The checkpoint; None if there is none, and then weights, moments and state are unchanged.

    Raises:
        ConfigError: on all ranks, if any rank cannot read its part.
        SaveError: on all ranks, if the checkpoint that was being written failed and the run must stop.
    """
    saver.finish()  # the newest one may still be written in the background
    engine = saver.engine
    whole, _ = find_checkpoints(saver.root, saver.run_id)
    whole = [folder for folder in whole if folder_step(folder) <= state.step]
    for folder in reversed(gather_objects(whole)[0]):  # as rank 0 sees them
        damage = find_damage(folder, ranks)
        if damage is None:
            break
        if ranks.is_first:
            saver.say(f"passed over {folder}: {damage}; {rename_damaged(folder, damage)}")
    else:
        return None
    with errors_on_all_ranks():
        loaded = load_checkpoint(folder, engine)
    refresh_parameters(engine)
    around = samples_around(config, state, loaded, config.health.skip_steps)
    loaded.rolled_back_samples = [*state.rolled_back_samples, list(around)]
    loaded.spikes, loaded.rollbacks = state.spikes, state.rollbacks + 1
    vars(state).update(vars(loaded))  # in place, because others hold the same object
    return folder
