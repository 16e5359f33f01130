"""Saves a checkpoint: what the ranks do and exchange, in the foreground or in the background.

A save has two parts: every rank writes its file, then rank 0 completes the checkpoint (commit.py). After each part the
ranks exchange what went wrong, so that all of them know the same. In the foreground this happens at once. In the
background a thread does the work and calls no collective; the main threads exchange the results when a step's host read
has shown that every rank has finished.
"""

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from colt5dist.errors import SaveError
from colt5dist.storage.complete_file import FileEntry, rank_file_name
from colt5dist.train.checkpoint.best import name_best
from colt5dist.train.checkpoint.commit import Retention, commit_checkpoint, delete_old
from colt5dist.train.checkpoint.folders import temporary_folder
from colt5dist.train.checkpoint.trainer_state import TrainerState
from colt5dist.train.checkpoint.write import write_rank_file
from colt5dist.train.config.schema import CheckpointConfig
from colt5dist.train.engine.engine import Engine
from colt5dist.train.engine.fragments import Fragment, owned_fragments
from colt5dist.train.ranks import finish_process_group, gather_objects

FOREGROUND_THREADS = 4
"""Threads per rank that copy, hash and write while training waits."""
BACKGROUND_THREADS = 1
"""The same in the background; few, because training needs the cores."""


class Saver:
    """Writes the checkpoints of a run; all ranks call the same methods at the same steps.

    Args:
        root: folder of the checkpoints.
        engine: the engine whose weights and moments are saved.
        config: section `checkpoint` of the configuration.
        run_id: id of the run, written into every checkpoint.
        say: prints a line, on rank 0.

    Attributes:
        failure: why the newest save failed; None if it did not.
    """

    def __init__(
        self, root: Path, engine: Engine, config: CheckpointConfig, *, run_id: str, say: Callable[[str], None] = print
    ) -> None:
        self.root = root
        self.engine = engine
        self.config = config
        self.run_id = run_id
        self.say = say
        self.failure: str | None = None
        self._save: _Save | None = None
        self._host_copy = HostCopy()
        self._last_begin = time.monotonic()

    @property
    def rank(self) -> int:
        """Rank of this process."""
        return int(self.engine.deepspeed.global_rank)

    def is_due_by_time(self) -> bool:
        """Whether checkpoint.every_minutes have passed, by the monotonic clock of rank 0; False on other ranks."""
        minutes = self.config.every_minutes
        return self.rank == 0 and minutes is not None and time.monotonic() - self._last_begin >= 60 * minutes

    def has_ended(self) -> bool:
        """Whether this rank has finished its part of a save in the background, successfully or not."""
        return self._save is not None and self._save.has_ended()

    def save(self, state: TrainerState, *, wait: bool = False, must: bool = False) -> None:
        """Start a checkpoint, and finish it unless it is written in the background; collective.

        Args:
            state: the trainer's integers.
            wait: finish it before returning, also with checkpoint.asynchronous.
            must: raise if it fails, whatever checkpoint.on_error says.

        Raises:
            SaveError: on all ranks, if the save failed on any rank and the run must stop.
        """
        begin = time.monotonic()
        self.finish()
        self.failure = None
        self._last_begin = time.monotonic()
        in_background = self.config.asynchronous and not wait
        self._save = _Save(self, state, in_background)
        if not in_background:
            self.finish(must=must)
        if self.failure is None:
            where = ", written in the background" if in_background else ""
            self.say(f"checkpoint of step {state.step}: training paused for {time.monotonic() - begin:.2f} s{where}")

    def name_best(self, state: TrainerState) -> None:
        """Name the best checkpoint anew, without a save; the next one does it where this fails."""
        if self.rank == 0:
            with suppress(OSError):
                name_best(self.root, self.run_id, state, self.config.keep_best)

    def advance(self, *, must: bool = False) -> None:
        """Continue a save in the background with its next part; call it when `has_ended` is true on all ranks.

        Args:
            must: raise if it failed, whatever checkpoint.on_error says.

        Raises:
            SaveError: on all ranks, if the save failed on any rank and the run must stop.
        """
        save = self._save
        assert save is not None
        problems = save.exchange()
        if not problems and not save.is_committed:
            save.commit()
            return
        self._save = None
        self.failure = None
        if problems:
            if self.rank == 0:
                shutil.rmtree(save.temporary, ignore_errors=True)
            self.failure = (
                f"checkpoint of step {save.step} is not written: {'; '.join(problems)}; older ones are unchanged"
            )
            if must or self.config.on_error == "stop":
                finish_process_group()
                raise SaveError(self.failure)
            self.say(f"warning: {self.failure}; continuing without it (checkpoint.on_error: continue)")
        for note in save.notes:
            self.say(f"note: {note}")

    def finish(self, *, must: bool = False) -> None:
        """Wait until a save in the background is finished, if there is one.

        Args:
            must: raise if it fails, whatever checkpoint.on_error says.

        Raises:
            SaveError: on all ranks, if the save failed on any rank and the run must stop.
        """
        while self._save is not None:
            self._save.join()
            self.advance(must=must)


