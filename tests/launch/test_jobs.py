"""The jobs for Slurm and Kubernetes: what they start, and how they go on by exit status and `status.json`.

A few lines of shell stand for the commands that are not here (`srun`, `scontrol`, `getent`) and for the ranks.
"""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from colt5dist import __version__
from colt5dist.train.config.load import load_config
from colt5dist.train.ranks import EXIT_STOPPED, EXIT_WRONG_INPUT, Ranks, ranks_from_environment

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SBATCH = (LAUNCH / "slurm" / "pretrain.sbatch").read_text()
SERVICE, JOB = yaml.safe_load_all((LAUNCH / "kubernetes" / "pretrain.yaml").read_text())
(CONTAINER,) = JOB["spec"]["template"]["spec"]["containers"]
VARIABLES = {entry["name"]: entry["value"] for entry in CONTAINER["env"]}
PRE_STOP = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]


def program(folder: Path, name: str, text: str) -> None:
    """Write a shell script into a folder of programs."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


def settings(arguments: list[str]) -> None:
    """Check arguments of pretrain.py."""
    assert arguments[0] == "--config"
    load_config(arguments[1], arguments[2:])


def ends_with(how: str, status: int, more: str = ":") -> str:
    """Shell text of a run that ends so."""
    record = f"""echo '{{"status": "{how}", "step": 7}}' >"$RUN_DIR/status.json\""""
    return f'mkdir -p "$RUN_DIR"; {more}; {record}; exit {status}'


SAVES = 'cd "$RUN_DIR/checkpoints"; new=step_$(ls | wc -l); mkdir $new; touch $new/COMPLETE'
"""Shell text of a run that writes another checkpoint."""


class Slurm:
    """Runs the batch script; its ranks are shell text."""

    def __init__(self, folder: Path, ranks: str) -> None:
        self.run_dir, self.requeued, self.folder = folder / "run", folder / "requeued", folder
        (self.run_dir / "checkpoints").mkdir(parents=True)
        program(folder / "bin", "srun", f'echo "$@" >>{folder}/srun\n{ranks}')
        program(folder / "bin", "scontrol", f'echo "$@" >>{self.requeued}')
        (folder / "bin" / "activate").touch()
        text = SBATCH
        for name, value in {"RUN_DIR": f"export RUN_DIR={self.run_dir}", "VENV": f"VENV={folder}"}.items():
            text, number = re.subn(rf"^{name}=\S+", value, text, flags=re.MULTILINE)
            assert number == 1
        (folder / "job").write_text(text)

    def start(self, restart: int = 0) -> subprocess.Popen[str]:
        """Start the job, for the first time or as a requeued one."""
        environment = {**os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "41"}
        environment["SLURM_RESTART_COUNT"] = str(restart)
        return subprocess.Popen(["bash", str(self.folder / "job")], env=environment, stdout=subprocess.PIPE, text=True)

    def starts(self) -> list[int]:
        """Start the job as often as it requeues itself, five times at most; returns the exit statuses."""
        statuses: list[int] = []
        while len(statuses) < 5 and (not statuses or self.requeued.exists()):
            self.requeued.unlink(missing_ok=True)
            job = self.start(len(statuses))
            job.communicate(timeout=30)
            statuses.append(job.returncode)
        return statuses


@pytest.mark.parametrize(
    ("ranks", "statuses"),
    [
        (ends_with("finished", 0), [0]),
        (ends_with("stopped", 0), [0]),
        (ends_with("failed", EXIT_WRONG_INPUT, SAVES), [2]),
        (ends_with("stopped", EXIT_STOPPED, SAVES), [75] * 5),
        (ends_with("stopped", EXIT_STOPPED), [75] * 3),
        (ends_with("failed", 1, SAVES), [1] * 5),
        (ends_with("failed", 1), [1] * 3),
        ("exit 137", [137] * 3),
    ],
    ids=["finished", "file-stop", "wrong-input", "stopped", "no-progress", "fault", "same-fault", "killed"],
)
def test_a_slurm_job_requeues_itself(ranks: str, statuses: list[int], tmp_path: Path) -> None:
    """Until the run is finished or stopped by its user; not after wrong input or without any progress."""
    assert Slurm(tmp_path, ranks).starts() == statuses


