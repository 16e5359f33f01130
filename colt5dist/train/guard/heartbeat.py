"""Detects a rank that is lost or makes no progress, names it, and ends the other ranks.

Without this a dead rank shows as "connection closed by peer", or on GPUs as a collective operation that never ends.
Each rank has two threads. One exchanges beats through a key-value store on rank 0's host; it may hang if a host is cut
off from the network. The other only counts: it ends this process when a rank was silent, or no rank made progress, for
too long.
"""

import json
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from colt5dist.errors import first_line
from colt5dist.train.guard.failures import write_failure
from colt5dist.train.ranks import Ranks, broadcast_from_first, raise_together, set_collective_timeout

STORE_SECONDS = 30.0
"""Timeout of the key-value store."""
SILENT_BEATS = 3
"""Beats that a rank may miss before it counts as lost, once a collective operation has failed."""
EXIT_GIVEN_UP = 1
COLLECTIVE_LATER_SECONDS = 60.0
"""A collective operation times out this much later than the heartbeat, because only the heartbeat can name a rank."""


@dataclass(frozen=True)
class _Message:
    """What a rank says of itself at every beat."""

    count: int
    """Number of the beat; it makes every message a new one."""
    place: str
    """What it is doing."""
    step: int
    """At which step."""
    failed: str | None
    """Why it failed; None if it has not."""

    def to_json(self) -> str:
        """The message as the store holds it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, content: bytes | str) -> "_Message | None":
        """Read a message; None if it is not one: nothing yet, or what a stranger wrote to the port."""
        try:
            said = json.loads(content)
            message = cls(**said)
        except (ValueError, TypeError, RecursionError):
            return None
        kinds = {"count": int, "place": str, "step": int, "failed": str | None}
        return message if all(isinstance(said[name], kind) for name, kind in kinds.items()) else None


@dataclass
class _Beat:
    """What is known of another rank."""

    message: "_Message | None" = None
    """Its last message."""
    missed: int = 0
    """Beats of this rank since that message: counted, not timed, so that a pause of all processes has no effect."""


class Heartbeat:
    """Tells the other ranks that this one is alive, and ends this process when another one is lost.

    Use it as a context manager around the training.

    Args:
        ranks: place of this rank; a single rank has no other to watch, and does nothing.
        hosts: host name of every rank.
        run_dir: folder of the run; a failure is recorded in its `failures/`.
        start_seconds: seconds without progress that are allowed before the first step is done, and inside `patient`.
        timeout_seconds: seconds without progress that are allowed afterwards. A rank that is silent for a third of
            them counts as lost.
        port: port of rank 0's key-value store; 0: any free one.
    """

    def __init__(
        self,
        ranks: Ranks,
        hosts: list[str],
        run_dir: Path,
        *,
        start_seconds: float,
        timeout_seconds: float,
        port: int = 0,
    ) -> None:
        self._ranks = ranks
        self._hosts = hosts
        self._run_dir = run_dir
        self._port = port
        self._period = min(max(timeout_seconds / 40, 0.1), 2.0)
        self._timeout_seconds = timeout_seconds
        self._start_seconds = start_seconds
        self._allowed_seconds = start_seconds
        self._place = "starting"
        self._step = 0
        self._beats_without_progress = 0
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
        """Record where the training is; each call counts as progress.

        Args:
            place: what is being done, in a few words.
            step: number of the step.
        """
        self._place, self._step = place, step
        self._beats_without_progress = 0

    @property
    def allowed_seconds(self) -> float:
        """Seconds without progress that are allowed now."""
        return self._allowed_seconds

    def first_step_follows(self) -> None:
        """Use the long timeout until the next step is done: kernels may be compiled for new lengths."""
        if self._allowed_seconds != self._start_seconds:
            self._allow(self._start_seconds)

    def step_is_done(self) -> None:
        """Use the short timeout from now on, because the first step is done."""
        if self._allowed_seconds != self._timeout_seconds:
            self._allow(self._timeout_seconds)

    @contextmanager
    def patient(self, place: str, step: int) -> Iterator[None]:
        """Use the long timeout inside this context, for what all ranks do together and a slow disk may delay.

        Args:
            place: what is being done, in a few words.
            step: number of the step.
        """
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
        """Find the rank that caused an error on this rank; tell the other ranks if it is this one.

        Waits for a few beats. From now on this rank's threads do not end the process.

        Args:
            error: the exception that was raised here.

        Returns:
            The other rank and what happened to it, as text; empty if this rank itself is the cause.
        """
        if not self._threads:
            return ""
        self._own_failure.set()
        if not _is_from_collective(error):
            self._cause = first_line(error)
        if self._ranks.is_first and self._cause:
            self._verdict = f"{self._name(0)} failed: {self._cause}"
        self._hurry.set()
        for _ in range(2 * SILENT_BEATS + 2):
            if self._cause or self._ended.wait(self._period):
                break
            self._verdict = self._verdict or self._find_lost(SILENT_BEATS * self._period)
            if self._verdict:
                break
        self._hurry.set()
        self._ended.wait(SILENT_BEATS * self._period)  # until the others have read it
        return "" if self._cause else self._verdict

    def _open_store(self) -> dist.TCPStore:
        """Open rank 0's store, on a port of its own, with one key per rank.

        Raises:
            ConfigError: on all ranks, if the port is not free, or cannot be reached from some host.
        """
        host, seconds, port = os.environ["MASTER_ADDR"], timedelta(seconds=STORE_SECONDS), self._port
        problem = None
        if self._ranks.is_first:
            try:
                store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=seconds)
                for rank in range(self._ranks.world_size):
                    store.set(f"rank {rank}", "")
                store.set("verdict", "")
                port = store.port
            except (dist.DistError, RuntimeError) as error:
                free = "choose another train.heartbeat_port, or 0 for any free one"
                problem = f"train.heartbeat_port: {port} cannot be opened on {host} ({first_line(error)}); {free}"
        raise_together(problem)
        port = broadcast_from_first(port)  # type: ignore[assignment]
        if not self._ranks.is_first:
            try:
                store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=seconds)
            except (dist.DistError, RuntimeError) as error:
                problem = (
                    f"train.heartbeat_port: port {port} of {host} cannot be reached from "
                    f"{self._hosts[self._ranks.rank]} ({first_line(error)}); open it between the hosts, or set this "
                    "key to a port that is open"
                )
        raise_together(problem)
        return store

    def _exchange(self) -> None:
        """Thread that sends this rank's beats and receives those of the others."""
        keys = [f"rank {rank}" for rank in self._beats]
        count = 0
        while not self._ended.is_set():
            count += 1
            mine = _Message(count, self._place, self._step, self._cause)
            try:
                self._store.set(f"rank {self._ranks.rank}", mine.to_json())
                if self._ranks.is_first:
                    if self._verdict:
                        self._store.set("verdict", self._verdict)
                else:
                    self._verdict = self._verdict or self._store.get("verdict").decode(errors="replace")
                for beat, value in zip(self._beats.values(), self._store.multi_get(keys), strict=True):
                    message = _Message.from_json(value)
                    if message is not None and message != beat.message:
                        beat.message, beat.missed = message, 0
            except (dist.DistError, RuntimeError):  # rank 0 is lost or cut off: its missing beats will show it
                self._ended.wait(self._period)
            self._hurry.wait(self._period)
            self._hurry.clear()

    def _watch(self) -> None:
        """Thread that counts beats, and ends this process if necessary."""
        while not self._ended.wait(self._period):
            if self._own_failure.is_set():
                for beat in self._beats.values():
                    beat.missed += 1
                continue
            for beat in self._beats.values():
                beat.missed += 1
            self._beats_without_progress += 1
            self._verdict = self._verdict or self._find_lost(self._timeout_seconds / 3) or self._find_stall()
            if not self._verdict:
                continue
            self._hurry.set()
            # the training itself may fail from the same cause, and then has more to report
            if not self._ended.wait(2 * SILENT_BEATS * self._period) and not self._own_failure.is_set():
                self._give_up()

    def _find_lost(self, seconds: float) -> str:
        """Name the ranks that reported a failure, or were silent for at least `seconds`."""
        limit = max(seconds / self._period, SILENT_BEATS)
        found = []
        for rank, beat in list(self._beats.items()):
            if beat.message and beat.message.failed:
                found.append(f"{self._name(rank)} failed: {beat.message.failed}")
            elif beat.missed >= limit:
                causes = "killed (out of memory?) or paused, or its host is down or cut off"
                found.append(f"{self._name(rank)} is lost: {causes}")
        return _some(found)

    def _find_stall(self) -> str:
        """Describe where the ranks are, if this rank has made no progress for too long."""
        # rank 0 reports first, because it knows of all ranks
        allowed = self._allowed_seconds + (0 if self._ranks.is_first else 10 * self._period)
        if self._beats_without_progress * self._period < allowed:
            return ""
        places = {self._ranks.rank: (self._step, self._place)}
        for rank, beat in self._beats.items():
            if beat.message:
                places[rank] = (beat.message.step, beat.message.place)
        # first those that are in another place than most
        common = list(places.values())
        order = sorted(places, key=lambda rank: (common.count(places[rank]), rank))
        where = _some([f"{self._name(rank)}: {places[rank][1]}, step {places[rank][0]}" for rank in order])
        return (
            f"no progress for {allowed:g} s ({where}); "
            "if that may take so long, raise train.timeout_seconds (at start train.timeout_minutes)"
        )

    def _give_up(self) -> None:
        """End this process, which may be waiting for another rank; what it was doing is written to `failures/`."""
        main = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = "".join(traceback.format_stack(main)) if main else ""
        message = f"{self._name(self._ranks.rank)} gives up at step {self._step}: {self._verdict}"
        details = f"{message}\n\nThe training was here:\n{stack}"
        try:
            first_rank_failed = self._name(0) in self._verdict
            write_failure(self._run_dir, self._ranks, message, details, first_rank_failed=first_rank_failed)
            if self._ranks.is_first:
                self._ended.wait(SILENT_BEATS * self._period)  # until the others have read it
        finally:
            os._exit(EXIT_GIVEN_UP)

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}"


def _is_from_collective(error: BaseException) -> bool:
    """Whether an error came from a collective operation, and so most likely from another rank's failure."""
    words = ("gloo", "nccl", "closed by peer", "reset by peer", "socket")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def _some(lines: list[str], limit: int = 8) -> str:
    """Join the first few of many lines into one."""
    more = f"; and {len(lines) - limit} more" if len(lines) > limit else ""
    return "; ".join(lines[:limit]) + more
