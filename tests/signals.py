"""Send stop signals to the real `deepspeed` command at random moments, and check that nothing is lost; run by hand.

    python tests/signals.py --ways group runner --times 20

A way is which process gets which signal: `group` (SIGTERM to the process group), `runner` (SIGTERM to the command
alone), `rank` (SIGTERM to one rank), `interrupt` (SIGINT to the group: Ctrl-C), `slurm` (SIGUSR1 to every rank: what
`sbatch --signal=USR1@60` sends before the time limit). Moments: start-up, evaluating, training, saving. After a signal
all processes must end within 25 s. If training had started, the checkpoint of the last recorded step must be whole,
`status.json` must say so, and the next start must resume from it.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))

from torture import Start, launch_ranks, newest_whole, train_on_cpu, wait_for_line, wait_for_save

ALLOWED_SECONDS = 25.0
MOMENTS = ("start-up", "evaluating", "training", "saving")
WAYS: dict[str, Callable[[Start], object]] = {
    "group": lambda start: signal_group(start, signal.SIGTERM),
    "runner": lambda start: start.processes[0].send_signal(signal.SIGTERM),
    "rank": lambda start: start.ranks[-1].send_signal(signal.SIGTERM),
    "interrupt": lambda start: signal_group(start, signal.SIGINT),
    "slurm": lambda start: [rank.send_signal(signal.SIGUSR1) for rank in start.ranks],
}
SETTINGS = ("train.steps=1000000", "train.log_every=1", "train.eval_every=5", "checkpoint.every_steps=4")


def signal_group(start: Start, number: signal.Signals) -> None:
    """Signal the process group, as a terminal or a supervisor does."""
    os.killpg(start.processes[0].pid, number)


def wait_for_end(start: Start, allowed: float) -> float:
    """Wait until all processes have ended; returns the seconds."""
    begin = time.monotonic()
    _, alive = psutil.wait_procs(start.processes, timeout=allowed)
    for process in alive:
        process.kill()
    assert not alive, f"{alive} are still running {allowed} s after the signal; see {start.log}"
    return time.monotonic() - begin


def one_signal(
    run_dir: Path, log: Path, way: str, moment: str, rng: random.Random, settings: Sequence[str], *, processes: int
) -> dict[str, object]:
    """Start, send the signal at the moment, and check; returns what was observed."""
    log.touch()
    (run_dir / "status.json").unlink(missing_ok=True)
    expected = newest_whole(run_dir)
    start = launch_ranks(run_dir, log, [*settings, *SETTINGS], processes=processes)
    if moment == "start-up":
        time.sleep(rng.uniform(0, 8))
    else:
        wait_for_line(start, "samples per step")  # the model is built; the first evaluation or step follows
        if moment != "evaluating" or expected:
            wait_for_line(start, "step ")
        if moment == "saving":
            wait_for_save(start, run_dir, rng)
        elif moment == "training":
            time.sleep(rng.uniform(0, 2))  # some steps, an evaluation and a checkpoint
    began = "resuming from" in log.read_text() or "samples per step" in log.read_text()
    WAYS[way](start)
    seconds = wait_for_end(start, ALLOWED_SECONDS)
    printed = log.read_text()
    # Ctrl-C also ends the command itself, by Python's KeyboardInterrupt
    assert printed.count("Traceback") <= (way == "interrupt"), f"see {log}"
    assert not (run_dir / "failures").exists(), f"see {run_dir / 'failures'}"
    if expected:
        assert f"{expected}\n" in printed or not began, f"did not resume from {expected}; see {log}"
    newest = newest_whole(run_dir)
    step = int(newest.split("_")[1]) if newest else 0
    status = json.loads((run_dir / "status.json").read_text()) if (run_dir / "status.json").exists() else None
    if began or status:
        assert status and status["status"] == "stopped" and status["step"] == step, f"{status}, {newest}; see {log}"
        records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == list(range(1, step + 1)), f"steps are lost; see {log}"
    else:  # training had not started: nothing changed
        assert newest == expected
    return {"way": way, "moment": moment, "began": began, "seconds": round(seconds, 1), "step": step, "status": status}


def main(arguments: Sequence[str]) -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=["group", "runner"])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1, help="ranks (default 1, as the default run on CPU)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a new folder, which is kept")
    parser.add_argument("--settings", nargs="*", default=[], metavar="key=value")
    options = parser.parse_args(arguments)
    folder = options.output or Path(tempfile.mkdtemp(prefix="signals-"))
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(options.seed)
    passed = 0
    for way in options.ways:
        good = 0
        for number in range(options.times):
            log = folder / f"{way}_{number:03d}.log"
            moment = MOMENTS[number % len(MOMENTS)]
            arguments_of = (folder / way, log, way, moment, rng, options.settings)
            try:
                seen = one_signal(*arguments_of, processes=options.processes)
                good += 1
                print(json.dumps(seen), flush=True)
            except AssertionError as error:
                print(f"FAILED: {way} while {moment}: {error}", flush=True)
        print(f"{way}: {good} of {options.times} saved in time", flush=True)
        passed += good
    return 0 if passed == len(options.ways) * options.times else 1


if __name__ == "__main__":
    train_on_cpu()
    sys.exit(main(sys.argv[1:]))