def test_a_slurm_job_without_its_environment_ends_at_its_first_start(tmp_path: Path) -> None:
    """Later it may be a file system that is not there for a while."""
    slurm = Slurm(tmp_path, ends_with("finished", 0))
    (tmp_path / "bin" / "activate").unlink()
    first, second = slurm.start(0), slurm.start(1)
    assert f"VENV: {tmp_path} is no virtual environment" in first.communicate(timeout=30)[0]
    assert "VENV" not in second.communicate(timeout=30)[0]
    assert (first.returncode, second.returncode) == (EXIT_WRONG_INPUT, 0)


def test_the_log_of_a_slurm_job_says_where_each_start_begins(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, ends_with("finished", 0, SAVES))
    first, second = (slurm.start(restart).communicate(timeout=30)[0] for restart in (0, 1))
    when = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.match(rf"pretrain.sbatch: start 1 of job 41, {when}, newest checkpoint none\n", first)
    assert re.match(rf"pretrain.sbatch: start 2 of job 41, {when}, newest checkpoint step_0\n", second)


def test_a_slurm_job_near_its_time_limit_stops_the_run_and_is_requeued(tmp_path: Path) -> None:
    waits = 'touch "$RUN_DIR/started"; until [ -e "$RUN_DIR/STOP" ]; do sleep 0.05; done'
    slurm = Slurm(tmp_path, ends_with("stopped", 0, waits))
    job = slurm.start()
    while not (slurm.run_dir / "started").exists():
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=30)
    assert (job.returncode, slurm.requeued.read_text()) == (EXIT_STOPPED, "requeue 41\n")
    # its own file STOP, if no run obeyed it, does not stop the next start; a user's does
    program(tmp_path / "bin", "srun", ends_with("finished", 0, 'cat "$RUN_DIR/STOP" >"$RUN_DIR/seen"'))
    for text, seen in (("", ""), ("by hand\n", "by hand\n")):
        if text:
            (slurm.run_dir / "STOP").write_text(text)
        slurm.start(1).communicate(timeout=30)
        assert (slurm.run_dir / "seen").read_text() == seen


def test_a_slurm_job_starts_the_command(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, ends_with("finished", 0))
    slurm.starts()
    started = shlex.split((tmp_path / "srun").read_text())
    arguments = started[started.index("colt5dist-pretrain") + 1 :]
    assert arguments[-1] == f"run_dir={slurm.run_dir}"
    settings(arguments)


def pod(folder: Path, index: int, ranks: str, **variables: str) -> int:
    """Run the container's command as Kubernetes would start it; returns its exit status."""
    run_dir, programs = folder / "run", folder / "bin"
    program(programs, "getent", "exit 0")
    program(programs, "colt5dist-pretrain", ranks)
    (programs / "activate").write_text("")
    environment = {**VARIABLES, "PATH": f"{programs}:{os.environ['PATH']}", "VENV": str(folder)}
    environment |= {"RUN_DIR": str(run_dir), "TMPDIR": str(folder), "JOB_COMPLETION_INDEX": str(index)}
    environment |= {"HOSTNAME": f"{JOB['metadata']['name']}-{index}", **variables}
    command = [*CONTAINER["command"], *CONTAINER["args"]]
    return subprocess.run(command, env=environment, capture_output=True, timeout=30).returncode


