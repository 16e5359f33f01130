"""Pairs of ranks over gloo, one of which fails in some way; started by test_heartbeat.py.

    python tests/train/guard/heartbeat_ranks.py FOLDER TIMEOUT_SECONDS WAY=SURVIVOR...

A WAY is how one rank fails; SURVIVOR is the rank of the other one. All pairs run at once, each in FOLDER/WAY, until the
survivors have ended. Prints as JSON, by way, the survivor's exit status and the seconds until it ended; its output is
in the folder as `stderr_RANK`. In the ways "slow-save" and "slow-step" no rank fails: rank 1 only takes longer than the
timeout to save, or for the first step with new lengths.
"""

import contextlib
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from colt5dist.train.config.load import load_config
from colt5dist.train.guard.failures import record_failures
from colt5dist.train.guard.heartbeat import Heartbeat
from colt5dist.train.ranks import ranks_from_environment, set_collective_timeout

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "configs" / "tiny.yaml"
LONGEST_SECONDS = 200
sys.path.insert(0, str(ROOT / "tests"))

from forks import become_rank, rank_places  # noqa: E402


def fail(way: str, rank: int, step: int) -> None:
    """Fail on rank 1 at step 3; on rank 0 if the way ends with "first"."""
    if step != 3 or rank != (0 if way.endswith("first") else 1):
        return
    match way.split("-")[0]:
        case "kill" | "malformed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "pause":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "raise":
            raise ValueError("an error of this rank only")
        case "memory":
            torch.empty(2**58, dtype=torch.uint8)
        case "wait":
            time.sleep(3600)


def run_rank(run_dir: Path, way: str, timeout_seconds: float) -> None:
    """Sum numbers over the ranks until one of them fails."""
    ranks = ranks_from_environment()
    meeting = f"file://{run_dir.absolute() / 'meeting'}"
    dist.init_process_group(
        "gloo", init_method=meeting, rank=ranks.rank, world_size=ranks.world_size, timeout=timedelta(minutes=30)
    )
    config = load_config(TINY, [f"run_dir={run_dir}", "zero.stage=1"])
    hosts = ["host-a", "host-b"]
    heartbeat = Heartbeat(ranks, hosts, run_dir, start_seconds=1800, timeout_seconds=timeout_seconds)
    with heartbeat, record_failures(config, ranks, hosts, heartbeat.explain):
        for step in range(1, 1_000_000):
            heartbeat.at("training", step)
            if way == "malformed-kill" and ranks.rank == 1 and step == 3:
                for content in ("{", "[1]", '{"count": "x"}', "\\x00"):  # what a stranger may write to the port
                    heartbeat._store.set("rank 1", content)
                    time.sleep(timeout_seconds / 20)
            fail(way, ranks.rank, step)
            if way.startswith("slow") and step == 3:
                if way == "slow-step":
                    heartbeat.first_step_follows()
                with heartbeat.patient("saving", step) if way == "slow-save" else contextlib.nullcontext():
                    if ranks.rank == 1:
                        time.sleep(1.25 * timeout_seconds)
                    dist.all_reduce(torch.ones(1))
                break
            heartbeat.at("agreeing on the step", step)
            if step == 3 and "collective" in way:
                set_collective_timeout(2)  # the operation times out before the heartbeat does
            dist.all_reduce(torch.ones(1))
            if step == 1:
                heartbeat.step_is_done()
                set_collective_timeout(3600)


def start(run_dir: Path, timeout_seconds: str) -> list[int]:
    """Start two ranks as forks; returns their process ids."""
    run_dir.mkdir()
    pids = []
    for place in rank_places(2, 0):
        pid = os.fork()
        if pid == 0:
            arguments = ["rank", str(run_dir), run_dir.name, timeout_seconds]
            become_rank(place, Path(__file__), arguments, run_dir / "stdout", run_dir / f"stderr_{place['RANK']}")
        pids.append(pid)
    return pids


def main(root: Path, timeout_seconds: str, ways: dict[str, int]) -> None:
    """Start all pairs and wait for the survivors."""
    begin = time.monotonic()
    pairs = {way: start(root / way, timeout_seconds) for way in ways}
    waiting = {pairs[way][survivor]: way for way, survivor in ways.items()}
    alive = {pid for pair in pairs.values() for pid in pair}
    ended: dict[str, tuple[int, float]] = {}
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(LONGEST_SECONDS)
    try:
        while waiting:
            pid, status = os.wait()
            alive.remove(pid)
            if pid in waiting:
                ended[waiting.pop(pid)] = (os.waitstatus_to_exitcode(status), time.monotonic() - begin)
    finally:
        for pid in alive:
            os.kill(pid, signal.SIGKILL)
    print(json.dumps(ended))


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        run_rank(Path(sys.argv[2]), sys.argv[3], float(sys.argv[4]))
    else:
        survivors = (argument.split("=") for argument in sys.argv[3:])
        main(Path(sys.argv[1]), sys.argv[2], {way: int(rank) for way, rank in survivors})
