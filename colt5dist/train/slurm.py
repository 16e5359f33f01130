"""Slurm's tasks as ranks: `srun python launch/pretrain.py`, without a launcher that numbers the processes.

Slurm numbers its tasks in other variables than PyTorch reads. Here they are translated, so that the tasks of a step
are the ranks of one run, and never as many runs.
"""

import os
import re
import sys

from colt5dist.errors import ConfigError

STEP_VARIABLES = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NODELIST", "SLURM_LAUNCH_NODE_IPADDR")
"""Variables that srun gives its tasks; the script of sbatch, which is one process, has none of them."""
FIRST_PORT, NUM_PORTS = 12_000, 18_000
"""Ports from which one is chosen by the numbers of job and step; the kernel assigns others, above 32,767."""
MPI_SIZES = {"OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK", "PMI_SIZE": "PMI_RANK", "PMIX_SIZE": "PMIX_RANK"}
"""Variables of MPI's launchers for the number of processes, and for that of this process."""
FIX = "start with deepspeed or torchrun, or all tasks with srun python launch/pretrain.py ..."


def join_tasks() -> None:
    """Set the variables of a launcher in a process that is one of several tasks of Slurm and has no launcher.

    Those that are set already stay, for instance MASTER_ADDR.

    Raises:
        ConfigError: the tasks cannot be told apart, or were started by something else that starts several processes.
    """
    if "RANK" in os.environ:
        _add_local_size()
        return
    size = _integer("SLURM_STEP_NUM_TASKS") or _integer("SLURM_NTASKS") or _integer("SLURM_NPROCS") or 1
    if size == 1 or _integer("SLURM_PROCID") is None:
        _refuse_mpi()
        return
    if not any(os.environ.get(name) for name in STEP_VARIABLES):
        raise ConfigError(
            f"SLURM_NTASKS={size}: Slurm has {size} tasks, and srun did not start this process, so it is not known "
            f"which of them it is; {FIX}, or one process with srun --ntasks 1 python launch/pretrain.py ..."
        )
    rank, world_size = _integer("SLURM_PROCID"), os.environ.get("WORLD_SIZE", str(size))
    if world_size != str(size):
        raise ConfigError(f"WORLD_SIZE={world_size}: Slurm has {size} tasks; unset it, and the tasks are the ranks")
    local_size = _local_tasks(size)
    local_rank = _integer("SLURM_LOCALID")
    if local_rank is None and local_size == size:
        local_rank = rank
    address = "127.0.0.1" if local_size == size else _first_host()
    if local_rank is None or local_size is None or address is None:
        raise ConfigError(
            f"SLURM_NTASKS={size}: Slurm does not say which of the tasks are on one host (SLURM_LOCALID, "
            f"SLURM_STEP_TASKS_PER_NODE, SLURM_STEP_NODELIST); {FIX}"
        )
    place = {
        "RANK": rank,
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": local_size,
        "MASTER_ADDR": address,
        "MASTER_PORT": _port(),
    }
    for name, value in place.items():
        os.environ.setdefault(name, str(value))
    if rank == 0:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        print(
            f"note: the {size} tasks of Slurm are the ranks of this run; rank 0 waits for them at {where}",
            file=sys.stderr,
        )


def first_host(nodelist: str) -> str:
    """Return the first host of a list in Slurm's short form: `node01` of `node[01-03,07],login`."""
    depth, end = 0, len(nodelist)
    for position, letter in enumerate(nodelist):
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            end = position
            break
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodelist[:end])


def tasks_per_node(text: str) -> list[int]:
    """Return the tasks of each node from Slurm's short form: [2, 2, 1] of `2(x2),1`."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            return []
        found += [int(match[1])] * int(match[2] or 1)
    return found


def _add_local_size() -> None:
    """Set LOCAL_WORLD_SIZE where something else has numbered the tasks without it.

    Source: the hook conf/hooks/extra/50-slurm-pytorch.sh of NVIDIA's enroot, in images that set PYTORCH_VERSION.
    """
    if os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE"):
        return
    size = _integer("SLURM_STEP_NUM_TASKS") or _integer("SLURM_NTASKS")
    is_task = os.environ.get("RANK") == os.environ.get("SLURM_PROCID") and _integer("WORLD_SIZE") == size
    if size and is_task and (local_size := _local_tasks(size)):
        os.environ["LOCAL_WORLD_SIZE"] = str(local_size)


def _local_tasks(size: int) -> int | None:
    """Number of tasks on this host; None where Slurm does not say."""
    nodes = _integer("SLURM_STEP_NUM_NODES") or _integer("SLURM_NNODES") or _integer("SLURM_JOB_NUM_NODES")
    if nodes == 1:
        return size
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        per_node, node = tasks_per_node(os.environ.get(name, "")), _integer("SLURM_NODEID")
        if sum(per_node) == size and node is not None and node < len(per_node):
            return per_node[node]
    if nodes is None and not any(os.environ.get(name) for name in ("SLURM_NODEID", "SLURM_LOCALID")):
        return size  # without a word of several hosts there is one
    return None


def _first_host() -> str | None:
    """Address of the host of task 0."""
    for name in ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST"):
        if nodelist := os.environ.get(name):
            return first_host(nodelist)
    return os.environ.get("MASTER_ADDR") or os.environ.get("SLURM_LAUNCH_NODE_IPADDR")


def _port() -> int:
    """A port that other jobs, and other steps of this job, do not choose."""
    step = _integer("SLURM_STEP_ID") or _integer("SLURM_STEPID") or 0
    return FIRST_PORT + (31 * (_integer("SLURM_JOB_ID") or _integer("SLURM_JOBID") or 0) + step) % NUM_PORTS


def _refuse_mpi() -> None:
    """Refuse several processes that MPI has started: they would be as many runs.

    Raises:
        ConfigError: there are several.
    """
    for size, rank in MPI_SIZES.items():
        number = _integer(size)
        if number is not None and number > 1 and os.environ.get(rank):
            raise ConfigError(
                f"{size}={number}: MPI has started {number} processes, which would be as many runs; start with "
                "deepspeed or torchrun instead"
            )


def _integer(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else None
