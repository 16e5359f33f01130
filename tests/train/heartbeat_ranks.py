"""One rank of two over gloo that goes wrong in some way; started by test_heartbeat.py.

python tests/train/heartbeat_ranks.py RUN_DIR WAY TIMEOUT_SECONDS

In the way "slow" nothing is wrong: rank 1 only saves for longer than the timeout.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from colt5dist.train.config_file import load_config
from colt5dist.train.failures import failures_kept
from colt5dist.train.heartbeat import Heartbeat
from colt5dist.train.runtime import ranks_from_environment, set_collective_timeout

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny.yaml"


def go_wrong(way: str, rank: int, step: int) -> None:
    """What rank 1 does at step 3; "first" is the same of rank 0."""
    if step != 3 or rank != (0 if way.endswith("first") else 1):
        return
    match way.split("-")[0]:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "pause":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "raise":
            raise ValueError("a fault of this rank alone")
        case "memory":
            torch.empty(2**58, dtype=torch.uint8)
        case "wait":
            time.sleep(3600)


def main(run_dir: Path, way: str, timeout_seconds: float) -> None:
    """Add numbers up for ever."""
    ranks = ranks_from_environment()
    meeting = f"file://{run_dir.absolute() / 'meeting'}"
    dist.init_process_group(
        "gloo", init_method=meeting, rank=ranks.rank, world_size=ranks.world_size, timeout=timedelta(minutes=30)
    )
    config = load_config(TINY, [f"run_dir={run_dir}", "zero.stage=1"])
    hosts = ["host-a", "host-b"]
    heartbeat = Heartbeat(ranks, hosts, run_dir, start_seconds=1800, timeout_seconds=timeout_seconds)
    with heartbeat, failures_kept(config, ranks, hosts, heartbeat.explain):
        for step in range(1, 1_000_000):
            heartbeat.at("training", step)
            go_wrong(way, ranks.rank, step)
            if way == "slow" and step == 3:
                with heartbeat.patient("saving", step):
                    if ranks.rank == 1:
                        time.sleep(1.25 * timeout_seconds)
                    dist.all_reduce(torch.ones(1))
                break
            heartbeat.at("agreeing on the step", step)
            dist.all_reduce(torch.ones(1))
            if step == 1:
                heartbeat.step_is_done()
                # "collective": the operation's own timeout, which the heartbeat would else come before
                set_collective_timeout(2 if "collective" in way else 3600)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
