"""Loading: each rank reads only the slices that it needs now, whatever number of ranks and ZeRO stage wrote them."""

from pathlib import Path
from typing import Any

from colt5dist.storage.checkpoints import AVERAGE, WEIGHT, FragmentReader, read_index
from colt5dist.storage.complete_file import Damage, find_difference
from colt5dist.storage.exported import ExportedReader, is_exported
from colt5dist.train.checkpoint.folders import read_state
from colt5dist.train.checkpoint.trainer_state import TrainerState
from colt5dist.train.engine import fragments
from colt5dist.train.engine.engine import Engine
from colt5dist.train.ranks import Ranks, gather_objects


def find_damage(folder: Path, ranks: Ranks) -> Damage | None:
    """Compare all files of a checkpoint with their hashes; collective, all ranks share the reading.

    Args:
        folder: a checkpoint without `size_problem`.
        ranks: place of this rank.

    Returns:
        What is wrong, the same on all ranks; None if everything is as it was written.
    """
    damage: Damage | None
    try:
        damage = find_difference(folder, lambda piece, name: piece % ranks.world_size == ranks.rank)
    except ValueError as error:
        damage = Damage(str(error), may_be_temporary=True)
    found = [damage for damage in gather_objects(damage) if damage]
    return min(found, key=lambda damage: damage.may_be_temporary, default=None)


def load_checkpoint(folder: Path, engine: Engine, *, weights_only: bool = False) -> TrainerState:
    """Load float32 weights, moments and average from a checkpoint, in place; each rank reads only what it needs.

    The moving average of the weights (`train.ema`) begins at the weights where the checkpoint has none.

    Call `fragments.refresh_parameters` afterwards on all ranks, once all have read their part.

    Args:
        folder: a whole checkpoint.
        engine: an engine of the same model; what it has trained is written over.
        weights_only: leave the optimizer and the average as new.

    Returns:
        The trainer's integers.

    Raises:
        ConfigError: the checkpoint is of another model or another optimizer, or cannot be read.
    """
    index = read_index(folder)
    state = read_state(folder)
    if not weights_only and not state.optimizer_step:
        fragments.forget_optimizer_state(engine)  # a checkpoint from before the first applied step has no moments
    elif not weights_only:
        shapes = {key: tuple(entry["shape"]) for key, entry in index.items()}
        fragments.create_optimizer_state(engine, state.optimizer_step, shapes)
    read_fragments(folder, index, engine, weights_only=weights_only)
    if engine.average is not None:
        if weights_only or not any(key == AVERAGE for _, key in index):
            engine.average.begin()
        else:
            engine.average.num_updates = state.averaged_steps
    return state


def load_weights(folder: Path, engine: Engine) -> None:
    """Load the weights from a checkpoint of another run, or from an exported folder, and leave the optimizer as new.

    Call `fragments.refresh_parameters` afterwards on all ranks, once all have read their part.

    Args:
        folder: a whole checkpoint, or an exported folder.
        engine: an engine of the same model, before its first step.

    Raises:
        ConfigError: it is of another model, or cannot be read.
    """
    if not is_exported(folder):
        load_checkpoint(folder, engine, weights_only=True)
        return
    reader = ExportedReader(folder)
    for fragment in fragments.needed_fragments(engine):
        if fragment.key == WEIGHT:
            reader.fill(fragment.name, WEIGHT, fragment.shape, fragment.offset, fragment.tensor)
    if engine.average is not None:
        engine.average.begin()


def read_fragments(
    folder: Path, index: dict[tuple[str, str], dict[str, Any]], engine: Engine, *, weights_only: bool = False
) -> int:
    """Fill the float32 weights, the moments and the average that this rank holds; the last as far as it is stored.

    Args:
        folder: a checkpoint.
        index: its content, from `read_index`.
        engine: an engine of the same model.
        weights_only: leave the moments and the average as they are.

    Returns:
        Number of bytes read.
    """
    num_bytes = 0
    with FragmentReader(folder, index) as reader:
        for fragment in fragments.needed_fragments(engine):
            if weights_only and fragment.key != WEIGHT:
                continue
            if fragment.key == AVERAGE and (fragment.name, AVERAGE) not in index:
                continue
            reader.fill(fragment.name, fragment.key, fragment.shape, fragment.offset, fragment.tensor)
            num_bytes += fragment.tensor.numel() * fragment.tensor.element_size()
    return num_bytes
