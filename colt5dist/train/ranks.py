"""Processes and devices: who this rank is, the process group, and the few collectives that the trainer uses."""

import os
import socket
import sys
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from colt5dist.errors import ConfigError, SaveError

EXIT_WRONG_INPUT = 2
EXIT_SAVE_FAILED = 74
EXIT_STOPPED = 75

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Place of this process among all, as the launcher's environment variables say."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for the run."""
        return self.rank == 0


def ranks_from_environment() -> Ranks:
    """Read RANK, LOCAL_RANK, WORLD_SIZE (set by deepspeed and torchrun); without a launcher there is one process.

    Raises:
        ConfigError: if they are no places among so many processes.
    """
    world_size = _environment_integer("WORLD_SIZE", 1, at_least=1)
    local_size = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if os.environ.get(name)), "WORLD_SIZE")
    ranks = Ranks(
        rank=_environment_integer("RANK", 0, at_least=0),
        local_rank=_environment_integer("LOCAL_RANK", 0, at_least=0),
        world_size=world_size,
        local_world_size=_environment_integer(local_size, world_size, at_least=1),
    )
    if ranks.rank >= world_size:
        raise ConfigError(f"RANK={ranks.rank}: not below WORLD_SIZE={world_size}; {_WHO_SETS_THEM}")
    if ranks.local_rank >= ranks.local_world_size:
        limit = f"{local_size}={ranks.local_world_size}"
        raise ConfigError(f"LOCAL_RANK={ranks.local_rank}: not below {limit}; {_WHO_SETS_THEM}")
    return ranks


_WHO_SETS_THEM = "deepspeed and torchrun set such environment variables; unset it to train in one process"


def _environment_integer(name: str, default: int, *, at_least: int) -> int:
    """An environment variable that a launcher sets."""
    text = os.environ.get(name, str(default))
    try:
        value = int(text)
    except ValueError:
        value = at_least - 1
    if value < at_least:
        raise ConfigError(f"{name}={text}: not an integer of {at_least} or more; {_WHO_SETS_THEM}")
    return value


def initialise_process_group(ranks: Ranks, timeout_minutes: float) -> torch.device:
    """Join the process group through DeepSpeed: NCCL where there are GPUs, gloo otherwise.

    Returns:
        The device of this rank.

    Raises:
        ConfigError: if the launcher's environment variables are incomplete, or some process does not come in time.
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
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks.local_world_size))
        _skip_shared_memory_op()
    try:
        deepspeed.init_distributed(timeout=timedelta(minutes=timeout_minutes), verbose=False)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise ConfigError(
            f"MASTER_ADDR, MASTER_PORT: {ranks.world_size} processes did not meet at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} ({str(error).splitlines()[0]}); see what the other hosts say"
        ) from error
    return device


def set_collective_timeout(seconds: float) -> None:
    """Change what a collective operation may take, in all process groups, DeepSpeed's included."""
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def finish_process_group() -> None:
    """Leave the process group; without this gloo sometimes turns a good run into a non-zero exit status."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Add up a small tensor over all ranks, in place, without waiting for the result on the host."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def barrier() -> None:
    """Wait until every rank is here."""
    dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


def gather_rows(row: list[float], device: torch.device) -> list[list[float]]:
    """The row of every rank, on every rank."""
    mine = torch.tensor(row, dtype=torch.float64, device=device)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    return [r.tolist() for r in rows]


def gather_objects(mine: T) -> list[T]:
    """The small object of every rank, on every rank."""
    objects: list[T] = [mine] * dist.get_world_size()
    dist.all_gather_object(objects, mine)
    return objects


def gather_host_names() -> list[str]:
    """Host name of every rank, on every rank."""
    return gather_objects(socket.gethostname())


def broadcast_from_first(value: object) -> object:
    """Rank 0's value of a small object, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def raise_together(problem: str | None, kind: type[Exception] = ConfigError) -> None:
    """Raise the problems of all ranks on all of them, so that none waits for the others.

    Raises:
        ConfigError: (or `kind`) if any rank brought a problem.
    """
    problems = gather_objects(problem)
    found = list(dict.fromkeys(p for p in problems if p))
    if found:
        finish_process_group()
        error = kind("\n".join(found))
        error.known_to_all = True  # type: ignore[attr-defined]
        raise error


def exit_for_wrong_input(error: ConfigError | SaveError, status: int = EXIT_WRONG_INPUT) -> int:
    """Report wrong input, or what else ends all ranks alike: rank 0 prints one line a problem, the others give it the
    time to do so. What another host found alone, or before the ranks could tell each other, its first rank prints.

    The launcher ends all ranks as soon as one leaves with a non-zero status: without the wait the lines could be lost.

    Returns:
        The exit status.
    """
    try:
        ranks = ranks_from_environment()
    except ConfigError:  # which may be what is reported; a rank that does not know its number speaks too
        ranks = Ranks(rank=0, local_rank=0, world_size=1, local_world_size=1)
    if ranks.is_first or (ranks.local_rank == 0 and not error.known_to_all):
        where = "" if ranks.is_first else f"host {socket.gethostname()}: "
        for line in str(error).splitlines():
            print(f"error: {where}{line}", file=sys.stderr, flush=True)
    if not ranks.is_first:
        time.sleep(5)
    return status


def _complete_environment(world_size: int) -> None:
    """Where variables are missing DeepSpeed would look for MPI; a single process gets them here, with any free port.

    Raises:
        ConfigError: if one of several processes lacks them.
    """
    if world_size > 1:
        missing = [key for key in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(key)]
        if missing:
            raise ConfigError(f"WORLD_SIZE={world_size}: without {', '.join(missing)}; {_WHO_SETS_THEM}")
        return
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for key, value in alone.items():
        os.environ.setdefault(key, value)


def _silence_memory_report() -> None:
    """Keep DeepSpeed's bf16 optimizer from printing the memory it uses, past every log level."""
    from deepspeed.runtime import bf16_optimizer

    bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None


def _skip_shared_memory_op() -> None:
    """Keep `init_distributed` from compiling a CPU operator for a minute that only DeepSpeed's inference uses."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
