"""Decides from the content of the run directory whether a run starts anew, resumes, or is finished."""

import os
import shlex
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from colt5dist.errors import ConfigError
from colt5dist.marks import KEEPS_RESULT
from colt5dist.storage.checkpoints import CHECKPOINTS
from colt5dist.storage.exported import is_exported
from colt5dist.storage.stored_model import CONFIG, tokenizer_fingerprint_of
from colt5dist.train.checkpoint import (
    COMPLETE,
    Damage,
    TrainerState,
    checkpoint_bytes,
    checkpoint_folders,
    early_stop,
    find_checkpoints,
    find_damage,
    has_average,
    json_problem,
    model_problems,
    optimizer_problems,
    read_complete,
    read_state,
    rename_damaged,
    renamed_folders,
    size_problem,
    unfinished_folders,
)
from colt5dist.train.config.differences import settings_that_must_be_alike
from colt5dist.train.config.load import ALLOW_FROM_ZERO, config_leaves, saved_leaves
from colt5dist.train.config.schema import RunConfig
from colt5dist.train.ranks import Ranks, broadcast_from_first, errors_on_all_ranks, raise_together
from colt5dist.train.report.monitor import METRICS, TENSORBOARD, read_metrics
from colt5dist.train.run_directory import RUN_ID, read_run_id
from colt5dist.wording import looked_for


@dataclass(frozen=True)
class StartPlan:
    """How the run begins."""

    resume_from: Path | None
    """Checkpoint to resume from; None: start at step 0."""
    init_from: Path | None
    """Checkpoint of another run to take the weights from, if any."""
    state: TrainerState
    """State before the first step of this start."""
    notes: tuple[str, ...]
    """What the user is told about it."""

    def is_finished(self, config: RunConfig) -> bool:
        """Whether the last step is already done and evaluated, or an early stop has ended the run."""
        done = self.state.step >= config.train.steps and not self.state.evaluation_left_out
        return done or early_stop(self.state, config) is not None


def plan_start(
    config: RunConfig,
    fingerprint: str,
    tokenizer_fingerprint: str,
    shapes: dict[str, tuple[int, ...]],
    damaged: Mapping[Path, Damage] | None = None,
) -> StartPlan:
    """Decide from the run directory how to begin; changes nothing.

    Args:
        config: the run.
        fingerprint: fingerprint of the shards' manifest.
        tokenizer_fingerprint: fingerprint of the shards' tokenizer.
        shapes: name and shape of every parameter of the model.
        damaged: checkpoints that are known to be damaged although their sizes are right, and what is wrong with them.

    Returns:
        The plan.

    Raises:
        ConfigError: the folder holds another run, or none although there must be one, or too little space is left.
    """
    run_dir = Path(str(config.run_dir))
    root = run_dir / CHECKPOINTS
    run_id = read_run_id(run_dir)
    whole, passed_over = _sort_checkpoints(root, run_id, damaged or {})
    if not whole:
        passed_over.update(dict.fromkeys(renamed_folders(root), "was renamed earlier"))
    notes = [f"passed over {folder}: {problem}" for folder, problem in passed_over.items()]
    notes += [
        f"removed {folder}, left behind by an interrupted save or deletion" for folder in unfinished_folders(root)
    ]
    read_metrics(run_dir)  # a damaged line must be refused before anything is changed
    if os.path.isfile(run_dir / TENSORBOARD):
        raise ConfigError(f"run_dir: {run_dir / TENSORBOARD} is a file; move it away, or choose another folder")
    started = os.path.exists(run_dir / CONFIG) or os.path.exists(run_dir / METRICS)
    if config.resume == "never" and (started or whole or passed_over):
        raise ConfigError(f"run_dir: {run_dir} already holds a run; choose another folder, or set resume=auto")
    if config.resume == "must" and not whole:
        fix = "put one there, or choose another run_dir" if passed_over else "set resume=auto to start anew"
        raise ConfigError(f"resume: no whole checkpoint in {root}{_reasons(passed_over)}; {fix}")
    if passed_over and not whole and ALLOW_FROM_ZERO not in config.resume_allow:
        raise ConfigError(
            f"resume: no whole checkpoint in {root}{_reasons(passed_over)}; put a whole one there, choose another "
            f"run_dir, or start at step 0 beside them with {shlex.quote(f'resume_allow=[{ALLOW_FROM_ZERO}]')}"
        )
    needed = checkpoint_bytes(shapes, config)
    saves_often = config.checkpoint.every_steps or config.checkpoint.every_minutes
    most = (config.checkpoint.keep_last + 1 if saves_often else 1) + (config.checkpoint.keep_best is not None)
    problems = space_problems(run_dir, needed, most - len(whole))
    if whole:
        if run_id is None:
            problems.append(
                f"{run_dir / RUN_ID}: missing beside checkpoints; put it back, or write into it the run_id of "
                f"{whole[-1] / COMPLETE}: {read_complete(whole[-1]).run_id}"
            )
        of_states = optimizer_problems(whole[-1], config.optimizer)
        of_settings = _difference_problems(config, run_dir)
        if of_states:  # no resume_allow helps against these
            of_settings = [line for line in of_settings if not line.startswith("optimizer.name:")]
        problems += of_settings
        problems += model_problems(whole[-1], shapes) + of_states
        state = read_state(whole[-1])
        if state.data_fingerprint != fingerprint:
            problems.append(
                f"{_shards_name(config)} is not what this run was trained on; name the same shards, or another run_dir"
            )
        state.tokenizer_fingerprint = tokenizer_fingerprint  # older checkpoints do not name it
        if not problems:
            notes += [f"resuming from {whole[-1]}", *_notes_on_settings(config, run_dir, whole[-1])]
            return StartPlan(whole[-1], None, state, tuple(notes))
    init_from = None
    if config.init_from and not whole:
        try:
            init_from, others = _newest(Path(config.init_from))
        except OSError as error:
            raise ConfigError(f"init_from: {config.init_from} cannot be read ({error.strerror}); name a run") from None
        notes += [f"passed over {folder}: {size_problem(folder)}" for folder in others]
        problems += model_problems(init_from, shapes)
        exported = is_exported(init_from)
        trained_with = tokenizer_fingerprint_of(init_from) if exported else read_state(init_from).tokenizer_fingerprint
        if not trained_with:
            notes.append(f"init_from: {init_from} does not name its tokenizer; it must be that of the shards here")
        elif trained_with != tokenizer_fingerprint:
            problems.append(
                f"init_from: {init_from} was trained with another tokenizer than that of {_shards_name(config)}; its "
                "ids mean something else; prepare the shards with its tokenizer"
            )
        notes.append(f"weights from {init_from}")
    if problems:
        raise ConfigError("\n".join(problems))
    if started:
        notes.append(f"no {'whole ' if passed_over else ''}checkpoint in {root}: starting at step 0")
    return StartPlan(
        None,
        init_from,
        TrainerState(data_fingerprint=fingerprint, tokenizer_fingerprint=tokenizer_fingerprint),
        tuple(notes),
    )


