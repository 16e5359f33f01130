"""The training loop, in one order: read, forward and backward, agree, step, account, evaluate, save, stop."""

from contextlib import closing
from dataclasses import replace

from torch.profiler import record_function

from colt5dist.data import Batch, Sources, held_out_batches, training_batches
from colt5dist.data.read.loader import TrainingBatches
from colt5dist.errors import ConfigError
from colt5dist.pretrained.metrics import ROUGE_MEAN
from colt5dist.train.checkpoint import TrainerState, early_stop, is_best, judge
from colt5dist.train.config.schema import RunConfig
from colt5dist.train.engine.schedule import learning_rate
from colt5dist.train.evaluation import CutShortError, HeldOut, evaluate
from colt5dist.train.garbage import collect_after
from colt5dist.train.guard.health import Health
from colt5dist.train.guard.spikes import ranges_to_skip, skip_list
from colt5dist.train.guard.stop import StopReason
from colt5dist.train.losses import LossMeans
from colt5dist.train.ranks import raise_together
from colt5dist.train.read_ahead import ReadAhead
from colt5dist.train.report.accounting import step_flops
from colt5dist.train.report.held_out_view import show_held_out
from colt5dist.train.report.monitor import Record
from colt5dist.train.report.profile import Profile
from colt5dist.train.run import Run
from colt5dist.train.step import DATA_SHARE, Agreement, agree, forward_and_backward, read_next
from colt5dist.train.text_evaluation import evaluate_texts
from colt5dist.wording import count


def train(run: Run) -> StopReason | None:
    """Train from the state's step to the last one.

    Returns:
        Why the run stopped before the last step; None when it is finished.
    """
    with closing(Profile(run.config.profile, run.run_dir, run.ranks)) as profile:  # on every way out
        return train_steps(run, profile)


def train_steps(run: Run, profile: Profile) -> StopReason | None:
    """The loop of `train`; `profile` records some of its steps."""
    config, state = run.config, run.state
    make_up_for_evaluation(run)
    stage = config.stage_at(state.step + 1)
    held_out = begin_stage(run, stage)
    if state.first_held_out_loss is None:
        state.first_held_out_loss = first_evaluation(run, held_out)
    stream, reason = open_stream(run)
    health = Health(run)
    first_step = state.step + 1
    while state.step < config.train.steps and reason is None and not early_stop(state, config):
        step = state.step + 1
        if config.stage_at(step) is not stage:
            stage = config.stage_at(step)
            held_out = begin_stage(run, stage)
        run.heartbeat.at("training", step)
        with run.meter.step(), profile.step(step):
            local = forward_and_backward(run, step, stream.take())
            read_next(run, step, stream)
            agreement = agree(run, step, local, stream)
            if not agreement.is_finite:
                health.refuse()
            rate = learning_rate(step, config.optimizer, config.schedule)
            with record_function("optimizer"):
                applied, norm = run.engine.step(rate)
        health.note(applied, local)
        account(run, agreement, applied)
        if health.observe(applied, agreement.means, local):
            stream.close()
            stream, reason = open_stream(run)
            continue
        reason = agreement.stop_reason
        last = step == config.train.steps or reason is not None
        evaluating = step == config.train.steps or is_due(step, config.train.eval_every)
        if last or evaluating or local.routing_due or is_due(step, config.train.log_every) or health.is_notable:
            record = step_record(run, agreement.means, norm, rate) | local.routing | health.counts()
            if evaluating:
                record |= judged_evaluation(run, held_out)
                if "eval/loss" not in record:  # cut short by a request, which came after the agreement
                    reason = run.stop.agree(run.engine.device)
            run.monitor.record(step, record, notes=health.notes())
            run.monitor.say(console_line(step, config.train.steps, record, run.meter.slowest))
        elif step == first_step:
            loss = f"loss {agreement.means.loss:.4f}"
            run.monitor.say(f"step {step}/{config.train.steps} | {loss} | {run.meter.seconds:.1f} s")
        run.monitor.advance(step)
        last = last or reason is not None or early_stop(state, config) is not None
        if last or is_best(state, config) or agreement.save_wanted or is_due(step, config.checkpoint.every_steps):
            save(run, agreement, last=last)
        if agreement.data_failed:
            stream.stop_together(bad_records=state.bad_records, allowed=config.data.max_bad_records)
    with run.heartbeat.patient("ending", state.step):
        stream.close()
        profile.close()
    return reason


def account(run: Run, agreement: Agreement, applied: bool) -> None:
    """Count a finished step: its samples, its tokens, and what the ranks said of it."""
    advance(run.state, applied, run.config)
    run.state.averaged_steps = run.engine.average.num_updates if run.engine.average else 0
    run.state.bad_records += agreement.bad_records
    run.meter.count(agreement.means)
    run.heartbeat.step_is_done()
    collect_after(run.state.step)
    if agreement.background_save_done:
        run.saver.advance()


def save(run: Run, agreement: Agreement, *, last: bool) -> None:
    """Write a checkpoint; the last one, one that was asked for, and one before a failure are waited for."""
    run.monitor.flush()
    wait = last or agreement.data_failed or agreement.save_requested
    with run.heartbeat.patient("saving", run.state.step):
        run.saver.save(run.state, wait=wait, must=last)
    if agreement.save_requested:
        run.stop.obeyed("SAVE")


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


