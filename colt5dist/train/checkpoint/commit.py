"""What rank 0 does once all ranks have written: index, marker, the final name, and which older ones go."""

import json
import os
import shutil
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from colt5dist.files import fsync_path, write_whole
from colt5dist.train.checkpoint.complete_file import (
    COMPLETE,
    FORMAT_VERSION,
    INDEX,
    STATE,
    Damage,
    FileEntry,
    Marker,
    describe_file,
    size_problem,
)
from colt5dist.train.checkpoint.folders import checkpoint_folders, folder_step, index_content, step_folder

DELETED = ".deleted"
"""Ending of the folder of a checkpoint that is on its way out."""


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which whole checkpoints stay."""

    keep_last: int
    """So many of the newest."""
    keep_every: int
    """Those of steps that are a multiple stay for good; 0: none."""

    def doomed(self, steps: Sequence[int]) -> list[int]:
        """Of the steps of whole checkpoints, in order, those that go."""
        return [step for step in steps[: -self.keep_last] if not (self.keep_every and step % self.keep_every == 0)]


def temporary_folder(root: Path, step: int) -> Path:
    """Where a checkpoint is written; it gets its name when it is whole."""
    return root / f".{step_folder(root, step).name}.tmp"


def publish(root: Path, step: int, state: dict[str, Any], files: Sequence[FileEntry], run_id: str) -> list[str]:
    """Make a whole checkpoint of the temporary folder with the ranks' files, and give it its name.

    A folder that already has the name (a damaged one that was passed over) is put aside, not deleted.

    Args:
        root: folder of the checkpoints.
        step: of the checkpoint.
        state: the trainer's integers.
        files: what the ranks wrote.
        run_id: of the run.

    Returns:
        What the user should know.
    """
    temporary, final = temporary_folder(root, step), step_folder(root, step)
    write_whole(temporary / INDEX, json.dumps(_index(temporary, files)).encode())
    write_whole(temporary / STATE, json.dumps({"format_version": FORMAT_VERSION, "state": state}, indent=1).encode())
    own = [describe_file(temporary / name) for name in (INDEX, STATE)]
    fsync_path(temporary)
    Marker(run_id=run_id, step=step, files=(*own, *files)).write(temporary)
    notes = [f"{final}: was there already; kept as {put_aside(final, 'replaced').name}"] if final.exists() else []
    os.rename(temporary, final)
    fsync_path(root)
    return notes


def delete_old(root: Path, run_id: str, newest_step: int, retention: Retention) -> None:
    """Delete the whole checkpoints of this run that go now that the one of `newest_step` is whole."""
    whole = [folder for folder in checkpoint_folders(root) if size_problem(folder, run_id) is None]
    steps = [step for step in map(folder_step, whole) if step <= newest_step]
    for step in retention.doomed(steps):
        delete_checkpoint(step_folder(root, step))


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint; its name and its marker go first, so that an interruption leaves nothing in its place.

    The large files go in a thread, since training would stand still for them; what an interruption leaves of them goes
    with those of the next checkpoint that is deleted.
    """
    if folder.is_symlink():  # what it leads to was put elsewhere to be kept
        folder.unlink()
        return
    doomed = folder.with_name(f".{folder.name}{DELETED}")
    if doomed.exists():
        wait_for_deletions()  # a thread may be at it
        shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    (doomed / COMPLETE).unlink(missing_ok=True)
    fsync_path(doomed)
    for left in folder.parent.glob(f".*{DELETED}"):
        threading.Thread(target=shutil.rmtree, args=(left, True), name=DELETED).start()


def wait_for_deletions() -> None:
    """Wait until nothing is left of the checkpoints that were deleted."""
    for thread in threading.enumerate():
        if thread.name == DELETED:
            thread.join()


def put_aside(folder: Path, reason: str) -> Path:
    """Rename a checkpoint so that it is no longer looked at, and nothing of it is lost; its new path."""
    number = 0
    while (aside := folder.with_name(f"{folder.name}.{reason}{f'-{number}' if number else ''}")).exists():
        number += 1
    os.rename(folder, aside)
    fsync_path(folder.parent)
    return aside


def put_damaged_aside(folder: Path, damage: Damage) -> str:
    """Put aside a checkpoint whose sizes are right, so that no later start takes it; what the user is told."""
    reason = "unread" if damage.may_pass else "damaged"
    try:
        return f"renamed {folder} to {put_aside(folder, reason).name}"
    except OSError as error:
        return f"{folder}: {reason}, and cannot be renamed ({error.strerror})"


def _index(folder: Path, files: Sequence[FileEntry]) -> dict[str, Any]:
    """Collect the fragments from the headers of the ranks' files."""
    shapes: dict[str, list[int]] = {}
    parts: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in files:
        with safe_open(folder / entry.name, framework="pt") as file:
            shapes.update(json.loads(file.metadata()["shapes"]))
            for tensor_name in file.keys():  # noqa: SIM118 (not a dict)
                name, offset = tensor_name.rsplit("|", 1)
                length = file.get_slice(tensor_name).get_shape()[0]
                parts[name].append({"file": entry.name, "offset": int(offset), "length": length})
    return index_content(shapes, parts)