def confirm_plan(
    config: RunConfig,
    fingerprint: str,
    tokenizer_fingerprint: str,
    shapes: dict[str, tuple[int, ...]],
    ranks: Ranks,
) -> StartPlan:
    """Make the plan again, now that no other run can change the folder, and check the checkpoint's hashes; collective.

    The run before this one may have written its last checkpoint after the first plan was made. The ranks share the
    reading: together they read the checkpoint once. A damaged one is renamed and passed over for the next older one.

    Args:
        config: the run.
        fingerprint: fingerprint of the shards' manifest.
        tokenizer_fingerprint: fingerprint of the shards' tokenizer.
        shapes: name and shape of every parameter of the model.
        ranks: place of this rank.

    Returns:
        The plan, with the newest checkpoint whose hashes are right.

    Raises:
        ConfigError: on all ranks, if no checkpoint is left, or a rank sees another one than rank 0.
    """
    with errors_on_all_ranks():
        plan = plan_start(config, fingerprint, tokenizer_fingerprint, shapes)
    agree_on_start(plan)
    damaged: dict[Path, Damage] = {}
    notes: list[str] = []
    while folder := plan.resume_from or plan.init_from:
        if is_exported(folder):  # it has no hashes
            break
        begin = time.perf_counter()
        damage = find_damage(folder, ranks)
        if damage is None:
            size, seconds = read_complete(folder).num_bytes / 1e9, time.perf_counter() - begin
            notes.append(f"compared the hashes of {folder}: {size:.2f} GB in {seconds:.1f} s")
            break
        with errors_on_all_ranks():
            if folder == plan.init_from:
                raise ConfigError(f"init_from: {folder} cannot be used: {damage}; name another checkpoint")
            damaged[folder] = damage
            plan = plan_start(config, fingerprint, tokenizer_fingerprint, shapes, damaged)
        agree_on_start(plan)
    if ranks.is_first:
        # or the next start would take them for whole
        notes += [rename_damaged(*found) for found in damaged.items()]
    return replace(plan, notes=(*plan.notes, *notes))


