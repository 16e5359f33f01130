"""The training loop, in one order: read, forward and backward, agree, step, account, evaluate, save, stop."""

from dataclasses import dataclass, replace

from torch.profiler import record_function

from colt5dist.data import Batch, held_out_batches, training_batches
from colt5dist.data.read.loader import TrainingBatches
from colt5dist.errors import ConfigError
from colt5dist.train.checkpoint import TrainerState
from colt5dist.train.config.schema import RunConfig
from colt5dist.train.engine import gradients
from colt5dist.train.engine.engine import to_device
from colt5dist.train.engine.schedule import learning_rate
from colt5dist.train.evaluation import CutShortError, evaluate
from colt5dist.train.guard.health import Health, LocalBatch
from colt5dist.train.guard.spikes import ranges_to_skip, skip_list
from colt5dist.train.guard.stop import StopReason
from colt5dist.train.losses import LossMeans, LossSums, count_target_tokens, training_loss
from colt5dist.train.ranks import raise_together
from colt5dist.train.read_ahead import ReadAhead
from colt5dist.train.report.accounting import step_flops
from colt5dist.train.report.monitor import Record
from colt5dist.train.report.profile import Profile
from colt5dist.train.report.routing_record import record_routing
from colt5dist.train.run import Run
from colt5dist.wording import count

DATA_SHARE = 0.75
"""Of the time in which nothing may move on, the part that a rank waits for data; the rest is for a checkpoint."""


def train(run: Run) -> StopReason | None:
    """Train from the state's step to the last one.

    Returns:
        Why the run stopped before the last step; None when it is finished.
    """
    config, state, meter = run.config, run.state, run.meter
    stage = config.stage_at(state.step + 1)
    held_out = begin_stage(run, stage)
    if state.first_held_out_loss is None:
        state.first_held_out_loss = first_evaluation(run, held_out)
    stream, reason = open_stream(run)
    health = Health(run)
    profile = Profile(config.profile, run.run_dir, run.ranks)
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
                applied, norm = health.step(outcome.means, outcome.bad_gradients, outcome.local, rate)
        advance(state, applied, config)
        state.bad_records += outcome.bad_records
        meter.count(outcome.means)
        run.heartbeat.step_is_done()
        reason = outcome.reason
        if outcome.background_save_done:
            run.saver.advance()
        if health.observe(applied, outcome.means, outcome.local):
            stream.close()
            stream, reason = open_stream(run)
            continue
        last = step == config.train.steps or reason is not None
        evaluating = step == config.train.steps or is_due(step, config.train.eval_every)
        if last or evaluating or outcome.routing_due or is_due(step, config.train.log_every) or health.is_notable:
            record = step_record(run, outcome, norm, rate)
            record.update(health.counts())
            if evaluating:
                shuffled = config.train.eval_shuffled_inputs
                record.update(run_evaluation(run, held_out, shuffled_inputs=shuffled))
            run.monitor.record(step, record, notes=health.notes())
            run.monitor.say(console_line(step, config.train.steps, record, meter.slowest))
        elif step == first_step:
            run.monitor.say(f"step {step}/{config.train.steps} | loss {outcome.means.loss:.4f} | {meter.seconds:.1f} s")
        run.monitor.advance(step)
        wait = last or outcome.data_failed or outcome.save_requested  # for it to be whole
        if wait or outcome.save_due or is_due(step, config.checkpoint.every_steps):
            run.monitor.flush()
            with run.heartbeat.patient("saving", step):
                run.saver.save(state, wait=wait, must=last)
            if outcome.save_requested:
                run.stop.obeyed("SAVE")
        if outcome.data_failed:
            stream.stop_together(bad_records=state.bad_records, allowed=config.data.max_bad_records)
    with run.heartbeat.patient("ending", state.step):
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
    """Whether a checkpoint was asked for by file."""
    save_due: bool
    """Whether one is due by the clock."""
    background_save_done: bool
    """Whether every rank has done its part of the save that is written in the background."""
    routing_due: bool
    """Whether the routers' statistics are recorded at this step."""
    routing: Record
    """Those statistics; rank 0 only."""
    bad_records: int
    """Damaged records that the ranks met in the data of the next step, and replaced."""
    data_failed: bool
    """Whether some rank has no data for the next step, or too much of it is damaged."""
    bad_gradients: bool
    """Whether a gradient of some rank is not finite."""
    local: LocalBatch
    """This rank's part of the batch and of its losses."""


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
            loss = training_loss(output, num_targets, run.config.train.z_loss)
        with record_function("backward"):
            engine.backward(loss)
        sums.add(on_device, output)
    routed_mask = on_device["target_mask" if run.config.model.architecture == "causal" else "input_mask"]
    routing = record_routing(run.monitor, step, output.routing, routed_mask)
    if step < run.config.train.steps:
        run.heartbeat.at("waiting for data", step)
        with run.meter.waiting_for_data(), record_function("data"):
            stream.read(DATA_SHARE * run.heartbeat.allowed_seconds)
    run.heartbeat.at("agreeing on the step", step)
    wanted = run.stop.reason()
    flags = [float(wanted is reason) for reason in StopReason]
    flags += [float(run.stop.save_requested()), float(stream.count_bad_records()), float(stream.failure is not None)]
    flags += [float(run.saver.is_due_by_time()), float(run.saver.has_ended())]
    with record_function("agree"):
        means = sums.read(extra=flags, on_device=[gradients.count_not_finite(engine)])
    *reasons, save, bad_records, failed, save_due, saves_ended, bad_gradients = means.extra
    too_many = bad_records > 0 and run.state.bad_records + bad_records > run.config.data.max_bad_records
    return StepOutcome(
        means=means,
        reason=next((reason for reason, count in zip(StopReason, reasons, strict=True) if count), None),
        save_requested=bool(save),
        save_due=bool(save_due),
        background_save_done=saves_ended == run.ranks.world_size,
        routing_due=routing_due,
        routing=routing,
        bad_records=int(bad_records),
        data_failed=bool(failed) or too_many,
        bad_gradients=bool(bad_gradients),
        local=LocalBatch(micro_batches, sums.sample_losses),
    )


