"""Runs whose saves fail on one of two ranks; started by test_checkpoint_faults.py, writes the results as JSON.

    torchrun --nproc-per-node 2 tests/train/checkpoint/save_faults.py OUTPUT FOLDER FULL_FOLDER SETTING...

FULL_FOLDER: a file system with space for one checkpoint, or "-".
"""

import gc
import io
import json
import os
import resource
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from colt5dist.errors import ConfigError, SaveError
from colt5dist.train import run_directory
from colt5dist.train.checkpoint import Saver, TrainerState
from colt5dist.train.checkpoint import save as saver
from colt5dist.train.checkpoint.commit import wait_for_deletions
from colt5dist.train.config.load import load_config
from colt5dist.train.engine.engine import Engine
from colt5dist.train.pretrain import pretrain
from colt5dist.train.ranks import gather_objects, initialise_process_group, ranks_from_environment
from colt5dist.train.report.monitor import read_metrics
from colt5dist.train.run_directory import open_run_directory

TINY = Path(__file__).resolve().parents[3] / "configs" / "tiny.yaml"
RANKS = ranks_from_environment()


def attempt(call: Callable[[], object]) -> dict[str, Any]:
    """Return what a call returns or raises on each rank, and what this rank prints."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        try:
            outcome = f"returns {call()}"
        except (ConfigError, SaveError) as error:
            outcome = f"{type(error).__name__}: {error}"
    return {"outcomes": gather_objects(outcome), "printed": printed.getvalue()}


def run(run_dir: Path, settings: list[str], *more: str) -> dict[str, Any]:
    """Start or resume a run; returns its outcome, and its checkpoints and losses afterwards."""
    result = attempt(lambda: pretrain(load_config(TINY, [*settings, f"run_dir={run_dir}", *more]), RANKS))
    gc.freeze()  # the end of a run has undone it; what was imported need not be looked through by the next
    wait_for_deletions()
    folders = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    return {**result, "folders": folders, "losses": [record["loss"] for record in read_metrics(run_dir)]}


@contextmanager
def last_checkpoints_come_late(root: Path, *names: str) -> Iterator[None]:
    """Make some checkpoints appear only after a start has made its plan, as if the run before it were still writing."""
    if RANKS.is_first:
        for name in names:
            (root / name).rename(root.parent / name)
    dist.barrier()

    def write_them(*arguments: Any) -> Path:
        if RANKS.is_first:
            for name in names:
                (root.parent / name).rename(root / name)
        return open_run_directory(*arguments)

    with patch.object(run_directory, "open_run_directory", write_them):
        yield


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Limit the size of files that this process writes: writing fails with OSError, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def without_write_permission(folder: Path) -> Iterator[None]:
    """Make a folder read-only for this process; root must change its user for that."""
    mode, user = folder.stat().st_mode, os.geteuid()
    folder.chmod(0o555)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        if folder.exists():  # a failed save removes it
            folder.chmod(mode)


def write_while_training() -> None:
    """From now on a save in the background starts to write only after the next step has changed the weights."""
    write = saver.write_rank_file
    owners: list[tuple[Engine, int]] = []
    original = Saver.save

    def save(self: Saver, state: TrainerState, **options: bool) -> None:
        self.finish()  # a save in progress waits for the step of its own save
        owners[:] = [(self.engine, self.engine.deepspeed.global_steps)]
        original(self, state, **options)

    def write_later(*arguments: Any, **options: Any) -> Any:
        if threading.current_thread().name == "checkpoint":
            (engine, before), pause = owners[0], threading.Event()
            while engine.deepspeed.global_steps == before:
                pause.wait(0.001)
        return write(*arguments, **options)

    Saver.save = save  # type: ignore[method-assign]
    saver.write_rank_file = write_later


def save_at_fault(root: Path, settings: list[str], device: Any) -> dict[str, Any]:
    """Three saves of an engine that is not trained; at the second the last rank may not write into the folder."""
    config = load_config(TINY, [*settings, "checkpoint.on_error=stop", "checkpoint.keep_last=1"])
    engine = Engine(config, RANKS.world_size, device)
    one = Saver(root, engine, config.checkpoint, run_id="one")
    one.save(TrainerState(step=1))
    last = RANKS.rank == RANKS.world_size - 1
    temporary = root / ".step_00000002.tmp"
    if last:
        temporary.mkdir()
    with without_write_permission(temporary) if last else nullcontext():
        dist.barrier()  # otherwise the first rank could make the folder first
        fault = attempt(lambda: one.save(TrainerState(step=2)))
    folders = gather_objects(sorted(path.name for path in root.iterdir()))[0]
    after = attempt(lambda: one.save(TrainerState(step=2)))
    left = gather_objects(sorted(path.name for path in root.glob("step_*")))[0]
    one.save(TrainerState(step=3, skipped_in_a_row=1))
    kept = gather_objects(sorted(path.name for path in root.glob("step_*")))[0]
    return {**fault, "folders": folders, "after": after["outcomes"], "left": left, "beside skipped steps": kept}


def main(output: Path, folder: Path, full: str, settings: list[str]) -> None:
    """Make all runs in one process group, because DeepSpeed cannot be started twice in a process."""
    leave = dist.destroy_process_group
    dist.destroy_process_group = lambda *arguments: None
    device = initialise_process_group(RANKS, 5)
    on_last = RANKS.rank == RANKS.world_size - 1
    results: dict[str, Any] = {}
    every = [*settings, "checkpoint.every_steps=1", "checkpoint.keep_last=9", "checkpoint.keep_every=2"]

    def limited() -> Any:
        return file_size_limit(100_000) if on_last else nullcontext()

    results["whole"] = run(folder / "whole", every, "train.steps=4")
    results["two"] = run(folder / "faults", every, "train.steps=2")
    for name, more in {
        "continue": ("checkpoint.on_error=continue",),
        "stop": ("checkpoint.on_error=stop",),
        "background": ("checkpoint.on_error=continue", "checkpoint.asynchronous=true"),
        "background stop": ("checkpoint.on_error=stop", "checkpoint.asynchronous=true"),
    }.items():
        with limited():
            results[name] = run(folder / "faults", every, "train.steps=4", *more)
    if on_last:
        path = folder / "faults" / "checkpoints" / "step_00000002" / "rank_00001.safetensors"
        with open(path, "r+b") as file:
            file.seek(-8, os.SEEK_END)
            file.write(b"\x7f" * 8)
    dist.barrier()
    with last_checkpoints_come_late(folder / "whole" / "checkpoints", "step_00000003", "step_00000004"):
        results["late"] = run(folder / "whole", every, "train.steps=5")
    dist.barrier()
    if RANKS.is_first:
        shutil.rmtree(folder / "whole" / "checkpoints" / "step_00000005")
    results["damaged"] = run(folder / "faults", every, "train.steps=4", "resume=must")
    results["clock"] = run(folder / "clock", settings, "checkpoint.every_steps=0", "checkpoint.every_minutes=1e-6")
    results["read-only"] = save_at_fault(folder / "read-only", settings, device)
    if full != "-":
        results["full"] = run(
            Path(full), settings, "checkpoint.every_steps=1", "checkpoint.keep_last=1", "checkpoint.on_error=stop"
        )
    write_while_training()
    results["beside"] = run(folder / "beside", every, "train.steps=4", "checkpoint.asynchronous=true")
    dist.barrier()
    if RANKS.is_first:
        output.write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
