"""The training loop, in one order: read, forward and backward, agree, step, account, evaluate, save, stop."""

from dataclasses import dataclass
from pathlib import Path

from torch.profiler import record_function

from colt5dist.data import Batch, SkipList, Sources, held_out_batches, parse_mixture, training_batches
from colt5dist.data.loader import TrainingBatches
from colt5dist.errors import ConfigError
from colt5dist.train.accounting import step_flops
from colt5dist.train.checkpoint import TrainerState, save_checkpoint
from colt5dist.train.config import RunConfig
from colt5dist.train.engine import Engine, to_device
from colt5dist.train.evaluation import CutShortError, evaluate
from colt5dist.train.heartbeat import Heartbeat
from colt5dist.train.losses import LossMeans, LossSums, count_target_tokens
from colt5dist.train.meter import Meter
from colt5dist.train.monitor import Monitor, Record
from colt5dist.train.profile import Profile
from colt5dist.train.read_ahead import ReadAhead
from colt5dist.train.routing import record_routing
from colt5dist.train.runtime import Ranks, raise_together, set_collective_timeout
from colt5dist.train.schedule import learning_rate
from colt5dist.train.stop import StopReason, StopRequests

HEARTBEAT_FIRST_SECONDS = 60.0
"""How much later than the heartbeat, which can name a rank, a collective operation gives up by itself."""


@dataclass(kw_only=True)
class Run:
    """All that a run works with."""

    config: RunConfig
    run_dir: Path
    ranks: Ranks
    shards: Sources
    engine: Engine
    state: TrainerState
    monitor: Monitor
    meter: Meter
    stop: StopRequests
    heartbeat: Heartbeat

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the denoising objectives."""
        return parse_mixture(self.config.data.mixture).names


def train(run: Run) -> StopReason | None:
    """Train from the state's step to the last one.

    Returns:
        Why the run stopped before the last step; None when it is finished.
    """
    config, state, meter = run.config, run.state, run.meter
    stage = config.stage_at(state.step + 1)
    held_out = begin_stage(run, stage)
    if state.first_held_out_loss is None:
        state.first_held_out_loss = run_evaluation(run, held_out).get("eval/loss")
    stream = ReadAhead(read_training(run), run.ranks, lambda: run.stop.reason() is not None)
    stream.stop_together()
    profile = Profile(config.profile, run.run_dir, run.ranks)
    reason = run.stop.agree(run.engine.device)
    first_step = state.step + 1
    while state.step < config.train.steps and reason is None:
        step = state.step + 1
        if config.stage_at(step) is not stage:
            stage = config.stage_at(step)
            held_out = begin_stage(run, stage)
        run.heartbeat.at("training", step)
        with meter.step(), profile.step(step):
            outcome = run_micro_batches(run, step, stream)
            with record_function("optimizer"):
                rate = learning_rate(step, config.optimizer, config.schedule)
                applied, gradient_norm = run.engine.step(rate)
        advance(state, applied, config)
        state.bad_records += outcome.bad_records
        meter.count(outcome.means)
        if step == first_step:
            run.heartbeat.first_step_is_done()
            set_collective_timeout(config.train.timeout_seconds + HEARTBEAT_FIRST_SECONDS)
        reason = outcome.reason
        last = step == config.train.steps or reason is not None
        evaluating = step == config.train.steps or is_due(step, config.train.eval_every)
        if last or evaluating or outcome.routing_due or is_due(step, config.train.log_every):
            record = step_record(run, outcome, gradient_norm, rate)
            if evaluating:
                shuffled = config.train.eval_shuffled_inputs
                record.update(run_evaluation(run, held_out, shuffled_inputs=shuffled))
            run.monitor.record(step, record)
            run.monitor.say(console_line(step, config.train.steps, record, meter.slowest))
        run.monitor.advance(step)
        if last or outcome.data_failed or outcome.save_requested or is_due(step, config.checkpoint.every_steps):
            run.monitor.flush()
            run.heartbeat.at("saving", step)
            save_checkpoint(run.run_dir / "checkpoints", run.engine, state, config.checkpoint.keep_last)
            run.stop.obeyed("SAVE")
        if outcome.data_failed:
            stream.stop_together(bad_records=state.bad_records, allowed=config.data.max_bad_records)
    stream.close()
    profile.close()
    return reason


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What a step's forward and backward bring; equal on all ranks, but for the routing."""

    means: LossMeans
    """Losses of the global batch."""
    reason: StopReason | None
    """Why to stop after this step, if some rank asks for it."""
    save_requested: bool
    """Whether some rank asks for a checkpoint."""
    routing_due: bool
    """Whether the routers' statistics are recorded at this step."""
    routing: Record
    """Those statistics; rank 0 only."""
    bad_records: int
    """Damaged records that the ranks met in the data of the next step, and replaced."""
    data_failed: bool
    """Whether some rank has no data for the next step, or too much of it is damaged."""


