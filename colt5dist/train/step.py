"""One optimizer step: forward and backward over this rank's micro-batches, then the vote on which all ranks agree."""

import sys
from dataclasses import astuple, dataclass, fields

from torch.profiler import record_function

from colt5dist.data.read.batch import Batch
from colt5dist.train.guard.stop import StopReason
from colt5dist.train.losses import LossMeans, LossSums, count_target_tokens
from colt5dist.train.read_ahead import ReadAhead
from colt5dist.train.report.monitor import Record
from colt5dist.train.report.routing_record import record_routing
from colt5dist.train.run import Run

DATA_SHARE = 0.75
"""Share of the time without progress after which a rank gives up waiting for data; the rest is for a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class LocalStep:
    """What this rank knows of a step after its forward and backward passes."""

    micro_batches: list[Batch]
    """Its part of the global batch, on the host."""
    sums: LossSums
    """Its sums of losses and tokens, on the device."""
    routing_due: bool
    """Whether the routers' statistics are recorded at this step."""
    routing: Record
    """Those statistics; empty on ranks other than 0."""


@dataclass(frozen=True, kw_only=True)
class Vote:
    """What a rank brings to the agreement at the end of a step, as numbers; their sums over ranks decide."""

    stop_by_file: float
    """1 if the file STOP is there."""
    stop_by_signal: float
    """1 if a signal asks to stop."""
    stop_by_time: float
    """1 if train.max_minutes are over."""
    stop_by_launcher: float
    """1 if the launcher is gone."""
    save_requested: float
    """1 if the file SAVE asks for a checkpoint."""
    save_due: float
    """1 if a checkpoint is due by the clock."""
    background_save_ended: float
    """1 if this rank has done its part of the save that is written in the background."""
    bad_records: float
    """Damaged records that this rank met in the data of the next step, and replaced."""
    no_data: float
    """1 if this rank has no data for the next step."""

    @property
    def stop_reason(self) -> StopReason | None:
        """Why to stop, if any rank asks for it."""
        votes = {
            StopReason.FILE: self.stop_by_file,
            StopReason.SIGNAL: self.stop_by_signal,
            StopReason.TIME: self.stop_by_time,
            StopReason.LAUNCHER: self.stop_by_launcher,
        }
        return next((reason for reason, number in votes.items() if number), None)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What all ranks agree on at the end of a step; equal on all of them."""

    means: LossMeans
    """Losses of the global batch."""
    gradients_are_finite: bool
    """Whether the gradients of all ranks are finite and not too large to be squared."""
    stop_reason: StopReason | None
    """Why to stop after this step, if some rank asks for it."""
    save_requested: bool
    """Whether a checkpoint was asked for by file."""
    save_due: bool
    """Whether one is due by the clock."""
    background_save_done: bool
    """Whether every rank has done its part of the save that is written in the background."""
    bad_records: int
    """Damaged records that the ranks met in the data of the next step, and replaced."""
    data_failed: bool
    """Whether some rank has no data for the next step, or too much of it is damaged."""

    @property
    def is_finite(self) -> bool:
        """Whether every loss and every gradient is finite, so that the step is applied."""
        return self.gradients_are_finite and self.means.is_finite

    @property
    def save_wanted(self) -> bool:
        """Whether to save a checkpoint after this step, whatever checkpoint.every_steps says."""
        return self.save_requested or self.save_due or self.data_failed


def forward_and_backward(run: Run, step: int, micro_batches: list[Batch]) -> LocalStep:
    """Run the model over this rank's micro-batches and sum the gradients of their losses."""
    engine = run.engine
    micro_batches = engine.arrange(micro_batches)
    sums = LossSums(run.objectives, engine.device)
    num_targets = count_target_tokens(micro_batches, engine.device)
    every = run.config.train.routing_every
    routing_due = every > 0 and step % every == 0
    for number, batch in enumerate(micro_batches, start=1):
        collect_routing = routing_due and number == len(micro_batches)
        on_device, output = engine.forward_backward(
            batch, num_targets, collect_routing=collect_routing, timed=run.meter.computing
        )
        sums.add(on_device, output)
    for line in engine.forms.news:
        run.monitor.say(line)
        if not run.ranks.is_first and line.startswith("note: "):
            print(f"rank {run.ranks.rank}: {line}", file=sys.stderr, flush=True)
    engine.forms.news.clear()
    routed_mask = on_device["target_mask" if run.config.model.architecture == "causal" else "input_mask"]
    routing = record_routing(run.monitor, step, output.routing, routed_mask)
    return LocalStep(micro_batches=micro_batches, sums=sums, routing_due=routing_due, routing=routing)


def read_next(run: Run, step: int, stream: ReadAhead) -> None:
    """Read the next step's samples while a GPU still works on this one's.

    It comes before the ranks agree, so that all of them learn in time of one that has no data.
    """
    if step < run.config.train.steps:
        run.heartbeat.at("waiting for data", step)
        with run.meter.waiting_for_data(), record_function("data"):
            stream.read(DATA_SHARE * run.heartbeat.allowed_seconds)


def agree(run: Run, step: int, local: LocalStep, stream: ReadAhead) -> Agreement:
    """Add up losses, gradients' sizes and requests over all ranks: one collective, one host read. Collective."""
    run.heartbeat.at("agreeing on the step", step)
    wanted = run.stop.reason()
    mine = Vote(
        stop_by_file=float(wanted is StopReason.FILE),
        stop_by_signal=float(wanted is StopReason.SIGNAL),
        stop_by_time=float(wanted is StopReason.TIME),
        stop_by_launcher=float(wanted is StopReason.LAUNCHER),
        save_requested=float(run.stop.save_requested()),
        save_due=float(run.saver.is_due_by_time()),
        background_save_ended=float(run.saver.has_ended()),
        bad_records=float(stream.count_bad_records()),
        no_data=float(stream.failure is not None),
    )
    with record_function("agree"):
        summary = run.engine.gradients.summary()
        means = local.sums.read(extra=astuple(mine), on_device=[summary])
    num_votes = len(fields(Vote))
    all_votes = Vote(**{f.name: number for f, number in zip(fields(Vote), means.extra[:num_votes], strict=True)})
    damaged = all_votes.bad_records > 0
    too_many = damaged and run.state.bad_records + all_votes.bad_records > run.config.data.max_bad_records
    return Agreement(
        means=means,
        gradients_are_finite=run.engine.gradients.are_finite(means.extra[num_votes:]),
        stop_reason=all_votes.stop_reason,
        save_requested=bool(all_votes.save_requested),
        save_due=bool(all_votes.save_due),
        background_save_done=all_votes.background_save_ended == run.ranks.world_size,
        bad_records=int(all_votes.bad_records),
        data_failed=bool(all_votes.no_data) or too_many,
    )
