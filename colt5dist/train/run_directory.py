"""The run directory: what a run writes there besides metrics and checkpoints.

It holds `run_id`, `config.yaml` (resolved), `environment.json`, `tokenizer/`, `metrics.jsonl`, `tensorboard/`,
`checkpoints/`, `status.json`, `failures/`; and `.lock`, which rank 0 holds as long as it is alive.
"""

import json
import os
import platform
import secrets
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import colt5dist
from colt5dist.data import TOKENIZER_FOLDER, ModelTokenizer, model_tokenizer
from colt5dist.data.tokenizer import Tokenizer
from colt5dist.errors import ConfigError
from colt5dist.files import is_locked_for_life, lock_for_life, write_whole
from colt5dist.storage.checkpoints import CHECKPOINTS
from colt5dist.storage.stored_model import CONFIG
from colt5dist.train.checkpoint import unfinished_folders
from colt5dist.train.config.load import config_to_yaml
from colt5dist.train.config.schema import RunConfig
from colt5dist.train.ranks import Ranks, broadcast_from_first, raise_together

RUN_ID = "run_id"
"""File with a random id of the run, drawn at its first start."""
LOCK = ".lock"
"""File that rank 0 locks as long as it is alive."""
STATUS = "status.json"
FAILURES = "failures"


