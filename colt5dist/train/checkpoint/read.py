"""Loading: each rank reads only the slices that it needs now, whatever number of ranks and ZeRO stage wrote them."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from colt5dist.errors import ConfigError
from colt5dist.train.checkpoint.complete_file import Damage, find_difference
from colt5dist.train.checkpoint.folders import read_index, read_state
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
    """Load the float32 weights and the moments from a checkpoint, in place; each rank reads only what it needs.

    Call `fragments.refresh_parameters` afterwards on all ranks, once all have read their part.

    Args:
        folder: a whole checkpoint.
        engine: an engine of the same model; what it has trained is written over.
        weights_only: leave the optimizer as new.

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
    return state


def read_fragments(
    folder: Path, index: dict[tuple[str, str], dict[str, Any]], engine: Engine, *, weights_only: bool = False
) -> int:
    """Fill the float32 weights and the moments that this rank holds.

    Args:
        folder: a checkpoint.
        index: its content, from `read_index`.
        engine: an engine of the same model.
        weights_only: leave the moments as they are.

    Returns:
        Number of bytes read.
    """
    num_bytes = 0
    with _OpenFiles(folder) as files:
        for fragment in fragments.needed_fragments(engine):
            if weights_only and fragment.key != fragments.WEIGHT:
                continue
            num_bytes += _read_fragment(folder, index, files, fragment)
    return num_bytes


def _read_fragment(
    folder: Path, index: dict[tuple[str, str], dict[str, Any]], files: "_OpenFiles", fragment: fragments.Fragment
) -> int:
    entry = index.get((fragment.name, fragment.key))
    if entry is None or tuple(entry["shape"]) != fragment.shape:
        raise ConfigError(
            f"{folder}: {fragment.key} of parameter {fragment.name} with shape {list(fragment.shape)} is missing; "
            "use the model.* and optimizer.name of the run that wrote it"
        )
    first, last = fragment.offset, fragment.offset + fragment.tensor.numel()
    num_read = 0
    for part, low, high in _overlaps(entry["fragments"], first, last):
        values = files.read(f"{fragment.name}|{fragment.key}|{part['offset']}", part, low, high)
        fragment.tensor[low - first : high - first].copy_(values)
        num_read += high - low
    if num_read != last - first:
        raise ConfigError(
            f"{folder}: its index has {num_read} of {last - first} elements of {fragment.name}; use another checkpoint"
        )
    return num_read * fragment.tensor.element_size()


def _overlaps(parts: Iterable[dict[str, Any]], first: int, last: int) -> Iterator[tuple[dict[str, Any], int, int]]:
    for part in parts:
        low, high = max(first, part["offset"]), min(last, part["offset"] + part["length"])
        if low < high:
            yield part, low, high


class _OpenFiles:
    """The ranks' files of a checkpoint, each opened when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Any] = {}

    def __enter__(self) -> "_OpenFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.files.clear()

    def read(self, tensor_name: str, part: dict[str, Any], low: int, high: int) -> Any:
        """Read a part of a fragment.

        Args:
            tensor_name: name of the fragment in the file.
            part: entry of the fragment in the index.
            low: first element to read, counted in the flattened parameter.
            high: element after the last.

        Returns:
            (high - low,) float32 tensor.
        """
        path = self.folder / part["file"]
        try:
            if path.name not in self.files:
                self.files[path.name] = safe_open(path, framework="pt").__enter__()
            return self.files[path.name].get_slice(tensor_name)[low - part["offset"] : high - part["offset"]]
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}); use another checkpoint") from None
