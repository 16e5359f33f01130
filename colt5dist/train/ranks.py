"""Processes and devices: the place of this rank, the process group, and the collectives that the trainer uses."""

import os
import socket
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from colt5dist.errors import ConfigError, SaveError
from colt5dist.train.slurm import FIRST_PORT, NUM_PORTS, join_tasks

EXIT_WRONG_INPUT = 2
EXIT_SAVE_FAILED = 74
EXIT_STOPPED = 75

DEEPSPEEDS_PORT = "29500"
"""Port that `deepspeed` gives its ranks unless --master_port names another."""
LAUNCHER_HINT = "deepspeed and torchrun set such environment variables; unset it to train in one process"

MEETINGS: Counter[int] = Counter()
"""Number of meetings that this process has had as a rank."""

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Place of this process among all, from the launcher's environment variables."""

    rank: int
    """Number of this process among all."""
    local_rank: int
    """Number of this process among those of its host."""
    world_size: int
    """Number of processes."""
    local_world_size: int
    """Number of processes on this host."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes and prints for the run."""
        return self.rank == 0


def ranks_from_environment() -> Ranks:
    """Read RANK, LOCAL_RANK, WORLD_SIZE (set by deepspeed and torchrun).

    Without a launcher there is one process, or one for each of several tasks of Slurm.

    Returns:
        The place of this process.

    Raises:
        ConfigError: the variables are not integers, or contradict each other.
    """
    join_tasks()
    world_size = _environment_integer("WORLD_SIZE", 1, at_least=1)
    local_size = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if os.environ.get(name)), "WORLD_SIZE")
    ranks = Ranks(
        rank=_environment_integer("RANK", 0, at_least=0),
        local_rank=_environment_integer("LOCAL_RANK", 0, at_least=0),
        world_size=world_size,
        local_world_size=_environment_integer(local_size, world_size, at_least=1),
    )
    if ranks.rank >= world_size:
        raise ConfigError(f"RANK={ranks.rank}: not below WORLD_SIZE={world_size}; {LAUNCHER_HINT}")
    if ranks.local_rank >= ranks.local_world_size:
        limit = f"{local_size}={ranks.local_world_size}"
        raise ConfigError(f"LOCAL_RANK={ranks.local_rank}: not below {limit}; {LAUNCHER_HINT}")
    return ranks


def _environment_integer(name: str, default: int, *, at_least: int) -> int:
    """Read an environment variable that a launcher sets."""
    text = os.environ.get(name, str(default))
    try:
        value = int(text)
    except ValueError:
        value = at_least - 1
    if value < at_least:
        raise ConfigError(f"{name}={text}: not an integer of {at_least} or more; {LAUNCHER_HINT}")
    return value


