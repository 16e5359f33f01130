"""A checkpoint survives a power failure: the order of fsync and rename calls."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from colt5dist.train.checkpoint import Saver, TrainerState, find_checkpoints, read_complete
from colt5dist.train.checkpoint import save as saver
from colt5dist.train.checkpoint.commit import wait_for_deletions
from colt5dist.train.config.schema import CheckpointConfig
from colt5dist.train.engine.fragments import Fragment

Call = tuple[str, ...]
TEMPORARY, FINAL = ".step_00000002.tmp", "step_00000002"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Folder of the checkpoints."""
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


@pytest.fixture
def calls(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Every fsync, with the size of the file at that time, and every rename; paths are relative to the root."""
    seen: list[Call] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(descriptor: int) -> None:
        path = os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), root)
        size = "" if Path(root, path).is_dir() else str(os.fstat(descriptor).st_size)
        fsync(descriptor)
        seen.append(("fsync", path, size))

    def noted_rename(old: Any, new: Any) -> None:
        rename(old, new)
        seen.append(("rename", os.path.relpath(old, root), os.path.relpath(new, root)))

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    return seen


@pytest.mark.parametrize("in_background", [False, True])
def test_a_checkpoint_is_on_the_disk_before_it_counts(
    in_background: bool, root: Path, calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    """First all other files, then COMPLETE, then the name of the folder; only then the older checkpoint is deleted."""
    weights = [Fragment("p", "weight", 0, (1000,), torch.arange(1000.0))]
    monkeypatch.setattr(saver, "owned_fragments", lambda engine: iter(weights))
    monkeypatch.setattr(saver, "gather_objects", lambda mine: [mine])
    engine: Any = SimpleNamespace(deepspeed=SimpleNamespace(global_rank=0), device=torch.device("cpu"))
    own = Saver(root, engine, CheckpointConfig(keep_last=1, asynchronous=in_background), run_id="one")
    own.save(TrainerState(step=1))
    own.finish()
    calls.clear()
    own.save(TrainerState(step=2))
    own.finish()
    wait_for_deletions()
    assert find_checkpoints(root) == ([root / FINAL], [])

    folder, complete_file = ("fsync", TEMPORARY, ""), read_complete(root / FINAL)
    complete = calls.index(("rename", f"{TEMPORARY}/COMPLETE.tmp", f"{TEMPORARY}/COMPLETE"))
    named = calls.index(("rename", TEMPORARY, FINAL))
    deleted = calls.index(("rename", "step_00000001", ".step_00000001.deleted"))
    assert {entry.name for entry in complete_file.files} == {"rank_00000.safetensors", "index.json", "trainer.json"}
    for entry in complete_file.files:  # flushed with its full size, under its final or its temporary name
        names = (f"{TEMPORARY}/{entry.name}", f"{TEMPORARY}/{entry.name}.tmp")
        assert any(("fsync", name, str(entry.bytes)) in calls[:complete] for name in names), entry.name
    others = max(n for n, call in enumerate(calls[:complete]) if call[0] == "rename")
    assert folder in calls[others:complete], "their names"
    size = str((root / FINAL / "COMPLETE").stat().st_size)
    assert ("fsync", f"{TEMPORARY}/COMPLETE.tmp", size) in calls[others:complete]
    assert set(calls[complete + 1 : named]) == {folder}, "only the name COMPLETE"
    assert ("fsync", ".", "") in calls[named:deleted], "the checkpoint's name"
