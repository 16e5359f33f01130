"""A pretraining run from its configuration to its exit status: the start-up, as a recipe."""

import os
from contextlib import suppress
from pathlib import Path

import torch

from colt5dist.data import (
    Sources,
    data_problems,
    length_notes,
    open_sources,
    open_validation_sets,
    pair_notes,
    text_tokens_of_sample,
    unigram_entropy,
    validation_problems,
)
from colt5dist.data.open_shard_sets import absent_sources
from colt5dist.data.read.loader import start_readers
from colt5dist.data.standard_library import STANDARD_LIBRARIES
from colt5dist.errors import ConfigError, SaveError
from colt5dist.train import resume, run_directory
from colt5dist.train.checkpoint import (
    Saver,
    TrainerState,
    early_stop,
    load_checkpoint,
    load_weights,
    name_best,
)
from colt5dist.train.config.load import config_leaves, config_to_yaml
from colt5dist.train.config.schema import RunConfig
from colt5dist.train.engine.engine import Engine, device_problems, num_elements, parameter_shapes
from colt5dist.train.engine.fragments import refresh_parameters
from colt5dist.train.garbage import collected_by_step
from colt5dist.train.guard.compare_ranks import check_ranks_alike
from colt5dist.train.guard.failures import record_failures
from colt5dist.train.guard.heartbeat import Heartbeat
from colt5dist.train.guard.preflight import preflight
from colt5dist.train.guard.stop import StopReason, StopRequests
from colt5dist.train.loop import train
from colt5dist.train.ranks import (
    EXIT_STOPPED,
    Meeting,
    Ranks,
    barrier,
    errors_on_all_ranks,
    finish_process_group,
    gather_host_names,
    initialise_process_group,
)
from colt5dist.train.report.accounting import describe_batch, step_flops, tokens_of_run
from colt5dist.train.report.meter import Meter
from colt5dist.train.report.monitor import Monitor
from colt5dist.train.report.summary import summary, tensorboard_command
from colt5dist.train.report.weights_and_biases import WeightsAndBiases, check_wandb
from colt5dist.train.report.without_effect import settings_without_effect
from colt5dist.train.run import Run
from colt5dist.wording import count

MANY_PASSES = 4
"""Passes over the same text up to which it is about as good as new text (Muennighoff et al., arXiv 2305.16264)."""


