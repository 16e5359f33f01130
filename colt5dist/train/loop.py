"""The training loop, in one order: read, forward and backward, agree, step, account, evaluate, save, stop."""

from dataclasses import dataclass
from pathlib import Path

from torch.profiler import record_function

from colt5dist.data import OBJECTIVE_NAMES, Batch, ShardSet, held_out_batches, training_batches
from colt5dist.data.loader import TrainingBatches
from colt5dist.train.checkpoint import TrainerState, save_checkpoint
from colt5dist.train.config import RunConfig
from colt5dist.train.engine import Engine, to_device
from colt5dist.train.evaluation import evaluate
from colt5dist.train.losses import LossMeans, LossSums, count_target_tokens
from colt5dist.train.meter import Meter
from colt5dist.train.monitor import Monitor, Record
from colt5dist.train.profile import Profile
from colt5dist.train.routing import record_routing
from colt5dist.train.runtime import Ranks
from colt5dist.train.schedule import learning_rate
from colt5dist.train.stop import StopReason, StopRequests


@dataclass(kw_only=True)
class Run:
    """All that a run works with."""

    config: RunConfig
    run_dir: Path
    ranks: Ranks
    shards: ShardSet
    engine: Engine
    state: TrainerState
    monitor: Monitor
    meter: Meter
    stop: StopRequests

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the denoising objectives."""
        return OBJECTIVE_NAMES[self.config.data.mixture]


def train(run: Run) -> StopReason | None:
    """Train from the state's step to the last one.

    Returns:
        Why the run stopped before the last step; None when it is finished.
    """
    config, state, meter = run.config, run.state, run.meter
    held_out = read_held_out(run)
    if state.first_held_out_loss is None:
        state.first_held_out_loss = evaluate(run.engine, held_out, run.objectives)["eval/loss"]
    stream = read_training(run)
    profile = Profile(config.profile, run.run_dir, run.ranks)
    reason: StopReason | None = None
    while state.step < config.train.steps and reason is None:
        step = state.step + 1
        with meter.step(), profile.step(step):
            with meter.waiting_for_data(), record_function("data"):
                micro_batches = next(stream)
            outcome = run_micro_batches(run, step, micro_batches)
            with record_function("optimizer"):
                rate = learning_rate(step, config.optimizer, config.schedule)
                applied, gradient_norm = run.engine.step(rate)
        advance(state, applied, config.train.global_batch_size)
        meter.count(outcome.means)
        reason = outcome.reason
        last = step == config.train.steps or reason is not None
        evaluating = step == config.train.steps or is_due(step, config.train.eval_every)
        if last or evaluating or outcome.routing_due or is_due(step, config.train.log_every):
            record = step_record(run, outcome, gradient_norm, rate)
            if evaluating:
                shuffled = config.train.eval_shuffled_inputs
                record.update(evaluate(run.engine, held_out, run.objectives, shuffled_inputs=shuffled))
            run.monitor.record(step, record)
            run.monitor.say(console_line(step, config.train.steps, record, meter.slowest))
        run.monitor.advance(step)
        if last or outcome.save_requested or is_due(step, config.checkpoint.every_steps):
            run.monitor.flush()
            save_checkpoint(run.run_dir / "checkpoints", run.engine, state, config.checkpoint.keep_last)
            run.stop.obeyed("SAVE")
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


def run_micro_batches(run: Run, step: int, micro_batches: list[Batch]) -> StepOutcome:
    """Forward and backward over this rank's micro-batches, then the host read on which all ranks agree."""
    engine = run.engine
    sums = LossSums(run.objectives, engine.device)
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
    wanted = run.stop.reason()
    flags = [float(wanted is reason) for reason in StopReason] + [float(run.stop.save_requested())]
    with record_function("agree"):
        means = sums.read(extra=flags)
    *reasons, save = means.extra
    return StepOutcome(
        means=means,
        reason=next((reason for reason, count in zip(StopReason, reasons, strict=True) if count), None),
        save_requested=bool(save),
        routing_due=routing_due,
        routing=routing,
    )


def advance(state: TrainerState, applied: bool, global_batch_size: int) -> None:
    """Count one finished step."""
    state.step += 1
    state.samples_consumed += global_batch_size
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
        pin_memory=run.engine.device.type == "cuda",
    )


def read_held_out(run: Run) -> list[Batch]:
    """This rank's part of the samples that every evaluation uses."""
    return held_out_batches(
        run.shards,
        run.config.data,
        num_samples=run.config.train.eval_samples,
        micro_batch_size=run.config.micro_batch_size(run.ranks.world_size),
        rank=run.ranks.rank,
        world_size=run.ranks.world_size,
    )


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens now."""
    return every > 0 and step % every == 0