def run_micro_batches(run: Run, step: int, stream: ReadAhead) -> StepOutcome:
    """Forward and backward over this rank's micro-batches, then the host read on which all ranks agree.

    The next step's samples are read before that, while a GPU still works on this step's: so all ranks learn in time of
    one that has none.
    """
    engine = run.engine
    sums = LossSums(run.objectives, engine.device)
    micro_batches = stream.take()
    num_targets = count_target_tokens(micro_batches, engine.device)
    routing_due = is_due(step, run.config.train.routing_every)
    for batch in micro_batches:
        on_device = to_device(batch, engine.device)
        with run.meter.forward(), record_function("forward"):
            output = engine.forward(on_device, collect_routing=routing_due)
            loss = (output.token_loss.sum() + run.config.train.z_loss * output.z_loss.sum()) / num_targets
        with record_function("backward"):
            engine.backward(loss)
        sums.add(on_device, output)
    routed_mask = on_device["target_mask" if run.config.model.architecture == "causal" else "input_mask"]
    routing = record_routing(run.monitor, step, output.routing, routed_mask)
    if step < run.config.train.steps:
        run.heartbeat.at("waiting for data", step)
        with run.meter.waiting_for_data(), record_function("data"):
            stream.read()
    run.heartbeat.at("agreeing on the step", step)
    wanted = run.stop.reason()
    flags = [float(wanted is reason) for reason in StopReason]
    flags += [float(run.stop.save_requested()), float(stream.count_bad_records()), float(stream.failure is not None)]
    with record_function("agree"):
        means = sums.read(extra=flags)
    *reasons, save, bad_records, failed = means.extra
    too_many = bad_records > 0 and run.state.bad_records + bad_records > run.config.data.max_bad_records
    return StepOutcome(
        means=means,
        reason=next((reason for reason, count in zip(StopReason, reasons, strict=True) if count), None),
        save_requested=bool(save),
        routing_due=routing_due,
        routing=routing,
        bad_records=int(bad_records),
        data_failed=bool(failed) or too_many,
    )


def advance(state: TrainerState, applied: bool, config: RunConfig) -> None:
    """Count one finished step."""
    skip = SkipList(config.data.skip)
    first = state.samples_consumed
    state.step += 1
    state.samples_consumed = int(skip.take(first, config.train.global_batch_size)[-1]) + 1
    state.skipped_samples += skip.passed(first, state.samples_consumed)
    state.optimizer_step += applied
    state.skipped_steps += not applied


def step_record(run: Run, outcome: StepOutcome, gradient_norm: float, rate: float) -> Record:
    """The numbers of a logged step; rates and times are means since the last logged step."""
    means = outcome.means
    record: Record = {
        "loss": means.loss,
        "grad_norm": gradient_norm,
        "lr": rate,
        "input_tokens": means.input_tokens,
        "target_tokens": means.target_tokens,
        **run.meter.read(),
        "skipped_steps": run.state.skipped_steps,
        "z_loss": means.z_loss,
        "bad_records": run.state.bad_records,
    }
    record.update({f"loss/{name}": loss for name, loss in means.by_objective.items()})
    record.update(outcome.routing)
    return record


def console_line(step: int, num_steps: int, record: Record, slowest: str) -> str:
    """One line on a logged step."""
    parts = [f"step {step}/{num_steps}", f"loss {record['loss']:.4f}", f"grad norm {record['grad_norm']:.3f}"]
    parts.append(f"lr {record['lr']:.2e}")
    parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    parts.append(f"{record['step_seconds']:.3f} s a step (data {record['data_wait_seconds']:.3f})")
    if record.get("mfu") is not None:
        parts.append(f"MFU {record['mfu']:.1%}")
    if "eval/loss" in record:
        parts.append(f"held-out loss {record['eval/loss']:.4f}")
    if record["skipped_steps"]:
        parts.append(f"skipped {record['skipped_steps']}")
    return " | ".join([*parts, slowest] if slowest else parts)


def begin_stage(run: Run, stage: RunConfig) -> list[Batch]:
    """Change to the lengths of a stage; returns this rank's part of the samples that its evaluations use.

    Raises:
        ConfigError: on all ranks, if some rank cannot read its part.
    """
    run.engine.change_lengths(stage)
    run.meter.step_flops = step_flops(stage)
    if len(run.config.stages) > 1:
        run.monitor.say(
            f"from step {run.state.step + 1} on: {stage.data.input_length} input and {stage.data.target_length} target "
            f"tokens, {stage.micro_batch_size(run.ranks.world_size)} samples a micro-batch"
        )
    held_out: list[Batch] = []
    problem = None
    try:
        held_out = held_out_batches(
            run.shards,
            stage.data,
            num_samples=stage.train.eval_samples,
            micro_batch_size=stage.micro_batch_size(run.ranks.world_size),
            rank=run.ranks.rank,
            world_size=run.ranks.world_size,
        )
    except ConfigError as error:
        problem = str(error)
    raise_together(problem)
    return held_out


def run_evaluation(run: Run, held_out: list[Batch], *, shuffled_inputs: bool = False) -> Record:
    """The held-out numbers; none if a request to stop cuts the evaluation short, so that the checkpoint is in time."""

    def stop_wanted() -> bool:
        run.heartbeat.at("evaluating", run.state.step)
        return run.stop.agree(run.engine.device) is not None

    try:
        return evaluate(run.engine, held_out, run.objectives, shuffled_inputs=shuffled_inputs, stop_wanted=stop_wanted)
    except CutShortError:
        run.monitor.say(f"the evaluation of step {run.state.step} is left out: a request to stop")
        return {}


def read_training(run: Run) -> TrainingBatches:
    """This rank's micro-batches, step after step, from where the state stands."""
    return training_batches(
        run.shards,
        run.config.data,
        seed=run.config.seed,
        global_batch_size=run.config.train.global_batch_size,
        micro_batch_size=run.config.micro_batch_size(run.ranks.world_size),
        rank=run.ranks.rank,
        world_size=run.ranks.world_size,
        first_sample=run.state.samples_consumed,
        first_step=run.state.step + 1,
        pin_memory=run.engine.device.type == "cuda",
    )


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens now."""
    return every > 0 and step % every == 0
