"""Kill and restart a run of two processes many times, and compare its losses with those of an undisturbed run.

    python tests/torture.py --rounds 200  # by hand, long
    python tests/torture.py --rounds 4 --launcher-every 4 --seed 1  # as in the tests

At random moments, a third of them while a checkpoint is being written, one rank or both are killed with SIGKILL. Most
rounds fork their ranks from this process, which has imported everything, so that a round takes a few seconds. Every
`--launcher-every`-th round is started by the real `deepspeed` command; then a rank, launch.py, the command itself, or
everything is killed. Half of the rounds save in the background. After each kill the remaining processes must end by
themselves. Each start must resume from the newest whole checkpoint, which this script finds with its own code. At the
end the losses and gradient norms of all steps must equal the undisturbed run's to the bit.
"""

import argparse
import contextlib
import ctypes
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from conftest import MICRO_SETTINGS, free_port, trainer_environment  # noqa: E402
from forks import become_rank, import_everything, rank_places  # noqa: E402

SETTINGS = (
    *MICRO_SETTINGS,
    "train.micro_batch_size=4",
    "checkpoint.every_steps=2",
    "checkpoint.keep_last=2",
    "train.timeout_seconds=20",
)
NEVER_STEPS = "train.steps=1000000"
END_SECONDS = 60.0
"""Seconds after a kill within which the remaining processes must have ended."""
START_SECONDS = 180.0


def train_on_cpu() -> None:
    """Set the environment of processes that train, for a script that runs by itself."""
    os.environ.update(trainer_environment())
    os.environ.pop("TRITON_INTERPRET", None)


@dataclass
class Start:
    """A started run."""

    processes: list[psutil.Process]
    """Everything that can be killed: first the launcher's processes, last the ranks."""
    log: Path
    """File with the output of all processes."""
    num_ranks: int = 2
    """Number of ranks."""

    @property
    def ranks(self) -> list[psutil.Process]:
        """The ranks."""
        return self.processes[-self.num_ranks :]


def newest_whole(run_dir: Path) -> str | None:
    """Name of the newest checkpoint whose files have the sizes that COMPLETE states."""
    for folder in sorted((run_dir / "checkpoints").glob("step_*"), reverse=True):
        try:
            files = json.loads((folder / "COMPLETE").read_text())["files"]
        except (OSError, ValueError):
            continue
        sizes = {entry["name"]: entry["bytes"] for entry in files}
        if all((folder / name).exists() and (folder / name).stat().st_size == n for name, n in sizes.items()):
            return folder.name
    return None


def fork_ranks(run_dir: Path, log: Path, settings: Sequence[str], *, processes: int = 2) -> Start:
    """Start ranks as forks of this process."""
    ranks = []
    for place in rank_places(processes, free_port()):
        pid = os.fork()
        if pid == 0:
            become_rank(place, ROOT / "launch" / "pretrain.py", [f"run_dir={run_dir}", *settings], log, log)
        ranks.append(psutil.Process(pid))
    return Start(ranks, log, processes)


