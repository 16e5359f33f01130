"""Two hosts on one machine: two network namespaces with addresses of their own. Needs root and the command `ip`.

    python tests/two_hosts.py --ways cut kill

Each host runs `deepspeed -H hostfile --no_ssh --node_rank R --master_addr A` with one rank over gloo, in one run
directory. Then host 1 is cut off (its link goes down) or everything on it is killed: host 0 must stop within
train.timeout_seconds and name the lost rank and host. At last one host resumes from the checkpoint.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from conftest import MICRO_SETTINGS, trainer_environment  # noqa: E402

ADDRESSES = ("10.213.7.1", "10.213.7.2")
TIMEOUT_SECONDS = 24
SETTINGS = (
    *MICRO_SETTINGS,
    "train.steps=1000000",
    "checkpoint.every_steps=2",
    f"train.timeout_seconds={TIMEOUT_SECONDS}",
)


def why_not() -> str:
    """Why this machine cannot simulate two hosts; empty if it can."""
    if os.geteuid() != 0:
        return "needs root"
    if shutil.which("ip") is None:
        return "needs the command ip"
    name = f"probe{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return "network namespaces are not allowed here"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


def ip(*arguments: str) -> None:
    """Run the command `ip`."""
    subprocess.run(["ip", *arguments], check=True)


@contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """Make two network namespaces with a link between them; yields their names."""
    names = (f"host0x{os.getpid()}", f"host1x{os.getpid()}")
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", names[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start_host(number: int, name: str, folder: Path) -> subprocess.Popen[bytes]:
    """Start the deepspeed command on one host."""
    environment = {**trainer_environment(), "GLOO_SOCKET_IFNAME": "eth0"}
    named = f'hostname host-{number} && exec "$@"'
    command = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", named, "sh"]
    command += [str(Path(sys.executable).parent / "deepspeed"), "-q", "-H", str(folder / "hostfile"), "--no_ssh"]
    command += ["--node_rank", str(number), "--master_addr", ADDRESSES[0], "--master_port", "29613"]
    command += [str(ROOT / "launch" / "pretrain.py"), f"run_dir={folder / 'run'}", *SETTINGS]
    with open(folder / f"host_{number}.log", "wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def steps_done(folder: Path) -> int:
    """Number of recorded steps."""
    path = folder / "run" / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for_steps(folder: Path, count: int, processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait until `count` steps are recorded."""
    deadline = time.monotonic() + 180
    while steps_done(folder) < count:
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes), f"no steps: see {folder}"
        time.sleep(0.1)


def lose_a_host(way: str, folder: Path) -> float:
    """Train on two hosts and lose one; returns the seconds until the other one has stopped by itself."""
    folder.mkdir(parents=True)
    (folder / "hostfile").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    with two_hosts() as names:
        processes = [start_host(number, name, folder) for number, name in enumerate(names)]
        try:
            wait_for_steps(folder, 5, processes)
            if way == "cut":
                ip("-n", names[1], "link", "set", "eth0", "down")
            else:
                os.killpg(processes[1].pid, signal.SIGKILL)
            begin = time.monotonic()
            processes[0].wait(3 * TIMEOUT_SECONDS)
            seconds = time.monotonic() - begin
        finally:
            for process in processes:
                if process.poll() is None or way == "kill":
                    kill_group(process)
                process.wait()
    status = json.loads((folder / "run" / "status.json").read_text())
    assert status["status"] == "failed" and "rank 1 on host-1 is lost" in status["reason"], status
    assert "rank 1 on host-1 is lost" in (folder / "host_0.log").read_text()
    return seconds


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill all processes that a host still runs."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


Start = Callable[[Path, list[str]], subprocess.CompletedProcess[str]]
"""Runs a script with arguments to its end."""


def start_alone(script: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a script in a new process."""
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, env=trainer_environment(), capture_output=True, text=True, timeout=180)


def resume_alone(folder: Path, start: Start = start_alone) -> None:
    """Resume on one host from the newest checkpoint, and train two more steps."""
    saved = max(int(path.parent.name.split("_")[1]) for path in (folder / "run/checkpoints").glob("step_*/COMPLETE"))
    settings = [f"run_dir={folder / 'run'}", *SETTINGS, f"train.steps={saved + 2}"]
    done = start(ROOT / "launch" / "pretrain.py", settings)
    assert done.returncode == 0 and f"step_{saved:08d}" in done.stdout, f"{done.stdout}\n{done.stderr}"
    assert steps_done(folder) == saved + 2


def main(arguments: Sequence[str]) -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=("cut", "kill"), default=["cut", "kill"])
    parser.add_argument("--output", type=Path, help="a new folder, which is kept")
    options = parser.parse_args(arguments)
    if reason := why_not():
        print(f"skipped: {reason}")
        return 0
    folder = options.output or Path(tempfile.mkdtemp(prefix="two-hosts-"))
    for way in options.ways:
        seconds = lose_a_host(way, folder / way)
        resume_alone(folder / way)
        print(f"{way}: host 0 stopped after {seconds:.1f} s and named rank 1 on host-1; one host resumed", flush=True)
        assert seconds <= TIMEOUT_SECONDS, f"longer than train.timeout_seconds={TIMEOUT_SECONDS}"
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