def open_run_directory(config: RunConfig, ranks: Ranks, hosts: list[str]) -> Path:
    """Make the folder, lock it against other runs until rank 0 ends, and check that all hosts see the same one.

    Args:
        config: the run.
        ranks: place of this rank.
        hosts: host name of every rank.

    Returns:
        The folder.

    Raises:
        ConfigError: on all ranks, if it cannot be written, another run uses it, or a host sees another folder.
    """
    run_dir = Path(str(config.run_dir))
    problem = None
    token = broadcast_from_first(secrets.token_hex(8))
    mark = run_dir / f".shared-{token}"
    if ranks.is_first:
        try:
            (run_dir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            mark.touch()
            if not lock_for_life(run_dir / LOCK):
                print(f"note: run_dir: {run_dir} has no file locks; make sure that no other run uses it", flush=True)
        except BlockingIOError:
            problem = _is_used(run_dir)
        except OSError as error:
            problem = f"run_dir: {run_dir} cannot be written ({error.strerror}); choose another folder"
    try:
        raise_together(problem)
    except ConfigError:
        if ranks.is_first:
            _remove(mark)
        raise
    if not mark.exists():
        problem = (
            f"run_dir: {run_dir} on host {hosts[ranks.rank]} is not the folder that host {hosts[0]} sees; "
            "choose a folder on a file system that all hosts share"
        )
    try:
        raise_together(problem)
    finally:
        if ranks.is_first:
            _remove(mark)
    return run_dir


def run_directory_problems(run_dir: Path) -> list[str]:
    """Return what `open_run_directory` would find wrong with a folder on this host; changes nothing.

    Args:
        run_dir: folder of the run; it need not exist.
    """
    if is_locked_for_life(run_dir / LOCK):
        return [_is_used(run_dir)]
    wanted = (run_dir / CHECKPOINTS).absolute()
    existing = next(folder for folder in (wanted, *wanted.parents) if folder.exists())
    if not existing.is_dir():
        return [f"run_dir: {existing} is a file; choose another folder"]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [f"run_dir: {existing} cannot be written; choose another folder"]
    return []


def _is_used(run_dir: Path) -> str:
    return f"run_dir: another process trains in {run_dir}; wait until it ends, or choose another folder"


def record_start(run_dir: Path, config: RunConfig, ranks: Ranks, hosts: list[str], tokenizer: Tokenizer) -> str:
    """Write config.yaml, environment.json and the tokenizer once all checks have passed; remove what an earlier start
    left behind.

    Args:
        run_dir: folder of the run.
        config: the run.
        ranks: place of this rank.
        hosts: host name of every rank.
        tokenizer: the tokenizer of the shards; a copy makes the run folder all that is needed to use the model.

    Returns:
        The id of the run, drawn here at its first start.

    Raises:
        ConfigError: on all ranks, if the files cannot be written.
    """
    problem = None
    if ranks.is_first:
        try:
            if read_run_id(run_dir) is None:
                write_whole(run_dir / RUN_ID, f"{secrets.token_hex(8)}\n".encode())
            write_whole(run_dir / CONFIG, config_to_yaml(config).encode())
            write_whole(run_dir / "environment.json", json.dumps(environment(ranks, hosts), indent=1).encode())
            tokenizer_of_run(run_dir, config, tokenizer).save(run_dir / TOKENIZER_FOLDER)
            (run_dir / STATUS).unlink(missing_ok=True)
        except OSError as error:
            problem = f"run_dir: {error.filename or run_dir} cannot be written ({error.strerror})"
    raise_together(problem)
    if ranks.is_first:
        for folder in unfinished_folders(run_dir / CHECKPOINTS):
            shutil.rmtree(folder, ignore_errors=True)  # a file that cannot be removed is no reason not to train
    return str(broadcast_from_first(read_run_id(run_dir)))


def keep_tokenizer(run_dir: Path, tokenizer: Tokenizer, config: RunConfig) -> None:
    """Copy the tokenizer into a run folder that lacks it, as those of earlier versions do; a full disk is no error.

    Args:
        run_dir: folder of the run.
        tokenizer: the tokenizer of the shards.
        config: the run.
    """
    with suppress(OSError):
        if not (run_dir / TOKENIZER_FOLDER).exists():
            tokenizer_of_run(run_dir, config, tokenizer).save(run_dir / TOKENIZER_FOLDER)


def tokenizer_of_run(run_dir: Path, config: RunConfig, tokenizer: Tokenizer) -> ModelTokenizer:
    """The tokenizer of the run's model; a run on pairs keeps that of the model it starts from, also when resumed.

    Args:
        run_dir: folder of the run.
        config: the run.
        tokenizer: the tokenizer of the shards.
    """
    places = [run_dir]
    if config.init_from:
        start = Path(config.init_from).absolute()
        places += [start, start.parent, start.parent.parent]  # a run folder, its checkpoints, or one of them
    folders = [place / TOKENIZER_FOLDER for place in places if (place / TOKENIZER_FOLDER).exists()]
    return model_tokenizer(
        tokenizer, config.data, vocab_size=config.model.vocab_size, starts_from=folders[0] if folders else None
    )


def read_run_id(run_dir: Path) -> str | None:
    """Read the id that the run's checkpoints carry, which distinguishes them from those of another run.

    Returns:
        The id; None before the first start.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return (run_dir / RUN_ID).read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"run_dir: {run_dir / RUN_ID} cannot be read ({what}); choose another folder") from None


def environment(ranks: Ranks, hosts: list[str]) -> dict[str, Any]:
    """Content of environment.json: versions, devices, number of processes, hosts."""
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


def write_status(
    run_dir: Path,
    status: str,
    step: int,
    reason: str | None = None,
    *,
    writer: str = "",
    keep_existing: bool = False,
) -> None:
    """Write status.json.

    Args:
        run_dir: folder of the run.
        status: "finished", "stopped" or "failed".
        step: last step that was done.
        reason: why the run stopped or failed.
        writer: name of this process, if several may write at the same time.
        keep_existing: what another process has written stays.
    """
    content = {"status": status, "step": step, **({"reason": reason} if reason else {})}
    text = f"{json.dumps(content)}\n".encode()
    write_whole(run_dir / STATUS, text, writer=writer, keep_existing=keep_existing)


def record_end(run_dir: Path, step: int, stopped: str | None, finished_early: str | None = None) -> None:
    """Write status.json for a run that ended without an error; print a warning if it cannot be written.

    Args:
        run_dir: folder of the run.
        step: last step that was done.
        stopped: why the run stopped before its last step; None: it is finished.
        finished_early: why it is finished before its last step, if it is.
    """
    try:
        write_status(run_dir, "stopped" if stopped else "finished", step, stopped or finished_early)
    except OSError as error:
        whole = f"; the checkpoint of step {step} is whole" if step else ""
        what = f"{run_dir / STATUS} cannot be written ({error.strerror}){whole}"
        print(f"warning: {what}", file=sys.stderr, flush=True)


def write_status_if_free(run_dir: Path, status: str, step: int, reason: str | None = None) -> None:
    """Write status.json unless another process uses the folder or it cannot be written.

    Args:
        run_dir: folder of the run.
        status: "finished", "stopped" or "failed".
        step: last step that was done.
        reason: why, where that needs to be said.
    """
    with suppress(OSError):  # BlockingIOError: another run uses it; others: an archive may be read-only
        if lock_for_life(run_dir / LOCK):
            write_status(run_dir, status, step, reason)


def _remove(path: Path) -> None:
    with suppress(OSError):  # the disk may have become read-only
        path.unlink()


def _version(package: str) -> str | None:
    """Version of an installed package; None for one that is only found on the path."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the source tree; None where it is not in git, also if it is installed inside another repository."""
    folder, file = os.path.split(__file__)
    git = ["git", "-C", folder]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", file], capture_output=True, check=True)
        return subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