def initialise_process_group(ranks: Ranks, timeout_minutes: float) -> torch.device:
    """Join the process group through DeepSpeed: NCCL if there are GPUs, otherwise gloo.

    Args:
        ranks: place of this rank.
        timeout_minutes: timeout of collective operations, and of the start of all processes.

    Returns:
        The device of this rank.

    Raises:
        ConfigError: the launcher's environment variables are incomplete, or a process did not join in time.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _complete_environment(ranks.world_size)
    # torch 2.13 renamed two collectives that DeepSpeed 0.19.8 still calls by their old names
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*(all_gather_into|reduce_scatter)_tensor.*")
    import deepspeed

    deepspeed.utils.logging.logger.setLevel("WARNING")
    _silence_memory_report()
    if torch.cuda.is_available():
        device = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        _skip_shared_memory_op()
    try:
        deepspeed.init_distributed(timeout=timedelta(minutes=timeout_minutes), verbose=False)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise _not_connected(ranks.world_size, str(error).splitlines()[0]) from error
    if device.type == "cpu":
        places = gather_objects((socket.gethostname(), sorted(os.sched_getaffinity(0))))
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads_of_rank(places, ranks.rank))
    return device


def threads_of_rank(places: list[tuple[str, list[int]]], rank: int) -> int:
    """Threads with which a rank computes on CPUs: its cores, shared out among the ranks that may use exactly the same.

    Args:
        places: host name of every rank, and the numbers of the cores that it may use (Slurm may give each task its own,
            other launchers give all ranks of a host all cores).
        rank: number of the rank.
    """
    return max(1, len(places[rank][1]) // places.count(places[rank]))


class Meeting:
    """Texts of all ranks, exchanged before there is a process group: by TCP alone, whatever libraries the ranks have.

    Rank 0 serves the texts at MASTER_ADDR and MASTER_PORT. The process group that is made afterwards uses the same
    server, so keep the meeting until then.

    Args:
        ranks: place of this rank; there are several.
        timeout_minutes: how long rank 0 waits for the other ranks, and they for it.

    Raises:
        ConfigError: the launcher's environment variables are incomplete, the port is taken, or rank 0 is not there.
    """

    def __init__(self, ranks: Ranks, timeout_minutes: float) -> None:
        _complete_environment(ranks.world_size)
        self._ranks = ranks
        serves = ranks.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun serves itself
        try:
            store = dist.TCPStore(
                os.environ["MASTER_ADDR"],
                _environment_integer("MASTER_PORT", 0, at_least=0),
                is_master=serves,
                wait_for_workers=False,
                timeout=timedelta(minutes=timeout_minutes),
                multi_tenant=True,
            )
        except (dist.DistStoreError, dist.DistNetworkError) as error:
            raise _not_connected(ranks.world_size, str(error).splitlines()[0]) from error
        # the server keeps the texts of earlier meetings, and torchrun's also those of processes that it has replaced
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(f"colt5dist/{start}/{MEETINGS[ranks.rank]}", store)
        MEETINGS[ranks.rank] += 1

    def gather(self, title: str, text: str) -> list[str]:
        """Have rank 0 get a text of every rank; every rank calls this.

        Args:
            title: what the text is, another one at every call.
            text: this rank's.

        Returns:
            The texts of all ranks on rank 0, and nothing on the others.

        Raises:
            ConfigError: on rank 0, if a rank did not send its text in time.
        """
        keys = [f"{title}/{rank}" for rank in range(self._ranks.world_size)]
        try:
            self._store.set(keys[self._ranks.rank], text)
            if not self._ranks.is_first:
                return []
            return [value.decode() for value in self._store.multi_get(keys)]
        except (dist.DistStoreError, dist.DistNetworkError) as error:
            if not self._ranks.is_first:
                raise _not_connected(len(keys), "rank 0 has ended") from error
            missing = describe_ranks([rank for rank, key in enumerate(keys) if not self._store.check([key])])
            raise _not_connected(len(keys), f"no word from {missing}") from error

    def tell(self, title: str, text: str) -> str:
        """Return rank 0's text on all ranks, once all of them have it; every rank calls this.

        Args:
            title: what the text is, another one at every call.
            text: rank 0's; the others' is not used.

        Raises:
            ConfigError: rank 0 did not send it in time, or did not get an answer.
        """
        if self._ranks.is_first:
            self._store.set(title, text)
        else:
            try:
                text = self._store.get(title).decode()
            except (dist.DistStoreError, dist.DistNetworkError) as error:
                raise _not_connected(self._ranks.world_size, "no word from rank 0") from error
        self.gather(f"{title}: read", "")  # rank 0, which serves, must not end before
        return text


def describe_ranks(numbers: list[int]) -> str:
    """Name ranks in words: `rank 0`, `ranks 1-7, 9`."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(texts)}"


def _not_connected(world_size: int, why: str) -> ConfigError:
    """The error of a start whose processes do not find each other."""
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if "EADDRINUSE" in why or "in use" in why:
        return ConfigError(
            f"MASTER_PORT: port {port} is in use on this host, perhaps by another run; start with another one: "
            f"deepspeed --master_port {int(port) + 1 if int(port) < 65_535 else 29_500} ..."
        )
    return ConfigError(
        f"MASTER_ADDR, MASTER_PORT: {world_size} processes did not connect at {host}:{port} ({why}); see the output of "
        "the other hosts"
    )


