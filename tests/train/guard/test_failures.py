"""Whose reason `status.json` has, when ranks that have lost each other both write it."""

import json
import os
from pathlib import Path

import pytest

from colt5dist.train.guard import failures
from colt5dist.train.ranks import Ranks
from colt5dist.train.run_directory import STATUS, write_status

FIRST, OTHER = (Ranks(rank=rank, local_rank=0, world_size=2, local_world_size=1) for rank in (0, 1))


def reason(run_dir: Path) -> str:
    assert not list(run_dir.glob("*.tmp"))
    return json.loads((run_dir / STATUS).read_text())["reason"]


def give_up(run_dir: Path, ranks: Ranks) -> None:
    failures.write_failure(run_dir, ranks, f"rank {ranks.rank} gives up", "details", first_rank_failed=True)


@pytest.mark.parametrize("has_links", [True, False])
def test_what_rank_0_writes_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool) -> None:
    def refuse(*_: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    give_up(tmp_path, OTHER)
    assert reason(tmp_path) == "rank 1 gives up"
    give_up(tmp_path, FIRST)
    assert reason(tmp_path) == "rank 0 gives up"
    give_up(tmp_path, OTHER)
    assert reason(tmp_path) == "rank 0 gives up"


def test_what_rank_0_writes_counts_also_while_another_rank_is_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def last_step(run_dir: Path) -> int:
        write_status(run_dir, "failed", 5, "rank 0 gives up")
        return 5

    monkeypatch.setattr(failures, "last_step", last_step)
    give_up(tmp_path, OTHER)
    assert reason(tmp_path) == "rank 0 gives up"