def pretrain(config: RunConfig, ranks: Ranks) -> int:
    """Start or resume a pretraining run, and train to its end.

    Args:
        config: the run.
        ranks: place of this rank.

    Returns:
        The exit status: 0 if finished or stopped by the file STOP, 75 if stopped and to be started again.

    Raises:
        ConfigError: wrong input; found before a device is touched, unless only a checkpoint's files show it.
        SaveError: a checkpoint could not be written, and the run must not continue without it.
    """
    check_devices(config, ranks)
    shards = open_run_shards(config)
    validation = open_run_validation(config, shards)
    if ranks.world_size > 1:
        meeting = Meeting(ranks, config.train.timeout_minutes)  # lives until the process group has taken it over
        check_ranks_alike(config, shards, ranks, meeting, validation)
    shapes = parameter_shapes(config)
    plan = resume.plan_start(config, shards.fingerprint, shards.tokenizer.fingerprint, shapes)
    run_dir = Path(str(config.run_dir))
    last_stage = config.stage_at(config.train.steps)
    entropy = unigram_entropy(shards, last_stage.data, num_samples=config.train.eval_samples)
    if plan.is_finished(config):
        if ranks.is_first:
            run_directory.keep_tokenizer(run_dir, shards.tokenizer, config)
        return report_finished(config, ranks, plan.state, entropy)

    readers = start_readers(shards, config.data)  # forked before there are CUDA, NCCL and threads
    make_deterministic(config)
    device = initialise_process_group(ranks, config.train.timeout_minutes)
    hosts = gather_host_names()
    run_directory.open_run_directory(config, ranks, hosts)
    heartbeat = Heartbeat(
        ranks,
        hosts,
        run_dir,
        start_seconds=60 * config.train.timeout_minutes,
        timeout_seconds=config.train.timeout_seconds,
        port=config.train.heartbeat_port,
    )
    with heartbeat, record_failures(config, ranks, hosts, heartbeat.explain):
        heartbeat.at("comparing hashes", plan.state.step)
        plan = resume.confirm_plan(config, shards.fingerprint, shards.tokenizer.fingerprint, shapes, ranks)
        if plan.is_finished(config):  # the run before this one finished meanwhile
            finish_process_group()
            return report_finished(config, ranks, plan.state, entropy)
        if config.train.preflight:
            heartbeat.at("preflight", plan.state.step)
            preflight(ranks, hosts, device)
        heartbeat.at("building and loading", plan.state.step)
        stop = StopRequests(run_dir, watch_files=ranks.is_first, max_minutes=config.train.max_minutes)
        engine = Engine(config, ranks.world_size, device)
        load_start(plan, engine)
        run_id = run_directory.record_start(run_dir, config, ranks, hosts, shards.tokenizer)
        if ranks.is_first:
            name_best_at_start(run_dir, plan.state, config)
        meter = Meter(device, hosts, step_flops(config))
        wandb = open_wandb(config, ranks, run_dir, run_id)
        monitor = Monitor(
            run_dir,
            is_first=ranks.is_first,
            first_step=plan.state.step,
            num_steps=config.train.steps,
            wandb=wandb,
        )
        checkpoints = run_dir / run_directory.CHECKPOINTS
        with monitor:
            notes = [f"note: {note}" for stage in config.stages for note in length_notes(stage.data)]
            notes += [f"note: {line}" for line in settings_without_effect(config, on_gpu=device.type == "cuda")]
            description = (*describe(config, ranks, engine, shapes), *describe_data(config, shards))
            look = f"look at it: {tensorboard_command(run_dir)}"
            lines = (*plan.notes, *dict.fromkeys(notes), *description, look)
            for line in lines:
                monitor.say(line)
            settings = config_leaves(config) | {"parameters": num_parameters(shapes), "processes": ranks.world_size}
            monitor.begin(settings, config_to_yaml(config), lines, run_id)
            run = Run(
                config=config,
                run_dir=run_dir,
                ranks=ranks,
                shards=shards,
                validation=validation,
                readers=readers,
                engine=engine,
                state=plan.state,
                monitor=monitor,
                meter=meter,
                stop=stop,
                saver=Saver(checkpoints, engine, config.checkpoint, run_id=run_id, say=monitor.say),
                heartbeat=heartbeat,
            )
            try:
                with collected_by_step():
                    reason = train(run)
                with heartbeat.patient("ending", plan.state.step):
                    monitor.finish()
            except SaveError:
                stop.obeyed("STOP")
                raise
        early = early_stop(plan.state, config) if plan.state.step < config.train.steps else None
        if plan.is_finished(config):
            reason = None  # the request came at the last step
        if reason in (None, StopReason.FILE):
            stop.obeyed("STOP")
        with heartbeat.patient("ending", plan.state.step):
            if ranks.is_first:
                stopped = reason.value if reason else None
                run_directory.record_end(run_dir, plan.state.step, stopped, early)
                rate = meter.mean_rate
                ending = summary(
                    run_dir, plan.state, stopped, finished_early=early, unigram_entropy=entropy, tokens_per_second=rate
                )
                print(ending, flush=True)
            barrier()  # otherwise rank 0 could count a rank that exits first as lost
        engine.close()
        finish_process_group()
    return 0 if reason in (None, StopReason.FILE) else EXIT_STOPPED


