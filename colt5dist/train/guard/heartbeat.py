"""Who is gone or stands still: all ranks tell rank 0 that they live, so that the others can name one that does not.

Without this a dead rank shows as "connection closed by peer", or on GPUs as a collective operation that never ends.
Each rank has two threads. One exchanges beats through a key-value store that rank 0 keeps; it may hang when a host is
cut off. The other only counts: it ends this process when a rank was silent, or nothing moved on, for too long.
"""

import json
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from colt5dist.train.guard.failures import keep_failure
from colt5dist.train.ranks import Ranks, broadcast_from_first, set_collective_timeout

STORE_SECONDS = 30.0
SILENT_BEATS = 3
"""Beats that a rank may miss before it counts as gone, once a collective operation has failed."""
EXIT_GIVEN_UP = 1
COLLECTIVE_LATER_SECONDS = 60.0
"""How much later than the heartbeat, which can name a rank, a collective operation gives up by itself."""


@dataclass
class _Beat:
    """What is known of a rank."""

    value: str = ""
    """What it said last, as JSON."""
    missed: int = 0
    """Own beats since it said something new: counted, not timed, so that a pause of all processes changes nothing."""


class Heartbeat:
    """Tells the other ranks that this one lives, and gives up when another does not. Use it as a context.

    Args:
        ranks: place of this rank; alone it has nobody to watch, and does nothing.
        hosts: host name of every rank.
        run_dir: the run's folder, for `failures/`.
        start_seconds: how long nothing may move on before the first step is done, and where `patient` is said.
        timeout_seconds: how long after it. A rank that is silent for a third of it is given up.
    """

    def __init__(
        self, ranks: Ranks, hosts: list[str], run_dir: Path, *, start_seconds: float, timeout_seconds: float
    ) -> None:
        self._ranks = ranks
        self._hosts = hosts
        self._run_dir = run_dir
        self._period = min(max(timeout_seconds / 40, 0.1), 2.0)
        self._timeout_seconds = timeout_seconds
        self._start_seconds = start_seconds
        self._allowed_seconds = start_seconds
        self._place = "starting"
        self._step = 0
        self._stood_still = 0
        self._cause: str | None = None
        self._verdict = ""
        self._watched = range(ranks.world_size) if ranks.is_first else range(min(1, ranks.rank))
        self._beats = {rank: _Beat() for rank in self._watched if rank != ranks.rank}
        self._ended = threading.Event()
        self._hurry = threading.Event()
        self._own_failure = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Heartbeat":
        if self._ranks.world_size == 1:
            return self
        self._store = self._open_store()
        for target in (self._exchange, self._watch):
            thread = threading.Thread(target=target, name=f"heartbeat {target.__name__}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._hurry.set()
        for thread in self._threads:
            thread.join(2 * self._period)

    def at(self, place: str, step: int) -> None:
        """Say where the training is; each call counts as moving on."""
        self._place, self._step = place, step
        self._stood_still = 0

    @property
    def allowed_seconds(self) -> float:
        """How long nothing may move on now."""
        return self._allowed_seconds

    def first_step_follows(self) -> None:
        """Until the next step is done the long timeout counts: kernels are compiled for new lengths."""
        if self._allowed_seconds != self._start_seconds:
            self._allow(self._start_seconds)

    def step_is_done(self) -> None:
        """From the first step that is done on the short timeout counts."""
        if self._allowed_seconds != self._timeout_seconds:
            self._allow(self._timeout_seconds)

    @contextmanager
    def patient(self, place: str, step: int) -> Iterator[None]:
        """Around what a slow disk may make as long as the start, and all ranks do together: its timeout counts."""
        before = self._allowed_seconds
        self._allow(max(self._start_seconds, before))
        self.at(place, step)
        try:
            yield
        finally:
            self.at(place, step)
            self._allow(before)

    def _allow(self, seconds: float) -> None:
        self._allowed_seconds = seconds
        set_collective_timeout(seconds + COLLECTIVE_LATER_SECONDS)

    def explain(self, error: BaseException) -> str:
        """Who is to blame for an error of this rank: empty if it is this rank itself, which the others are told.

        Waits for a few beats; no other rank is given up by this rank's threads from now on.
        """
        if not self._threads:
            return ""
        self._own_failure.set()
        if not _is_of_a_collective(error):
            self._cause = _first_line(error)
        if self._ranks.is_first and self._cause:
            self._verdict = f"{self._name(0)} failed: {self._cause}"
        self._hurry.set()
        for _ in range(2 * SILENT_BEATS + 2):
            if self._cause or self._ended.wait(self._period):
                break
            self._verdict = self._verdict or self._find_gone(SILENT_BEATS * self._period)
            if self._verdict:
                break
        self._hurry.set()
        self._ended.wait(SILENT_BEATS * self._period)  # until the others have read it
        return "" if self._cause else self._verdict

    def _open_store(self) -> dist.TCPStore:
        """Rank 0's store on a port of its own, with a key for every rank."""
        host, seconds, port = os.environ["MASTER_ADDR"], timedelta(seconds=STORE_SECONDS), 0
        if self._ranks.is_first:
            store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=seconds)
            for rank in range(self._ranks.world_size):
                store.set(f"rank {rank}", "")
            store.set("verdict", "")
            port = store.port
        port = broadcast_from_first(port)  # type: ignore[assignment]
        if not self._ranks.is_first:
            store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=seconds)
        return store

    def _exchange(self) -> None:
        """The thread that speaks and listens."""
        keys = [f"rank {rank}" for rank in self._beats]
        count = 0
        while not self._ended.is_set():
            count += 1
            mine = {"count": count, "place": self._place, "step": self._step, "failed": self._cause}
            try:
                self._store.set(f"rank {self._ranks.rank}", json.dumps(mine))
                if self._ranks.is_first:
                    if self._verdict:
                        self._store.set("verdict", self._verdict)
                else:
                    self._verdict = self._verdict or self._store.get("verdict").decode()
                for beat, value in zip(self._beats.values(), self._store.multi_get(keys), strict=True):
                    if value.decode() != beat.value:
                        beat.value, beat.missed = value.decode(), 0
            except (dist.DistError, RuntimeError):  # rank 0 is gone or cut off: its missing beats will tell
                self._ended.wait(self._period)
            self._hurry.wait(self._period)
            self._hurry.clear()

    def _watch(self) -> None:
        """The thread that counts, and ends this process when it has to."""
        while not self._ended.wait(self._period):
            if self._own_failure.is_set():
                for beat in self._beats.values():
                    beat.missed += 1
                continue
            for beat in self._beats.values():
                beat.missed += 1
            self._stood_still += 1
            self._verdict = self._verdict or self._find_gone(self._timeout_seconds / 3) or self._find_standstill()
            if not self._verdict:
                continue
            self._hurry.set()
            # the training itself may fail by the same cause, and then says more
            if not self._ended.wait(2 * SILENT_BEATS * self._period) and not self._own_failure.is_set():
                self._give_up()

    def _find_gone(self, seconds: float) -> str:
        """The ranks that said why they fail, or have not been heard of for that long."""
        limit = max(seconds / self._period, SILENT_BEATS)
        found = []
        for rank, beat in list(self._beats.items()):
            cause = json.loads(beat.value)["failed"] if beat.value else None
            if cause:
                found.append(f"{self._name(rank)} failed: {cause}")
            elif beat.missed >= limit:
                causes = "killed (for want of memory?) or paused, or its host is down or cut off"
                found.append(f"{self._name(rank)} is gone: {causes}")
        return _some(found)

    def _find_standstill(self) -> str:
        """Where the ranks are when nothing has moved on for too long."""
        allowed = self._allowed_seconds + (0 if self._ranks.is_first else 10 * self._period)  # rank 0 knows more
        if self._stood_still * self._period < allowed:
            return ""
        places = {self._ranks.rank: (self._step, self._place)}
        for rank, beat in self._beats.items():
            if beat.value:
                said = json.loads(beat.value)
                places[rank] = (said["step"], said["place"])
        # those that are behind, or elsewhere than most, first
        common = list(places.values())
        order = sorted(places, key=lambda rank: (common.count(places[rank]), rank))
        where = _some([f"{self._name(rank)}: {places[rank][1]}, step {places[rank][0]}" for rank in order])
        return (
            f"nothing moved on for {allowed:g} s ({where}); "
            "if that may take so long, raise train.timeout_seconds (at start train.timeout_minutes)"
        )

    def _give_up(self) -> None:
        """End this process, which waits for the others somewhere; what it was doing is kept in `failures/`."""
        main = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = "".join(traceback.format_stack(main)) if main else ""
        message = f"{self._name(self._ranks.rank)} gives up at step {self._step}: {self._verdict}"
        details = f"{message}\n\nThe training was here:\n{stack}"
        try:
            keep_failure(self._run_dir, self._ranks, message, details, speaks=self._name(0) in self._verdict)
            if self._ranks.is_first:
                self._ended.wait(SILENT_BEATS * self._period)  # until the others have read it
        finally:
            os._exit(EXIT_GIVEN_UP)

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}"


def _is_of_a_collective(error: BaseException) -> bool:
    """Whether an error came from a collective operation, and so most likely from another rank."""
    words = ("gloo", "nccl", "closed by peer", "reset by peer", "socket")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"


def _some(lines: list[str], limit: int = 8) -> str:
    """The first few of many lines as one."""
    more = f"; and {len(lines) - limit} more" if len(lines) > limit else ""
    return "; ".join(lines[:limit]) + more