def step_record(run: Run, means: LossMeans, gradient_norm: float, rate: float) -> Record:
    """The numbers of a logged step; rates and times are means since the last logged step."""
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
    return record


def console_line(step: int, num_steps: int, record: Record, slowest: str) -> str:
    """One line on a logged step."""
    parts = [f"step {step}/{num_steps}", f"loss {record['loss']:.4f}", f"grad norm {record['grad_norm']:.3f}"]
    parts.append(f"lr {record['lr']:.2e}")
    parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    parts.append(f"{record['step_seconds']:.3f} s per step (data {record['data_wait_seconds']:.3f})")
    if record.get("mfu") is not None:
        parts.append(f"MFU {record['mfu']:.1%}")
    if "eval/loss" in record:
        parts.append(f"held-out loss {record['eval/loss']:.4f}")
    if f"eval/{ROUGE_MEAN}" in record:
        parts.append(f"ROUGE {record[f'eval/{ROUGE_MEAN}']:.4f}")
    if record["skipped_steps"]:
        parts.append(f"skipped {record['skipped_steps']}")
    return " | ".join([*parts, slowest] if slowest else parts)


def begin_stage(run: Run, stage: RunConfig) -> HeldOut:
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
            f"tokens, {stage.micro_batch_size(run.ranks.world_size)} samples per micro-batch"
        )
    with run.heartbeat.patient("reading the held-out samples", run.state.step + 1):
        held_out, problem = None, None
        try:
            held_out = read_held_out(run, stage)
        except ConfigError as error:
            problem = str(error)
        raise_together(problem)
    assert held_out is not None
    return held_out


def read_held_out(run: Run, stage: RunConfig) -> HeldOut:
    """This rank's part of the held-out samples of a stage; of each set equally many samples.

    Raises:
        ConfigError: they cannot be read.
    """

    def read(shards: Sources, *, inputs_of_previous: bool = False) -> list[Batch]:
        return held_out_batches(
            shards,
            stage.data,
            num_samples=stage.train.eval_samples,
            micro_batch_size=stage.micro_batch_size(run.ranks.world_size),
            rank=run.ranks.rank,
            world_size=run.ranks.world_size,
            inputs_of_previous=inputs_of_previous,
        )

    others = read(run.shards, inputs_of_previous=True) if stage.train.eval_shuffled_inputs else None
    return HeldOut(read(run.shards), others, {name: read(shards) for name, shards in run.validation.items()})


def run_evaluation(run: Run, held_out: HeldOut, *, shuffled_inputs: bool = False, texts: bool = False) -> Record:
    """The held-out numbers; none if a request to stop cuts the evaluation short, so that the checkpoint is in time."""

    def stop_wanted() -> bool:
        run.heartbeat.at("evaluating", run.state.step)
        return run.stop.agree(run.engine.device) is not None

    try:
        record = evaluate(
            run.engine, held_out, run.objectives, shuffled_inputs=shuffled_inputs, stop_wanted=stop_wanted
        )
        if texts:
            record |= evaluate_texts(run, run.config.stage_at(run.state.step), stop_wanted)
    except CutShortError:
        run.monitor.say(f"the evaluation of step {run.state.step} is left out: a request to stop")
        return {}
    if run.config.monitor.held_out_sample and run.state.step > 0:
        with run.heartbeat.patient("showing a held-out sample", run.state.step):
            show_held_out(run.monitor, run.engine, held_out.batches[0], run.tokenizer, run.state.step, run.objectives)
    return record


def judged_evaluation(run: Run, held_out: HeldOut) -> Record:
    """All the held-out numbers, which decide on the best checkpoint and an early stop; none if it is cut short."""
    record = run_evaluation(run, held_out, shuffled_inputs=run.config.train.eval_shuffled_inputs, texts=True)
    judge(run.state, run.config, record)
    return record


def make_up_for_evaluation(run: Run) -> None:
    """Evaluate the step that the run resumes from, if a request to stop has cut its evaluation short.

    The checkpoint of the step is there; so it need not be saved.
    """
    state, config = run.state, run.config
    if not state.evaluation_left_out:
        return
    record = judged_evaluation(run, begin_stage(run, config.stage_at(state.step)))
    if record:
        run.monitor.complete(state.step, record)
        run.monitor.say(f"evaluated step {state.step}, whose evaluation a request to stop had cut short")
        run.saver.name_best(state)


def first_evaluation(run: Run, held_out: HeldOut) -> float | None:
    """The held-out loss before the first step, said at once: what follows can take minutes on a CPU."""
    loss = run_evaluation(run, replace(held_out, sets={})).get("eval/loss")
    every = run.config.train.log_every
    if loss is not None:
        lines = f"; a line follows for the first step, then every {count(every, 'step')}" if every > 1 else ""
        run.monitor.say(f"held-out loss before the first step: {loss:.4f} nats per token{lines}")
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
        readers=run.readers,
    )


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens now."""
    return every > 0 and step % every == 0