def check_start(config: RunConfig, ranks: Ranks) -> list[str]:
    """Check what a start checks, as far as the shards are there; nothing is changed.

    Args:
        config: the run.
        ranks: place of this rank.

    Returns:
        Lines on what a start would do.

    Raises:
        ConfigError: a start would refuse the configuration, the shards or the run's folder.
    """
    check_devices(config, ranks)
    run_dir = Path(str(config.run_dir))
    if problems := run_directory.run_directory_problems(run_dir):
        raise ConfigError("\n".join(problems))
    if absent := absent_sources(config.data):
        made = "a start makes them first" if set(absent) <= set(STANDARD_LIBRARIES) else "a start would refuse that"
        return [
            f"note: data.shards: {', '.join(absent)} not there ({made}); neither the text nor what {run_dir} holds is "
            "checked"
        ]
    shards = open_run_shards(config)
    open_run_validation(config, shards)
    shapes = parameter_shapes(config)
    plan = resume.plan_start(config, shards.fingerprint, shards.tokenizer.fingerprint, shapes)
    if not any(part.remote for part in shards.parts):  # it would be downloaded
        unigram_entropy(shards, config.stage_at(config.train.steps).data, num_samples=config.train.eval_samples)
    if plan.is_finished(config):
        next_step = "the run is finished: a start would do nothing"
    else:
        next_step = f"a start would train from step {plan.state.step + 1} on, in {run_dir}"
    return [*plan.notes, *describe_data(config, shards), next_step]


def report_finished(config: RunConfig, ranks: Ranks, state: TrainerState, entropy: float) -> int:
    """Print that there is nothing to do, and the summary of the finished run.

    Args:
        config: the run.
        ranks: place of this rank.
        state: the trainer's state at the end.
        entropy: unigram entropy of the held-out tokens, in nats.

    Returns:
        The exit status, 0.
    """
    if ranks.is_first:
        run_dir = Path(str(config.run_dir))
        early = early_stop(state, config) if state.step < config.train.steps else None
        fix = "a larger train.early_stopping_patience, or null" if early else f"a train.steps above {state.step}"
        print(f"nothing to do: the run is finished; {fix} would continue it")
        run_directory.write_status_if_free(run_dir, "finished", state.step, early)
        name_best_at_start(run_dir, state, config)
        lines = summary(run_dir, state, None, finished_early=early, unigram_entropy=entropy, tokens_per_second=None)
        print(lines, flush=True)
    return 0


def name_best_at_start(run_dir: Path, state: TrainerState, config: RunConfig) -> None:
    """Name the best checkpoint, if a kill has left its name at the one before; a folder may be read-only."""
    run_id = run_directory.read_run_id(run_dir)
    if run_id and state.step:
        with suppress(OSError):
            name_best(run_dir / run_directory.CHECKPOINTS, run_id, state, config.checkpoint.keep_best)


def open_wandb(config: RunConfig, ranks: Ranks, run_dir: Path, run_id: str) -> WeightsAndBiases | None:
    """Open the run in Weights & Biases on rank 0, if the configuration asks for it; collective.

    Raises:
        ConfigError: on all ranks, if it cannot be opened.
    """
    if not config.monitor.wandb:
        return None
    with errors_on_all_ranks():
        return WeightsAndBiases(run_dir, run_id, config_leaves(config)) if ranks.is_first else None


def load_start(plan: resume.StartPlan, engine: Engine) -> None:
    """Load the checkpoint that the plan names into the engine, if there is one; collective.

    Args:
        plan: how the run begins.
        engine: the new engine.

    Raises:
        ConfigError: on all ranks, if any rank could not read its part.
    """
    checkpoint = plan.resume_from or plan.init_from
    if checkpoint is None:
        return
    with errors_on_all_ranks():
        if plan.resume_from is None:
            load_weights(checkpoint, engine)
        else:
            load_checkpoint(checkpoint, engine)
    refresh_parameters(engine)