def advance(state: TrainerState, applied: bool, config: RunConfig) -> None:
    """Count one finished step."""
    skip = skip_list(config, state)
    first = state.samples_consumed
    state.step += 1
    state.samples_consumed = int(skip.take(first, config.train.global_batch_size)[-1]) + 1
    state.skipped_samples += skip.passed(first, state.samples_consumed)
    state.optimizer_step += applied
    state.skipped_steps += not applied
    state.skipped_from = state.skipped_from if state.skipped_in_a_row else first
    state.skipped_in_a_row = 0 if applied else state.skipped_in_a_row + 1


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
    run.heartbeat.first_step_follows()
    run.meter.step_flops = step_flops(stage)
    if len(run.config.stages) > 1:
        run.monitor.say(
            f"from step {run.state.step + 1} on: {stage.data.input_length} input and {stage.data.target_length} target "
            f"tokens, {stage.micro_batch_size(run.ranks.world_size)} samples a micro-batch"
        )
    with run.heartbeat.patient("reading the held-out samples", run.state.step + 1):
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


def first_evaluation(run: Run, held_out: list[Batch]) -> float | None:
    """The held-out loss before the first step, said at once: what follows can take minutes on a CPU."""
    loss = run_evaluation(run, held_out).get("eval/loss")
    every = run.config.train.log_every
    if loss is not None:
        lines = f"; a line follows for the first step, then every {count(every, 'step')}" if every > 1 else ""
        run.monitor.say(f"held-out loss before the first step: {loss:.4f} nats a token{lines}")
    return loss


def open_stream(run: Run) -> tuple[ReadAhead, StopReason | None]:
    """The data from where the state stands, and why to stop at once: the first step may then be unread.

    Raises:
        ConfigError: on all ranks, if some rank has no data.
    """
    with run.heartbeat.patient("opening the data", run.state.step + 1):
        seconds = DATA_SHARE * run.heartbeat.allowed_seconds
        stream = ReadAhead(read_training(run), run.ranks, lambda: run.stop.reason() is not None, first_seconds=seconds)
        stream.stop_together()
        return stream, run.stop.agree(run.engine.device)


def read_training(run: Run) -> TrainingBatches:
    """This rank's micro-batches, step after step, from where the state stands."""
    return training_batches(
        run.shards,
        replace(run.config.data, skip=ranges_to_skip(run.config, run.state)),
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