def set_collective_timeout(seconds: float) -> None:
    """Set the timeout of collective operations in all process groups, including DeepSpeed's."""
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def finish_process_group() -> None:
    """Leave the process group; without this gloo sometimes ends a successful run with a non-zero exit status."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum a small tensor over all ranks, in place, without waiting for the result on the host; collective."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def barrier() -> None:
    """Wait until every rank has called this."""
    dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


def gather_rows(row: list[float], device: torch.device) -> list[list[float]]:
    """Gather a row of numbers from every rank, on every rank; collective."""
    mine = torch.tensor(row, dtype=torch.float64, device=device)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    return [r.tolist() for r in rows]


def gather_objects(mine: T) -> list[T]:
    """Gather a small object from every rank, on every rank; collective."""
    objects: list[T] = [mine] * dist.get_world_size()
    dist.all_gather_object(objects, mine)
    return objects


def gather_host_names() -> list[str]:
    """Gather the host name of every rank, on every rank; collective."""
    return gather_objects(socket.gethostname())


def broadcast_from_first(value: object) -> object:
    """Return rank 0's value of a small object on every rank; collective."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def raise_together(problem: str | None, kind: type[Exception] = ConfigError) -> None:
    """Raise the problems of all ranks on all of them, so that none waits for the others; collective.

    Args:
        problem: what is wrong on this rank; None: nothing.
        kind: type of the exception.

    Raises:
        ConfigError: (or `kind`) if any rank has a problem.
    """
    problems = gather_objects(problem)
    found = list(dict.fromkeys(p for p in problems if p))
    if found:
        finish_process_group()
        error = kind("\n".join(found))
        error.known_to_all = True  # type: ignore[attr-defined]
        raise error


@contextmanager
def errors_on_all_ranks() -> Iterator[None]:
    """Turn a ConfigError inside this context, on any rank, into a ConfigError on all ranks; collective at its end."""
    problem = None
    try:
        yield
    except ConfigError as error:
        problem = str(error)
    raise_together(problem)


def exit_for_wrong_input(error: ConfigError | SaveError, status: int = EXIT_WRONG_INPUT) -> int:
    """Report wrong input, or another error that ends all ranks, as one line per problem on stderr.

    Rank 0 prints, and the others wait: the launcher ends all ranks as soon as one exits with a non-zero status, so the
    lines could be lost without the wait. If only another host found the problem, its first rank prints.

    Args:
        error: its message has one line per problem.
        status: the exit status to return.

    Returns:
        The exit status.
    """
    try:
        ranks = ranks_from_environment()
    except ConfigError:  # possibly the reported error; a rank that does not know its number prints too
        ranks = Ranks(rank=0, local_rank=0, world_size=1, local_world_size=1)
    if ranks.is_first or (ranks.local_rank == 0 and not error.known_to_all):
        where = "" if ranks.is_first else f"host {socket.gethostname()}: "
        for line in str(error).splitlines():
            print(f"error: {where}{line}", file=sys.stderr, flush=True)
    if not ranks.is_first:
        time.sleep(5)
    return status


def _complete_environment(world_size: int) -> None:
    """Set the launcher's variables for a single process, with any free port; otherwise DeepSpeed would look for MPI.

    Also several processes of one host get a port of their own from `deepspeed`, whose default is always the same: by
    the number of the launcher's process, which all of them know. So two runs on one host do not meet.

    Raises:
        ConfigError: they are incomplete in one of several processes.
    """
    if world_size > 1:
        missing = [key for key in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(key)]
        if missing:
            raise ConfigError(f"WORLD_SIZE={world_size}: {', '.join(missing)} not set; {LAUNCHER_HINT}")
        # LOCAL_SIZE: deepspeed's number of processes on this host; torchrun has another name for it
        if os.environ.get("LOCAL_SIZE") == str(world_size) and os.environ["MASTER_PORT"] == DEEPSPEEDS_PORT:
            os.environ["MASTER_PORT"] = str(FIRST_PORT + os.getppid() % NUM_PORTS)
        return
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)
    if os.environ.get("MASTER_PORT") in (None, DEEPSPEEDS_PORT) and "TORCHELASTIC_RUN_ID" not in os.environ:
        os.environ["MASTER_PORT"] = "0"


def _silence_memory_report() -> None:
    """Keep DeepSpeed's bf16 optimizer from printing its use of memory, which it does at every log level."""
    from deepspeed.runtime import bf16_optimizer

    bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None


def _skip_shared_memory_op() -> None:
    """Keep `init_distributed` from compiling, for a minute, a CPU operator that only DeepSpeed's inference uses."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
