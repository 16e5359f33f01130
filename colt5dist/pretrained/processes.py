"""The processes that evaluate together: a process group of PyTorch's own, which sums and gathers."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from colt5dist.errors import ConfigError


@contextmanager
def joined_processes(world_size: int, local_rank: int) -> Iterator[torch.device]:
    """Join the other processes, and give the device of this one; a single process joins nothing.

    The launcher's environment variables say where the others are.

    Args:
        world_size: number of processes.
        local_rank: number of this process among those of its host.

    Raises:
        ConfigError: the host has too few GPUs.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"this host has {torch.cuda.device_count()} GPUs, too few for process {local_rank + 1} of it; start "
                "fewer, or set CUDA_VISIBLE_DEVICES= to use CPUs"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ and world_size > 1:
        torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all processes, in place; collective."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather_over_processes(value: Any) -> list[Any]:
    """The values of all processes, in the order of their numbers; collective.

    Args:
        value: what JSON can hold; it travels as JSON, which keeps every float.
    """
    if not dist.is_initialized():
        return [value]
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    sizes[dist.get_rank()] = len(content)
    lengths = sum_over_processes(sizes).tolist()
    row = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    row[: len(content)] = content
    rows = [torch.empty_like(row) for _ in lengths]
    dist.all_gather(rows, row)
    return [json.loads(bytes(row[:size].cpu().numpy())) for row, size in zip(rows, lengths, strict=True)]