class _Save:
    """One save in progress."""

    def __init__(self, saver: Saver, state: TrainerState, in_background: bool) -> None:
        self.saver = saver
        self.step = state.step
        self.state = deepcopy(asdict(state))
        self.temporary = temporary_folder(saver.root, state.step)
        self.in_background = in_background
        self.is_committed = False
        self.notes: list[str] = []
        self._file: FileEntry | None = None
        self._files: list[FileEntry] = []
        self._problem: str | None = None
        self._thread: threading.Thread | None = None
        fragments: Sequence[Fragment] = []

        def copy() -> None:
            nonlocal fragments
            if saver.engine.device.type == "cuda":
                torch.cuda.synchronize()  # other threads read the tensors, on other streams
            fragments = list(owned_fragments(saver.engine))
            if in_background:
                fragments = saver._host_copy.take(fragments)

        self._try(copy)
        if self._problem is None:
            self._run(lambda: self._write(fragments))

    def commit(self) -> None:
        """Second part: rank 0 completes the checkpoint; the others have nothing to do."""
        self.is_committed = True
        if self.saver.rank == 0:
            self._run(self._commit)

    def has_ended(self) -> bool:
        """Whether this rank has finished its part."""
        return self._thread is None or not self._thread.is_alive()

    def join(self) -> None:
        """Wait until this rank has finished its part."""
        if self._thread is not None:
            self._thread.join()

    def exchange(self) -> list[str]:
        """Gather what went wrong on any rank, and which files the ranks have written; collective."""
        outcomes: list[Any] = gather_objects((self._problem, self._file))
        self._files = [file for _, file in outcomes if file is not None]
        return list(dict.fromkeys(f"rank {rank}: {problem}" for rank, (problem, _) in enumerate(outcomes) if problem))

    def _write(self, fragments: Sequence[Fragment]) -> None:
        self.temporary.mkdir(parents=True, exist_ok=True)
        path = self.temporary / rank_file_name(self.saver.rank)
        num_threads = BACKGROUND_THREADS if self.in_background else FOREGROUND_THREADS
        self._file = write_rank_file(path, fragments, num_threads=num_threads)

    def _commit(self) -> None:
        root, run_id, config = self.saver.root, self.saver.run_id, self.saver.config
        self.notes += commit_checkpoint(root, self.step, self.state, self._files, run_id)
        try:
            best = name_best(root, run_id, TrainerState(**self.state), config.keep_best)
        except OSError as error:  # the new one is whole nevertheless
            self.notes.append(f"the best checkpoint could not be named: {error}; no older one is deleted")
            return
        if self.state["skipped_in_a_row"]:  # the run may have to go back to an older one
            return
        try:
            delete_old(
                root, run_id, self.step, Retention(keep_last=config.keep_last, keep_every=config.keep_every, best=best)
            )
        except OSError as error:  # the new one is whole nevertheless
            self.notes.append(f"an older checkpoint could not be deleted: {error}")

    def _run(self, call: Callable[[], None]) -> None:
        if not self.in_background:
            self._try(call)
            return
        # a daemon, because it must not keep a failing process alive
        self._thread = threading.Thread(target=self._try, args=(call,), daemon=True, name="checkpoint")
        self._thread.start()

    def _try(self, call: Callable[[], None]) -> None:
        """Call, and keep the error so that the other ranks learn of it."""
        try:
            call()
        except OSError as error:
            self._problem = f"{error.filename or self.temporary}: {error.strerror or error}"
        except Exception as error:
            self._problem = f"{type(error).__name__}: {error}"


class HostCopy:
    """A copy of a rank's fragments in host memory, pinned if they are on a GPU; every save uses the same memory."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def take(self, fragments: Sequence[Fragment]) -> list[Fragment]:
        """Copy the fragments, because the next training step changes them."""
        total = sum(f.tensor.numel() for f in fragments)
        on_gpu = any(f.tensor.is_cuda for f in fragments)
        if self._memory.numel() != total:
            self._memory = torch.empty(0)
            self._memory = torch.empty(total, dtype=torch.float32, pin_memory=on_gpu)
        copies = []
        start = 0
        for f in fragments:
            target = self._memory[start : start + f.tensor.numel()]
            target.copy_(f.tensor, non_blocking=True)
            copies.append(Fragment(f.name, f.key, f.offset, f.shape, target))
            start += f.tensor.numel()
        if on_gpu:
            torch.cuda.synchronize()
        return copies
