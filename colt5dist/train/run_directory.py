"""The run directory: what is there decides whether a run starts, goes on, or is finished.

In it: `config.yaml` (resolved), `environment.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`, `status.json`,
`failures/`.
"""

import json
import os
import platform
import secrets
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import colt5dist
from colt5dist.errors import ConfigError
from colt5dist.files import write_whole
from colt5dist.train.checkpoint import (
    COMPLETE,
    TrainerState,
    checkpoint_bytes,
    find_checkpoints,
    model_problems,
    optimizer_problems,
    read_state,
    remove_unfinished,
)
from colt5dist.train.config import RunConfig
from colt5dist.train.config_file import config_leaves, config_to_yaml, saved_leaves
from colt5dist.train.engine import num_elements
from colt5dist.train.runtime import Ranks, broadcast_from_first, raise_together

MAY_CHANGE = (
    "run_dir",
    "resume",
    "resume_allow",
    "init_from",
    "data.shards",  # its fingerprint is compared
    "data.sources",  # likewise
    "data.num_workers",
    "data.skip",  # what was passed over stands in the checkpoints
    "data.max_bad_records",
    "data.cache_gb",
    "train.steps",
    "train.micro_batch_size",
    "train.log_every",
    "train.eval_every",
    "train.routing_every",
    "train.max_minutes",
    "train.timeout_minutes",
    "train.timeout_seconds",
    "zero",
    "checkpoint",
    "profile",
)
"""Keys and sections that a resumed run may change without naming them in `resume_allow`."""


@dataclass(frozen=True)
class StartPlan:
    """How the run begins."""

    resume_from: Path | None
    """Checkpoint to go on from."""
    init_from: Path | None
    """Checkpoint of another run to take the weights from."""
    state: TrainerState
    """State before the first step of this start."""
    notes: tuple[str, ...]
    """What the user should know about it."""

    def is_finished(self, config: RunConfig) -> bool:
        """Whether the last step is already done."""
        return self.state.step >= config.train.steps


def plan_start(config: RunConfig, fingerprint: str, shapes: dict[str, tuple[int, ...]]) -> StartPlan:
    """Decide from the run directory how to begin; reads only.

    Args:
        config: the run.
        fingerprint: of the shards' manifest.
        shapes: parameters of the model.

    Raises:
        ConfigError: the folder holds another run, or none where one must be, or too little space is left.
    """
    run_dir = Path(str(config.run_dir))
    whole, damaged = find_checkpoints(run_dir / "checkpoints")
    notes = [f"passed over {folder}: not whole" for folder in damaged]
    broken = [folder for folder in damaged if (folder / COMPLETE).exists()]
    if broken and not whole:
        raise ConfigError(
            f"{broken[-1]}: damaged, and no other checkpoint is there; put it back, or move it away to start anew"
        )
    if config.resume == "never" and ((run_dir / "config.yaml").exists() or whole):
        raise ConfigError(f"run_dir: {run_dir} already holds a run; name another folder, or set resume=auto")
    if config.resume == "must" and not whole:
        raise ConfigError(f"resume: no whole checkpoint in {run_dir / 'checkpoints'}; set resume=auto to start anew")
    needed = checkpoint_bytes(sum(num_elements(shape) for shape in shapes.values()))
    problems = space_problems(run_dir, needed, config.checkpoint.keep_last + 1 - len(whole))
    if whole:
        problems += _difference_problems(config, run_dir)
        problems += model_problems(whole[-1], shapes) + optimizer_problems(whole[-1], config.optimizer)
        state = read_state(whole[-1])
        if state.data_fingerprint != fingerprint:
            problems.append(
                f"{_shards_name(config)} is not what this run was trained on; name the same shards, or another run_dir"
            )
        if not problems:
            return StartPlan(whole[-1], None, state, (*notes, f"going on from {whole[-1]}"))
    init_from = None
    if config.init_from and not whole:
        init_from = _newest(Path(config.init_from))
        problems += model_problems(init_from, shapes)
        notes.append(f"weights from {init_from}")
    if problems:
        raise ConfigError("\n".join(problems))
    return StartPlan(None, init_from, TrainerState(data_fingerprint=fingerprint), tuple(notes))


def _shards_name(config: RunConfig) -> str:
    if not config.data.sources:
        return f"data.shards: {config.data.shards}"
    return f"data.sources: {', '.join(f'{source.weight:g} x {source.shards}' for source in config.data.sources)}"


def agree_on_start(plan: StartPlan) -> None:
    """See that all ranks found the same checkpoint; a file system may show the hosts different ones.

    Raises:
        ConfigError: they did not.
    """
    mine = (str(plan.resume_from), str(plan.init_from), plan.state.step)
    first = broadcast_from_first(mine)
    raise_together(
        None if mine == first else f"run_dir: checkpoint {mine[0]} on one host, {first} on rank 0's; start again"
    )