def check_devices(config: RunConfig, ranks: Ranks) -> None:
    """Check what depends on the number of processes and devices; touches no device.

    Raises:
        ConfigError: the batch sizes do not divide, or there are more processes than GPUs.
    """
    problems = device_problems(config, ranks.world_size, torch.cuda.device_count(), ranks.local_world_size)
    if problems:
        raise ConfigError("\n".join(problems))
    if config.monitor.wandb:
        check_wandb()


def open_run_shards(config: RunConfig) -> Sources:
    """Open the shards; those of the standard library are built first if necessary.

    Args:
        config: the run.

    Returns:
        The shard sets.

    Raises:
        ConfigError: they are missing or damaged, or do not fit the model.
    """
    shards = open_sources(config.data)
    problems = data_problems(config.data, shards, config.model.vocab_size)
    if problems:
        raise ConfigError("\n".join(problems))
    return shards


def open_run_validation(config: RunConfig, shards: Sources) -> dict[str, Sources]:
    """Open the validation sets that have a name.

    Args:
        config: the run.
        shards: its opened shard sets.

    Returns:
        The sets by name.

    Raises:
        ConfigError: one is missing or damaged, has another tokenizer, or no document.
    """
    sets = open_validation_sets(config.data, shards)
    problems = validation_problems(config.data, sets)
    if problems:
        raise ConfigError("\n".join(problems))
    return sets


def make_deterministic(config: RunConfig) -> None:
    """Select deterministic algorithms if the configuration asks for them."""
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # nothing reads unwritten memory; filling DeepSpeed's buckets would take ten times as long as a small step
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def describe(config: RunConfig, ranks: Ranks, engine: Engine, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """The first lines of the log: model, devices, ZeRO stage and batch.

    Args:
        config: the run.
        ranks: place of this rank.
        engine: the engine of the run.
        shapes: name and shape of every parameter.
    """
    number = num_parameters(shapes)
    stage = f"ZeRO stage {engine.stage}"
    if engine.stage != config.zero.stage:
        stage += (
            f" (for zero.stage={config.zero.stage}: DeepSpeed's stage {config.zero.stage} in bf16 trains differently)"
        )
    batch = f"{count(config.train.global_batch_size, 'sample')} per step: {describe_batch(config, ranks.world_size)}"
    lengths = f"{config.data.target_length} target tokens each"
    if config.data.input_length:
        lengths = f"{config.data.input_length} input and {lengths}"
    return [
        f"{number:,} parameters, {engine.dtype} on {ranks.world_size} x {engine.device.type}, {stage}",
        f"{batch}, {lengths}",
    ]


def num_parameters(shapes: dict[str, tuple[int, ...]]) -> int:
    """Number of parameters, by the shape of each."""
    return sum(num_elements(shape) for shape in shapes.values())


def describe_data(config: RunConfig, shards: Sources) -> list[str]:
    """Lines on how often the run reads its text, with a note if that is often."""
    if config.data.is_pairs:
        amount, unit = config.train.steps * config.train.global_batch_size, "pairs"
        there, passes = sum(part.num_documents for part in shards.parts), shards.passes_of_pairs(amount)
    else:
        amount, unit = tokens_of_run(config, text_tokens_of_sample), "tokens of training text"
        there, passes = sum(part.num_tokens for part in shards.parts), shards.passes(amount)
    lines = [
        f"data: {there:,} {unit}; {count(config.train.steps, 'step')} read {amount:,}: "
        f"{', '.join(f'{number:,.2f}' for number in passes)} passes"
    ]
    if config.data.is_pairs:
        lines += dict.fromkeys(f"note: {note}" for stage in config.stages for note in pair_notes(stage.data, shards))
    if max(passes) > MANY_PASSES:
        lines.append(
            f"note: train.steps: some text is read {max(passes):,.0f} times; watch the held-out loss, which rises "
            "when the model memorises its text; prepare more text, or train fewer steps"
        )
    return lines