def test_the_pods_start_the_ranks_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, gpus = int(VARIABLES["NODES"]), 2
    for index in range(nodes):
        assert pod(tmp_path, index, f'(env; echo "ARGUMENTS=$*") >{tmp_path}/rank_$RANK', GPUS="2") == 0
    places: list[Ranks] = []
    for rank in range(nodes * gpus):
        written = dict(line.partition("=")[::2] for line in (tmp_path / f"rank_{rank}").read_text().splitlines())
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.setenv(name, written[name])
        places.append(ranks_from_environment())
        assert (written["MASTER_ADDR"], written["MASTER_PORT"]) == ("colt5dist-0.colt5dist", "29400")
        settings(shlex.split(written["ARGUMENTS"]))
    assert places == [Ranks(rank, rank % gpus, nodes * gpus, gpus) for rank in range(nodes * gpus)]


@pytest.mark.parametrize(
    ("ranks", "status"),
    [
        (ends_with("finished", 0), 0),
        (ends_with("stopped", 0), EXIT_STOPPED),
        (ends_with("stopped", EXIT_STOPPED), EXIT_STOPPED),
        (f"exit {EXIT_WRONG_INPUT}", EXIT_WRONG_INPUT),
        ('[[ "$*" = *--dry-run ]] && exit 0; exit 2', 1),
        ('exit "$RANK"', 1),
    ],
    ids=["finished", "file-stop", "stopped", "wrong-input", "not-connected", "fault"],
)
def test_the_status_of_a_pod(ranks: str, status: int, tmp_path: Path) -> None:
    """Status 0 ends the pod's part in the Job, so only a finished run gives it."""
    assert pod(tmp_path, 0, ranks, GPUS="2") == status


def test_a_pod_that_is_removed_stops_the_run(tmp_path: Path) -> None:
    """The hook writes the file STOP once there are ranks, and waits until they have obeyed it."""
    environment = {**os.environ, "RUN_DIR": str(tmp_path), "TMPDIR": str(tmp_path)}
    stop = tmp_path / "STOP"
    subprocess.run(PRE_STOP, env=environment, check=True, timeout=30)
    assert not stop.exists()
    (tmp_path / "ranks").touch()
    hook = subprocess.Popen(PRE_STOP, env=environment)
    while not stop.exists():
        time.sleep(0.05)
    assert hook.poll() is None
    stop.unlink()
    assert hook.wait(timeout=30) == 0


def test_the_job_fits_itself_and_the_exit_statuses() -> None:
    spec, template = JOB["spec"], JOB["spec"]["template"]["spec"]
    rules: dict[Any, str] = {}
    for rule in spec["podFailurePolicy"]["rules"]:
        of = rule.get("onExitCodes")
        assert of is None or (of["operator"], of["containerName"]) == ("In", CONTAINER["name"])
        rules[tuple(of["values"]) if of else rule["onPodConditions"][0]["type"]] = rule["action"]
    assert rules == {(EXIT_WRONG_INPUT,): "FailJob", (EXIT_STOPPED,): "Ignore", "DisruptionTarget": "Ignore"}
    assert spec["completions"] == spec["parallelism"] == int(VARIABLES["NODES"])
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == int(VARIABLES["GPUS"])
    name = JOB["metadata"]["name"]
    assert name == SERVICE["metadata"]["name"] == SERVICE["spec"]["selector"]["job-name"] == template["subdomain"]
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {volume["name"] for volume in template["volumes"]}
    (install,) = template["initContainers"]
    assert install["image"] == CONTAINER["image"] and install["env"][0] in CONTAINER["env"]
    assert install["env"][1]["value"].endswith(f"/colt5dist-{__version__}-py3-none-any.whl")
    subprocess.run(["bash", "-n", "-c", install["command"][-1]], check=True)
    # Kubernetes itself replaces $(NAME) of a variable that it knows, and $$
    texts = [*CONTAINER["command"], *CONTAINER["args"], *PRE_STOP, *install["command"]]
    known = {*VARIABLES, "WHEEL", "JOB_COMPLETION_INDEX"}
    assert [text for text in texts if "$$" in text or known & set(re.findall(r"\$\((\w+)\)", text))] == []
