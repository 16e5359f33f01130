"""The launcher's processes that started this one; if one of them has ended, the run must stop."""

import os
from functools import cache
from pathlib import Path

import psutil

PROGRAMS = {"deepspeed", "torchrun"}
MODULES = ("deepspeed.launcher", "torch.distributed")
ORPHAN_PARENTS = {"systemd", "init"}
"""Programs that become the parent of a process whose own parent has ended."""


@cache
def launcher_processes() -> tuple[psutil.Process, ...]:
    """Find the launcher's processes above this one. The first call decides, so call it early."""
    try:
        ancestors = psutil.Process().parents()[:2]
        return tuple(p for p in ancestors if _is_launcher(p.cmdline()))
    except psutil.Error:
        return ()


def launcher_is_gone() -> bool:
    """Whether one of the launcher's processes has ended, before the first call of `launcher_processes` or since."""
    return any(not _is_alive(process) for process in launcher_processes()) or _launcher_was_orphaned()


@cache
def _launcher_was_orphaned() -> bool:
    """Whether `deepspeed` ended before its child, which starts the ranks, had started this one.

    That child first imports for seconds. It never leads a process group, unless a supervisor started it directly.
    """
    try:
        for process in launcher_processes():
            if "deepspeed.launcher.launch" in process.cmdline() and not _leads_its_group(process):
                parent = process.parent()
                return parent is None or (
                    not _is_launcher(parent.cmdline()) and (parent.pid == 1 or parent.name() in ORPHAN_PARENTS)
                )
    except psutil.Error:
        return True
    return False


def _leads_its_group(process: psutil.Process) -> bool:
    try:
        return os.getpgid(process.pid) == process.pid
    except ProcessLookupError:
        return False


def _is_launcher(command: list[str]) -> bool:
    """Whether a command line is `deepspeed`, `torchrun`, or one of their modules run by Python."""
    programs = {Path(part).name for part in command[:3]}
    modules = {command[i + 1] for i, part in enumerate(command[:-1]) if part == "-m"}
    return bool(programs & PROGRAMS) or any(module.startswith(MODULES) for module in modules)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