def space_problems(run_dir: Path, checkpoint_size: int, num_checkpoints: int) -> list[str]:
    """Whether the disk holds the checkpoints that are kept at once."""
    existing = run_dir.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    needed = checkpoint_size * max(num_checkpoints, 1)
    if free >= needed:
        return []
    return [
        f"run_dir: {run_dir} has {free / 1e9:.3f} GB of free space, checkpoints need {needed / 1e9:.3f} GB "
        f"({max(num_checkpoints, 1)} of {checkpoint_size / 1e9:.3f}); make room, choose another disk, or lower "
        "checkpoint.keep_last"
    ]


def open_run_directory(config: RunConfig, ranks: Ranks, hosts: list[str]) -> Path:
    """Make the folder, and see that all hosts see the same one.

    Raises:
        ConfigError: it cannot be written, or some host sees another folder.
    """
    run_dir = Path(str(config.run_dir))
    problem = None
    token = broadcast_from_first(secrets.token_hex(8))
    mark = run_dir / f".shared-{token}"
    if ranks.is_first:
        try:
            (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError as error:
            problem = f"run_dir: {run_dir} cannot be written ({error.strerror}); choose another folder"
    raise_together(problem)
    if not mark.exists():
        problem = (
            f"run_dir: {run_dir} on host {hosts[ranks.rank]} is not the folder that host {hosts[0]} sees; "
            "choose one on a file system that all hosts share"
        )
    try:
        raise_together(problem)
    finally:
        if ranks.is_first:
            mark.unlink()
    return run_dir


def record_start(run_dir: Path, config: RunConfig, ranks: Ranks, hosts: list[str]) -> None:
    """Write config.yaml and environment.json, once nothing can be refused any more; clear what an old start left."""
    if ranks.is_first:
        write_whole(run_dir / "config.yaml", config_to_yaml(config).encode())
        write_whole(run_dir / "environment.json", json.dumps(environment(ranks, hosts), indent=1).encode())
        (run_dir / "status.json").unlink(missing_ok=True)
        remove_unfinished(run_dir / "checkpoints")


def environment(ranks: Ranks, hosts: list[str]) -> dict[str, Any]:
    """Versions, devices and size of the world, for the record."""
    packages = ("torch", "triton", "deepspeed", "webdataset", "local-attention", "omegaconf", "numpy")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or [
        f"CPU {platform.machine()}, {os.cpu_count()} cores"
    ]
    return {
        "python": platform.python_version(),
        "packages": {"colt5dist": colt5dist.__version__, **{name: _version(name) for name in packages}},
        "commit": _commit(),
        "devices": devices,
        "world_size": ranks.world_size,
        "hosts": sorted(set(hosts)),
    }


def write_status(run_dir: Path, status: str, step: int, reason: str | None = None) -> None:
    """Say how the run ended: finished, stopped or failed."""
    content = {"status": status, "step": step, **({"reason": reason} if reason else {})}
    write_whole(run_dir / "status.json", json.dumps(content).encode())


def _newest(path: Path) -> Path:
    """The checkpoint that `init_from` names: a checkpoint folder, or the newest whole one of a run directory."""
    for root in (path / "checkpoints", path):
        whole, _ = find_checkpoints(root)
        if whole:
            return whole[-1]
    if (path / "COMPLETE").exists():
        return path
    raise ConfigError(f"init_from: no whole checkpoint in {path}; name a run directory or a checkpoint folder")


def _difference_problems(config: RunConfig, run_dir: Path) -> list[str]:
    """Settings that differ from those the run was started with and may not."""
    path = run_dir / "config.yaml"
    if not path.exists():
        return [f"{path}: missing beside checkpoints; put it back, or name another run_dir"]
    new = config_leaves(config)
    old = {**config_leaves(RunConfig()), **saved_leaves(path)}  # a key that is newer than the run has its default there
    allowed = (*MAY_CHANGE, *config.resume_allow)
    found = []
    for key in sorted(old.keys() | new.keys()):
        may = any(key == name or key.startswith(f"{name}.") for name in allowed)
        if old.get(key) != new.get(key) and not may:
            found.append(
                f"{key}: {new.get(key)} here, {old.get(key)} in the run that is resumed; set it back, name another "
                f"run_dir, or allow it with resume_allow=[{key}]"
            )
    return found


def _version(package: str) -> str | None:
    """Version of an installed package; None for one that is found on the path only."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the source tree, where it is one."""
    command = ["git", "-C", os.path.dirname(__file__), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