def launch_ranks(run_dir: Path, log: Path, settings: Sequence[str], *, processes: int = 2) -> Start:
    """Start ranks with the real `deepspeed` command."""
    command = [str(Path(sys.executable).parent / "deepspeed"), "-q", "--master_port", str(free_port())]
    command += [
        "--num_accelerators",
        str(processes),
        str(ROOT / "launch" / "pretrain.py"),
        f"run_dir={run_dir}",
        *settings,
    ]
    with open(log, "ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    runner = psutil.Process(process.pid)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        for launcher in runner.children():
            with contextlib.suppress(psutil.NoSuchProcess):  # a short command of deepspeed's, which ended just now
                ranks = launcher.children()
                if len(ranks) == processes:
                    return Start([runner, launcher, *ranks], log, processes)
        time.sleep(0.1)
    raise AssertionError(f"deepspeed did not start: see {log}")


def reap(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Collect ended children; returns the processes that are still running."""
    alive = []
    for process in processes:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process.pid, os.WNOHANG)
        with contextlib.suppress(psutil.NoSuchProcess):  # its parent has collected it just now
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive


def wait_for_end(start: Start) -> None:
    """Check that all processes of a start end by themselves."""
    # ranks whose launcher was killed early notice it only after all imports
    seconds = END_SECONDS if len(start.processes) == start.num_ranks else START_SECONDS
    deadline = time.monotonic() + seconds
    while alive := reap(start.processes):
        assert time.monotonic() < deadline, f"{alive} are still running {seconds} s after the kill; see {start.log}"
        time.sleep(0.05)


def wait_for_line(start: Start, words: str) -> str:
    """Wait for a line in the log of a start."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        for line in start.log.read_text(errors="replace").splitlines():
            if words in line:
                return line
        assert reap(start.ranks), f"ended before it said {words!r}; see {start.log}"
        assert time.monotonic() < deadline, f"no {words!r} after {START_SECONDS} s; see {start.log}"
        time.sleep(0.02)


def wait_for_save(start: Start, run_dir: Path, rng: random.Random) -> bool:
    """Wait until a checkpoint's temporary folder exists, and then for a random part of the save."""
    deadline = time.monotonic() + 30
    seen = set((run_dir / "checkpoints").glob(".step_*"))
    while time.monotonic() < deadline and reap(start.ranks):
        if set((run_dir / "checkpoints").glob(".step_*")) - seen:
            time.sleep(rng.choice((0.0, rng.uniform(0, 0.02), rng.uniform(0, 0.1))))
            return True
    return False


def one_round(run_dir: Path, number: int, rng: random.Random, *, launcher: bool) -> dict[str, object]:
    """Start, check what the run resumes from, and kill; returns what was done."""
    log = run_dir.parent / f"round_{number:04d}.log"
    log.touch()
    expected = newest_whole(run_dir)
    begin = time.monotonic()
    asynchronous = rng.random() < 0.5
    settings = [*SETTINGS, NEVER_STEPS, f"checkpoint.asynchronous={asynchronous}"]
    start = (launch_ranks if launcher else fork_ranks)(run_dir, log, settings)
    in_save = rng.random() < 1 / 3
    moment = "save"
    if not in_save and rng.random() < 0.2:
        moment = "start"
        time.sleep(rng.uniform(0, 3))
    else:
        wait_for_line(start, "step ")
        if not in_save or not wait_for_save(start, run_dir, rng):
            moment = "training"
            time.sleep(rng.uniform(0, 2))
    victims = ["rank 0", "rank 1", "all"] + (["runner", "launch.py"] if launcher else [])
    victim = rng.choice(victims)
    chosen = {
        "rank 0": start.ranks[:1],
        "rank 1": start.ranks[1:],
        "all": start.processes,
        "runner": start.processes[:1],
        "launch.py": start.processes[1:2],
    }[victim]
    for process in chosen:
        process.kill()
    killed = time.monotonic()
    if moment == "start" and not launcher:
        # without a heartbeat yet, the others would wait for train.timeout_minutes; a launcher would end them
        for process in start.processes:
            process.kill()
    wait_for_end(start)
    ended = time.monotonic()
    said = re.findall(r"resuming from .*/(step_\d+)", log.read_text(errors="replace"))
    assert not said or said == [expected], f"resumed from {said}, the newest whole one is {expected}; see {log}"
    if moment != "start":
        assert (said or [None]) == [expected], f"resumed from {said}, the newest whole one is {expected}; see {log}"
    return {
        "round": number,
        "launcher": launcher,
        "asynchronous": asynchronous,
        "moment": moment,
        "victim": victim,
        "from": expected,
        "newest": newest_whole(run_dir),
        "seconds": round(killed - begin, 2),
        "end_seconds": round(ended - killed, 2),
    }


def finish(run_dir: Path, steps: int, log: Path) -> list[tuple[object, ...]]:
    """Run to a last step without kills; returns step, loss, gradient norm, rate and tokens of all steps."""
    start = fork_ranks(run_dir, log, [*SETTINGS, f"train.steps={steps}"])
    while reap(start.ranks):
        time.sleep(0.1)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert json.loads((run_dir / "status.json").read_text()) == {"status": "finished", "step": steps}, log
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"], r["input_tokens"]) for r in records]


def main(arguments: Sequence[str]) -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="number of kills")
    parser.add_argument("--minutes", type=float, help="or: as many kills as fit into this time")
    parser.add_argument("--launcher-every", type=int, default=10, help="0: never the deepspeed command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a new folder, which is kept; else a temporary one")
    options = parser.parse_args(arguments)
    folder = options.output or Path(tempfile.mkdtemp(prefix="torture-"))
    folder.mkdir(parents=True, exist_ok=True)
    # orphans become children of this process, which can wait for them
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    import_everything()
    rng = random.Random(options.seed)
    run_dir = folder / "run"
    deadline = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    rounds = 0
    while rounds < (options.rounds or sys.maxsize) and time.monotonic() < deadline:
        rounds += 1
        launcher = bool(options.launcher_every) and rounds % options.launcher_every == 0
        done = one_round(run_dir, rounds, rng, launcher=launcher)
        print(json.dumps(done), flush=True)
        with open(folder / "rounds.jsonl", "a") as file:
            file.write(json.dumps(done) + "\n")
    newest = newest_whole(run_dir)
    steps = (int(newest.split("_")[1]) if newest else 0) + 2
    disturbed = finish(run_dir, steps, folder / "finish.log")
    undisturbed = finish(folder / "undisturbed", steps, folder / "undisturbed.log")
    assert [row[0] for row in disturbed] == list(range(1, steps + 1)), "steps are missing or repeated"
    different = [a[0] for a, b in zip(disturbed, undisturbed, strict=True) if a != b]
    print(f"{rounds} rounds, {steps} steps, {len(different)} of them differ from the undisturbed run")
    if different:
        print(f"FAILED: first at step {different[0]}; see {folder}")
    elif not options.output:
        shutil.rmtree(folder)
    return 1 if different else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    train_on_cpu()
    sys.exit(main(sys.argv[1:]))
