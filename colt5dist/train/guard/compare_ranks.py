"""Before the first step the ranks compare all that decides a step: settings, text, versions and code.

Each host may have been started by its own command, in its own environment. What differs would be trained together
without an error, and would be neither run.
"""

import hashlib
import json
import os
import platform
import re
import socket
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch

import colt5dist
from colt5dist.data import Sources
from colt5dist.data.standard_library import STANDARD_LIBRARIES
from colt5dist.errors import ConfigError
from colt5dist.marks import OF_A_HOST
from colt5dist.train.config.differences import settings_that_must_be_alike
from colt5dist.train.config.load import config_leaves
from colt5dist.train.config.schema import RunConfig
from colt5dist.train.ranks import Meeting, Ranks, describe_ranks

VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "DS_ACCELERATOR",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TRITON_INTERPRET",
    "TRITON_F32_DEFAULT",
)
"""Environment variables that change what is computed."""
CODE = "code of colt5dist: "
MOST_HOSTS = 4
"""Hosts that a message names for one value."""

FIXES = {
    "data": "give all hosts the same shards",
    "version": "install the same version on all hosts",
    "variable": "set it alike on all hosts",
    "device": "use the same kind of device on all hosts",
    "launcher": "start all hosts for the same number of processes",
    "setting": "start all hosts with the same settings",
}
"""What to do, by the kind of what differs."""


def check_ranks_alike(
    config: RunConfig,
    shards: Sources,
    ranks: Ranks,
    meeting: Meeting,
    validation: Mapping[str, Sources] | None = None,
) -> None:
    """Compare what decides a step on all ranks; every rank calls this.

    Args:
        config: the run, as this rank has read it.
        shards: the shard sets that this rank has opened.
        ranks: place of this rank.
        meeting: exchanges the texts.
        validation: the validation sets that it has opened, by name.

    Raises:
        ConfigError: on all ranks, if anything differs; one line each: what, its values, and their ranks and hosts.
    """
    mine = what_decides_a_step(config, shards, ranks.world_size, validation)
    text = json.dumps(mine, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()
    first_digest = meeting.tell("digest of rank 0", digest)
    digests = meeting.gather("digest", digest)  # the whole texts are sent only where they differ
    if meeting.tell("alike", "no" if len(set(digests)) > 1 else "yes") == "yes":
        return
    gathered = meeting.gather("all", json.dumps([socket.gethostname(), mine], default=str))
    lines = ""
    if gathered:
        hosts, contents = zip(*map(json.loads, gathered), strict=True)
        lines = "\n".join(differences(list(contents), list(hosts)))
    error = ConfigError(meeting.tell("differences", lines))
    error.known_to_all = digest == first_digest  # a host that differs from rank 0's prints the lines, too
    raise error


def what_decides_a_step(
    config: RunConfig, shards: Sources, world_size: int, validation: Mapping[str, Sources] | None = None
) -> dict[str, list[Any]]:
    """Return by name the kind (a key of FIXES) and the value of everything that decides a step of this rank.

    Args:
        config: the run.
        shards: its shard sets.
        world_size: number of processes.
        validation: its validation sets by name.
    """
    settings = settings_that_must_be_alike(config_leaves(config), OF_A_HOST)
    found = {key: ["setting", value] for key, value in settings.items()}
    for number, part in enumerate(shards.parts):
        name = f"data.sources[{number}].shards" if config.data.sources else "data.shards"
        found[name] = ["data", f"text {part.fingerprint[:16]}"]
    for name, sources in (validation or {}).items():
        found[f"shards of the validation set {name}"] = ["data", f"text {sources.fingerprint[:16]}"]
    found["tokenizer of the shards"] = ["data", shards.tokenizer.fingerprint[:16]]
    named = [source.shards for source in config.data.sources] or [config.data.shards]
    if any(name in STANDARD_LIBRARIES for name in named):
        found["Python"] = ["version", platform.python_version()]
    found |= {f"package {name}": ["version", number] for name, number in package_versions().items()}
    found |= {f"library {name}": ["version", number] for name, number in library_versions().items()}
    found |= {name: ["variable", os.environ.get(name)] for name in VARIABLES}
    found["device"] = ["device", "GPU" if torch.cuda.is_available() else "CPU"]
    found["WORLD_SIZE"] = ["launcher", world_size]
    found |= {f"{CODE}{name}": ["version", digest] for name, digest in code_digests().items()}
    return found


def package_versions() -> dict[str, str | None]:
    """Version of each package that colt5dist needs; None for one that is only found on the path."""
    try:
        needed = [line for line in requires("colt5dist") or [] if "extra ==" not in line]
    except PackageNotFoundError:  # a checkout that is not installed
        needed = ["deepspeed", "numpy", "torch", "triton", "webdataset"]
    found: dict[str, str | None] = {}
    for name in sorted(re.match(r"[\w.-]+", line)[0] for line in needed):  # type: ignore[index]
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["torch"] = f"{torch.__version__} ({str(torch.version.git_version)[:8]})"
    return found


def library_versions() -> dict[str, str | None]:
    """Versions of the libraries that PyTorch computes and communicates with on GPUs."""
    if not torch.cuda.is_available():
        return {}
    return {
        "CUDA": torch.version.cuda,
        "cuDNN": str(torch.backends.cudnn.version()),
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
    }


def code_digests() -> dict[str, str]:
    """Hash of every Python file of the package, by its path in the package."""
    root = Path(colt5dist.__file__).parent
    files = sorted(path for path in root.rglob("*.py"))
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files}


def differences(contents: list[dict[str, list[Any]]], hosts: list[str]) -> list[str]:
    """Describe what is not the same on all ranks.

    Args:
        contents: `what_decides_a_step` of every rank.
        hosts: host name of every rank.

    Returns:
        One line for each difference; the files of the package share one.
    """
    lines, files = [], []
    for name in dict.fromkeys(name for content in contents for name in content):
        entries = [content.get(name) for content in contents]
        values: dict[str, list[int]] = {}
        for rank, entry in enumerate(entries):
            values.setdefault(_value_text(entry), []).append(rank)
        if len(values) == 1:
            continue
        if name.startswith(CODE):
            files.append((name.removeprefix(CODE), values))
            continue
        kind = next(entry[0] for entry in entries if entry is not None)
        places = ", ".join(f"{value} on {_places(numbers, hosts)}" for value, numbers in values.items())
        lines.append(f"{name}: {places}; {FIXES[kind]}")
    if files:
        name, values = files[0]
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        places = " than on ".join(_places(numbers, hosts) for numbers in values.values())
        lines.append(f"{CODE}{name}{more} not the same on {places}; install the same code on all hosts")
    return lines


def _value_text(entry: list[Any] | None) -> str:
    return "not set" if entry is None or entry[1] is None else str(entry[1])


def _places(numbers: list[int], hosts: list[str]) -> str:
    """Ranks and their hosts: `ranks 8-15 (host b)`."""
    names = list(dict.fromkeys(hosts[rank] for rank in numbers))
    more = f" and {len(names) - MOST_HOSTS} more" if len(names) > MOST_HOSTS else ""
    title = "host" if len(names) == 1 else "hosts"
    return f"{describe_ranks(numbers)} ({title} {', '.join(names[:MOST_HOSTS])}{more})"
