"""Reader processes of one rank: started outside the trainer's process, with a pipe for the micro-batches of each.

A fork of a process that has used CUDA or NCCL, or that runs threads, may hang. So `Readers` forks one process early,
the starter. It only waits, and forks the readers whenever the trainer asks for them. What they make travels as bytes
through pipes: nothing is kept in /dev/shm, of which containers often have only 64 MB.
"""

import gc
import os
import queue
import signal
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import torch

from colt5dist.data.read.batch import Batch
from colt5dist.errors import ConfigError

STUCK_SECONDS = 1.0
"""Time that killed processes are given to end; one that waits for a disk may take longer."""
ITEMS_AHEAD = 4
"""Micro-batches that a reader makes before they are asked for, besides what its pipe holds."""
END = "end"


@dataclass(frozen=True)
class Item:
    """What a reader made."""

    batch: Batch | ConfigError
    """The micro-batch, or what is wrong with the data."""
    ends_step: bool
    """Whether it is the rank's last micro-batch of a step."""
    bad_records: list[str]
    """Damaged records that were found for the first time; their samples were replaced. One message each."""


class Readers:
    """Starts and ends the reader processes of a rank. Create it before the process touches a GPU or starts threads.

    Args:
        prepare: makes of a job the endless items that all readers share. The starter calls it once a job, before it
            forks the readers, so that they share its memory.
    """

    def __init__(self, prepare: Callable[[Any], Iterator[Callable[[], Item]]]) -> None:
        self._lock = threading.Lock()
        self._control, other_end = Pipe()
        trainer = os.getpid()

        def starter() -> None:
            self._control.close()
            _start_readers(other_end, prepare, trainer)

        starter_id = _fork(starter)
        other_end.close()
        # also where nobody calls close: when the last reference is gone, or the interpreter exits
        self._end = weakref.finalize(self, _end_starter, self._control, starter_id)

    def start(self, job: Any, number: int) -> list[Connection]:
        """End the readers that there are, and start others.

        Args:
            job: what `prepare` gets; it has to be picklable.
            number: how many readers; reader r makes every number-th item, beginning with item r.

        Returns:
            The pipe of each reader, for `receive`.

        Raises:
            Exception: what `prepare` raised.
            EOFError: the starter was killed.
        """
        with self._lock:
            self._control.send((job, number))
            problem = self._control.recv()
            if problem is not None:
                raise problem
            return [Connection(recv_handle(self._control), writable=False) for _ in range(number)]

    def kill(self) -> None:
        """Kill the readers at once; nothing is lost with them."""
        with self._lock:
            if not self._control.closed:
                _ask(self._control, None)

    def close(self) -> None:
        """Kill the readers and the starter; further calls do nothing."""
        with self._lock:
            self._end()


def _ask(control: Connection, request: str | None) -> None:
    """Have the starter kill the readers, and wait until it has; END: it also ends itself."""
    with suppress(OSError, EOFError):  # it is gone
        control.send(request)
        if control.poll(2 * STUCK_SECONDS):
            control.recv()


def _end_starter(control: Connection, starter: int) -> None:
    _ask(control, END)
    control.close()
    _wait_for([starter])


def receive(pipe: Connection, *, pin_memory: bool) -> Item:
    """Wait for the next item of a reader.

    Args:
        pipe: the reader's pipe.
        pin_memory: put the tensors in page-locked memory (needs a GPU).

    Raises:
        EOFError, OSError: the reader has ended.
        RuntimeError: the reader failed; the message has its traceback.
    """
    content, ends_step, bad_records = pipe.recv()
    if isinstance(content, str):
        raise RuntimeError(f"Caught in a reader process:\n{content}")
    if isinstance(content, ConfigError):
        return Item(content, ends_step, bad_records)
    batch: Any = {}
    for name, shape, dtype in content:
        batch[name] = tensor = torch.empty(shape, dtype=dtype, pin_memory=pin_memory)
        if tensor.numel():
            pipe.recv_bytes_into(tensor.numpy().data.cast("B"))
    return Item(batch, ends_step, bad_records)


def send(pipe: Connection, item: Item) -> None:
    """Write an item for `receive`: a short description, then the bytes of the tensors as they are."""
    if isinstance(item.batch, ConfigError):
        pipe.send((item.batch, item.ends_step, item.bad_records))
        return
    tensors: dict[str, torch.Tensor] = {name: t.contiguous() for name, t in dict(item.batch).items()}  # type: ignore[attr-defined]
    described = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    pipe.send((described, item.ends_step, item.bad_records))
    for tensor in tensors.values():
        if tensor.numel():
            pipe.send_bytes(tensor.numpy().data.cast("B"))


def _start_readers(control: Connection, prepare: Callable[[Any], Iterator[Callable[[], Item]]], trainer: int) -> None:
    """The starter: obey the trainer until it ends. A signal to the whole process group must not end the readers."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    gc.enable()  # the trainer may have switched it off
    torch.set_num_threads(1)
    readers: list[int] = []
    try:
        while True:
            request = control.recv()
            _kill(readers)
            readers = []
            if request is None or request == END:
                control.send(None)
                if request == END:
                    return
                continue
            job, number = request
            try:
                items = prepare(job)
            except Exception as error:
                control.send(error if isinstance(error, ConfigError) else RuntimeError(traceback.format_exc()))
                continue
            control.send(None)
            for reader in range(number):
                read_end, write_end = os.pipe()
                readers.append(_fork(partial(_read, islice(items, reader, None, number), write_end)))
                os.close(write_end)  # otherwise the end of a reader could not be seen
                send_handle(control, read_end, trainer)
                os.close(read_end)
    except (EOFError, OSError):
        pass  # the trainer has ended
    finally:
        _kill(readers)


def _read(items: Iterator[Callable[[], Item]], write_end: int) -> None:
    """A reader: make items, a few ahead of those that the trainer takes, until the trainer closes the pipe."""
    made: queue.Queue[Item | str] = queue.Queue(ITEMS_AHEAD)

    def make() -> None:
        try:
            for item in items:
                made.put(item())
        except BaseException:
            made.put(traceback.format_exc())

    threading.Thread(target=make, daemon=True).start()
    with suppress(BrokenPipeError), Connection(write_end, readable=False) as pipe:
        while True:
            item = made.get()
            if isinstance(item, str):
                pipe.send((item, True, []))
                return
            send(pipe, item)


def _fork(task: Callable[[], None]) -> int:
    """Run a task in a fork of this process; returns the id of the new process."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        task()
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _kill(processes: list[int]) -> None:
    """Kill child processes, and wait for their end."""
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _wait_for(processes)


def _wait_for(processes: list[int]) -> None:
    """Wait up to STUCK_SECONDS for the end of child processes."""
    deadline = time.monotonic() + STUCK_SECONDS
    for pid in processes:
        with suppress(ChildProcessError):
            while os.waitpid(pid, os.WNOHANG) == (0, 0) and time.monotonic() < deadline:
                time.sleep(0.005)
