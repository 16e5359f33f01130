"""What rank 0 does once all ranks have written: index, COMPLETE, the final name, and deletion of older checkpoints."""

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
from colt5dist.storage.checkpoints import checkpoint_folders, folder_step, step_folder
from colt5dist.storage.complete_file import (
    COMPLETE,
    FORMAT_VERSION,
    INDEX,
    STATE,
    CompleteFile,
    Damage,
    FileEntry,
    describe_file,
    size_problem,
)
from colt5dist.train.checkpoint.folders import (
    DAMAGED,
    DELETED_SUFFIX,
    REPLACED,
    UNREADABLE,
    deleted_folder,
    index_content,
    temporary_folder,
)


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which whole checkpoints are kept."""

    keep_last: int
    """Number of the newest checkpoints to keep."""
    keep_every: int
    """Checkpoints of steps that are a multiple of it are kept for good; 0: none."""
    best: int | None = None
    """Step of the checkpoint that is kept as the best one; None: none is."""

    def to_delete(self, steps: Sequence[int]) -> list[int]:
        """Select the steps to delete from the steps of all whole checkpoints, given in ascending order."""
        return [step for step in steps[: -self.keep_last] if not self.keeps(step)]

    def keeps(self, step: int) -> bool:
        """Whether a checkpoint is kept that is none of the newest."""
        return step == self.best or (self.keep_every > 0 and step % self.keep_every == 0)


def commit_checkpoint(
    root: Path, step: int, state: dict[str, Any], files: Sequence[FileEntry], run_id: str
) -> list[str]:
    """Complete the temporary folder that holds the ranks' files, and give it its final name.

    A folder that already has this name (a damaged checkpoint that was passed over) is renamed, not deleted.

    Args:
        root: folder of the checkpoints.
        step: step of the checkpoint.
        state: the trainer's integers.
        files: what the ranks wrote.
        run_id: the run that the checkpoint belongs to.

    Returns:
        Notes for the user.
    """
    temporary, final = temporary_folder(root, step), step_folder(root, step)
    write_whole(temporary / INDEX, json.dumps(_index(temporary, files)).encode())
    write_whole(temporary / STATE, json.dumps({"format_version": FORMAT_VERSION, "state": state}, indent=1).encode())
    own = [describe_file(temporary / name) for name in (INDEX, STATE)]
    fsync_path(temporary)
    CompleteFile(run_id=run_id, step=step, files=(*own, *files)).write(temporary)
    notes = [f"{final}: existed already; kept as {rename_aside(final, REPLACED).name}"] if final.exists() else []
    os.rename(temporary, final)
    fsync_path(root)
    return notes


def delete_old(root: Path, run_id: str, newest_step: int, retention: Retention) -> None:
    """Delete older checkpoints after a new one is whole.

    Args:
        root: folder of the checkpoints.
        run_id: only whole checkpoints of this run are counted and deleted.
        newest_step: step of the new checkpoint; newer ones are left alone.
        retention: which are kept.
    """
    whole = [folder for folder in checkpoint_folders(root) if size_problem(folder, run_id) is None]
    steps = [step for step in map(folder_step, whole) if step <= newest_step]
    for step in retention.to_delete(steps):
        delete_checkpoint(step_folder(root, step))


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint: first its name and COMPLETE, so that an interruption cannot leave a part under its name.

    A thread deletes the large files, because training would have to wait for them. What an interruption leaves of them
    is deleted together with the next checkpoint.
    """
    if folder.is_symlink():  # the target was put elsewhere to be kept
        folder.unlink()
        return
    renamed = deleted_folder(folder)
    if renamed.exists():
        wait_for_deletions()  # a thread may be deleting it
        shutil.rmtree(renamed, ignore_errors=True)
    os.rename(folder, renamed)
    (renamed / COMPLETE).unlink(missing_ok=True)
    fsync_path(renamed)
    for remains in folder.parent.glob(f".*{DELETED_SUFFIX}"):
        threading.Thread(target=shutil.rmtree, args=(remains, True), name=DELETED_SUFFIX).start()


def wait_for_deletions() -> None:
    """Wait until all files of deleted checkpoints are gone."""
    for thread in threading.enumerate():
        if thread.name == DELETED_SUFFIX:
            thread.join()


def rename_aside(folder: Path, reason: str) -> Path:
    """Rename a checkpoint so that no start uses it and nothing of it is lost.

    Args:
        folder: folder of the checkpoint.
        reason: ending of the new name: `DAMAGED`, `UNREADABLE` or `REPLACED`.

    Returns:
        Its new path.
    """
    number = 0
    while (aside := folder.with_name(f"{folder.name}.{reason}{f'-{number}' if number else ''}")).exists():
        number += 1
    os.rename(folder, aside)
    fsync_path(folder.parent)
    return aside


def rename_damaged(folder: Path, damage: Damage) -> str:
    """Rename a damaged checkpoint whose files have the right sizes, so that no later start takes it for whole.

    Returns:
        What the user is told.
    """
    reason = UNREADABLE if damage.may_be_temporary else DAMAGED
    try:
        return f"renamed {folder} to {rename_aside(folder, reason).name}"
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
