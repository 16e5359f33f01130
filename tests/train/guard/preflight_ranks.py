"""Checks devices and links before a run, on ranks of which the last is whole, slow or wrong; see test_preflight.py.

    torchrun --nproc-per-node 2 tests/train/guard/preflight_ranks.py FOLDER

Rank N writes to FOLDER/rank_N.json what it printed in each case, and the fault that it raised.
"""

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from colt5dist.errors import TrainingFault
from colt5dist.train.guard.preflight import Multiply, preflight
from colt5dist.train.ranks import (
    finish_process_group,
    gather_host_names,
    initialise_process_group,
    ranks_from_environment,
)


def eight_times(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A product that takes eight times as long."""
    return [torch.mm(left, right) for _ in range(8)][-1]


def one_element_wrong(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A product with one wrong element."""
    product = torch.mm(left, right)
    product[3, 5] += 1
    return product


def in_three_parts(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A product in parts, as GPU libraries make it; they may round the parts where that is not forbidden."""
    rounded = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    parts = [a @ b for a, b in zip(left.chunk(3, dim=1), right.chunk(3), strict=True)]
    return sum((part.bfloat16().float() if rounded else part for part in parts), torch.zeros_like(parts[0]))


def sum_with_one_element_wrong(sum_over_ranks: Callable[[torch.Tensor], object]) -> Callable[[torch.Tensor], None]:
    """An all-reduce whose result has one wrong element."""

    def damaged(values: torch.Tensor) -> None:
        sum_over_ranks(values)
        values[7] += 1

    return damaged


def main(folder: Path) -> None:
    """Run the cases."""
    ranks = ranks_from_environment()
    device = initialise_process_group(ranks, timeout_minutes=2)
    hosts = gather_host_names()
    is_last = ranks.rank == ranks.world_size - 1
    cases: dict[str, Multiply] = {"whole": torch.mm, "slow": eight_times, "wrong": one_element_wrong}
    cases["in parts"] = in_three_parts
    found = {}
    for case, multiply in {**cases, "wrong sum": torch.mm}.items():
        out, err, fault = StringIO(), StringIO(), ""
        damaged = sum_with_one_element_wrong(dist.all_reduce)
        reduce = damaged if is_last and case == "wrong sum" else dist.all_reduce
        with redirect_stdout(out), redirect_stderr(err), patch.object(dist, "all_reduce", reduce):
            try:
                preflight(ranks, hosts, device, multiply=multiply if is_last else torch.mm)
            except TrainingFault as error:
                fault = str(error)
        found[case] = {"out": out.getvalue(), "err": err.getvalue(), "fault": fault}
    (folder / f"rank_{ranks.rank}.json").write_text(json.dumps(found))
    finish_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