def _sort_checkpoints(
    root: Path, run_id: str | None, damaged: Mapping[Path, Damage]
) -> tuple[list[Path], dict[Path, str]]:
    """Return the whole checkpoints of the run, lowest step first, and the others with what is wrong with them.

    The JSON files of the newest are compared with their hashes, because the plan is made from them.
    """
    whole: list[Path] = []
    others: dict[Path, str] = {}
    for folder in reversed(checkpoint_folders(root)):
        damage = damaged.get(folder)
        problem = damage.description if damage else size_problem(folder, run_id)
        if problem is None and not whole:
            problem = json_problem(folder)
        if problem is None:
            whole.insert(0, folder)
        else:
            others[folder] = problem
    return whole, others


def _reasons(passed_over: Mapping[Path, str]) -> str:
    return (
        f" ({'; '.join(f'{folder.name}: {problem}' for folder, problem in passed_over.items())})" if passed_over else ""
    )


def _shards_name(config: RunConfig) -> str:
    if not config.data.sources:
        return f"data.shards: {config.data.shards}"
    return f"data.sources: {', '.join(f'{source.weight:g} x {source.shards}' for source in config.data.sources)}"


def agree_on_start(plan: StartPlan) -> None:
    """Check that all ranks found the same checkpoint; a file system may show different ones to the hosts; collective.

    Args:
        plan: the plan of this rank.

    Raises:
        ConfigError: on all ranks, if they did not.
    """
    mine = (str(plan.resume_from), str(plan.init_from), plan.state.step)
    first = broadcast_from_first(mine)
    raise_together(
        None if mine == first else f"run_dir: checkpoint {mine[0]} on one host, {first} on rank 0's; start again"
    )


def space_problems(run_dir: Path, checkpoint_size: int, num_checkpoints: int) -> list[str]:
    """Check that the disk has space for all checkpoints that exist at the same time.

    Args:
        run_dir: folder of the run; it need not exist.
        checkpoint_size: bytes of a checkpoint.
        num_checkpoints: how many more will exist; at least one is assumed.

    Returns:
        What is wrong, one line; nothing if there is enough space.
    """
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


def _newest(path: Path) -> tuple[Path, list[Path]]:
    """Find what `init_from` names: an exported folder, a checkpoint, or the newest whole one of a run directory.

    Returns:
        The checkpoint, or the exported folder; and the folders beside it that are not whole.
    """
    if is_exported(path):
        return path, []
    for root in (path / CHECKPOINTS, path):
        whole, others = find_checkpoints(root)
        if whole:
            return whole[-1], others
    if os.path.exists(path / COMPLETE):
        problem = size_problem(path)
        if problem is None:
            return path, []
        raise ConfigError(f"init_from: {path} is damaged: {problem}; name another checkpoint")
    raise ConfigError(
        f"init_from: no whole checkpoint in {path}; name a run directory, a checkpoint folder, or a folder that "
        f"launch/export.py wrote{looked_for(path)}"
    )


def _notes_on_settings(config: RunConfig, run_dir: Path, checkpoint: Path) -> list[str]:
    """What a resumed run says of settings that it may change, or does not read."""
    notes = []
    samples = saved_leaves(run_dir / CONFIG).get("train.eval_samples", config.train.eval_samples)
    if samples != config.train.eval_samples:
        notes.append(
            f"note: train.eval_samples: {config.train.eval_samples} here, {samples} before; earlier held-out losses "
            "are of other samples"
        )
    if (config.train.ema is not None) != has_average(checkpoint):
        notes.append(
            f"note: train.ema: {checkpoint} holds no average; it begins at the weights of this checkpoint"
            if config.train.ema is not None
            else f"note: train.ema: null here; the average that {checkpoint} holds does not go on"
        )
    if config.init_from:
        notes.append(f"note: init_from: {config.init_from} has no effect; the run continues from its own checkpoint")
    return notes


def _difference_problems(config: RunConfig, run_dir: Path) -> list[str]:
    """Settings that differ from those the run was started with, although its result depends on them."""
    path = run_dir / CONFIG
    if not path.exists():
        return [f"{path}: missing beside checkpoints; put it back, or choose another run_dir"]
    # the run may lack newer keys: it used their defaults
    settings = (config_leaves(config), {**config_leaves(RunConfig()), **saved_leaves(path)})
    new, old = (settings_that_must_be_alike(leaves, KEEPS_RESULT) for leaves in settings)
    found = []
    for key in sorted(old.keys() | new.keys()):
        allowed = any(key == name or key.startswith(f"{name}.") for name in config.resume_allow)
        if old.get(key) != new.get(key) and not allowed:
            found.append(
                f"{key}: {new.get(key)} here, {old.get(key)} in the run that is resumed; set it back, choose another "
                f"run_dir, or allow it with {shlex.quote(f'resume_allow=[{key}]')}"
            )
    return found
