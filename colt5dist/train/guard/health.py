"""Bad numbers: skips a step whose loss or gradient is not finite (train/step.py finds out); many in a row end the run.

The order of calls in a step: if the ranks agree that a loss or gradient is not finite, `refuse` makes the optimizer's
step change nothing. `note` keeps a description of a step that was not applied. Once the step is counted, `observe`
reports it, ends the run, or rolls it back after a loss spike. All decisions follow from numbers that are equal on all
ranks, so all ranks do the same.
"""

import json
import shlex
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from colt5dist.errors import TrainingFault
from colt5dist.files import write_whole
from colt5dist.storage.checkpoints import WEIGHT
from colt5dist.train.engine.fragments import owned_fragments
from colt5dist.train.engine.gradients import are_bad
from colt5dist.train.engine.micro_batch_graph import to_device
from colt5dist.train.guard import spikes
from colt5dist.train.losses import LossMeans, count_target_tokens, training_loss
from colt5dist.train.ranks import barrier, gather_objects
from colt5dist.train.report.monitor import Record
from colt5dist.train.run import Run
from colt5dist.train.run_directory import FAILURES
from colt5dist.train.step import LocalStep


@dataclass(frozen=True)
class BadLoss:
    """A micro-batch with a loss that is not finite."""

    rank: int
    """Rank that computed it."""
    micro_batch: int
    """Number of the micro-batch within the step."""
    samples: list[int]
    """Numbers of its samples whose loss is not finite."""


@dataclass(kw_only=True)
class SkippedStep:
    """Description of a skipped step; equal on all ranks."""

    step: int
    """Number of the step."""
    samples: list[list[int]]
    """Numbers of the samples of the global batch, as ranges [first, sample after the last]."""
    bad_losses: list[BadLoss] = field(default_factory=list)
    """Micro-batches of all ranks with a loss that is not finite."""
    bad_gradients: list[str] = field(default_factory=list)
    """Names of the parameters whose gradient, summed over micro-batches and ranks, is not finite."""

    def __str__(self) -> str:
        """One line for the log."""
        causes = [
            f"the loss of sample {', '.join(map(str, bad.samples))} (rank {bad.rank}, micro-batch {bad.micro_batch})"
            for bad in self.bad_losses
        ]
        if self.bad_gradients:
            more = f" and {len(self.bad_gradients) - 1} more" if len(self.bad_gradients) > 1 else ""
            causes.append(f"the gradient of {self.bad_gradients[0]}{more}")
        cause = "; ".join(causes) or "the gradient's norm"
        return f"step {self.step} is skipped, samples {_format_ranges(self.samples)}: not finite is {cause}"


class Health:
    """Watches the losses and gradients of a run; the counts are kept in its state.

    Args:
        run: the parts of the run.
    """

    def __init__(self, run: Run) -> None:
        self.config, self.run_dir, self.ranks = run.config, run.run_dir, run.ranks
        self.engine, self.state, self.monitor, self.saver = run.engine, run.state, run.monitor, run.saver
        self.heartbeat = run.heartbeat
        self._skipped: list[SkippedStep] = []
        self._spiked = False
        self._bad_gradients: list[str] = []

    def refuse(self) -> None:
        """Find the gradients that are not finite, and make the following optimizer step change nothing; collective."""
        self._bad_gradients = self.engine.gradients.names_not_finite()
        self.engine.gradients.refuse()

    def note(self, applied: bool, local: LocalStep) -> None:
        """Describe a step that was not applied (collective then); call it before the state counts the step.

        Args:
            applied: whether the optimizer applied the step.
            local: what this rank knows of the step.
        """
        if applied:
            self._skipped.clear()
        else:
            self._skipped.append(self._describe(self._bad_gradients, local))
        self._bad_gradients = []

    def observe(self, applied: bool, means: LossMeans, local: LocalStep) -> bool:
        """Check the step that the state has just counted: report what is wrong, end the run, or roll it back.

        Args:
            applied: whether the optimizer applied the step.
            means: losses of the global batch.
            local: what this rank knows of the step.

        Returns:
            Whether the run went back to the last checkpoint after a loss spike; then the data must be opened again.

        Raises:
            TrainingFault: on all ranks, after health.max_skipped skipped steps in a row.
            ConfigError: on all ranks, if the checkpoint cannot be read.
            SaveError: on all ranks, if a save in the background failed and the run must stop.
        """
        self._spiked = False
        if not applied:
            self.monitor.say(str(self._skipped[-1]))
            if self.state.skipped_in_a_row >= self.config.health.max_skipped:
                self.monitor.record(self.state.step, {"loss": means.loss, **self.counts()}, notes=self.notes())
                self._give_up(local)
            return False
        score = spikes.observe(self.state, self.config, means.loss)
        if score is None:
            return False
        self._spiked = True
        self.state.spikes += 1
        window = self.config.health.spike_window
        self.monitor.say(
            f"step {self.state.step}: the loss {means.loss:.4f} is a spike, {score:.1f} robust standard deviations "
            f"above the median of the {window} applied steps before"
        )
        return self.config.health.on_spike == "rollback" and self._roll_back()

    @property
    def is_notable(self) -> bool:
        """Whether the step that was observed last must be recorded, whatever train.log_every says."""
        return self._spiked or self.state.skipped_in_a_row > 0

    def counts(self) -> Record:
        """Counts of the run so far, for each record."""
        state = self.state
        return {"skipped_steps": state.skipped_steps, "loss_spikes": state.spikes, "rollbacks": state.rollbacks}

    def notes(self) -> dict[str, Any]:
        """Extra entries of a skipped step's record: the samples of its batch, and those with a bad loss."""
        if not self.state.skipped_in_a_row or not self._skipped:
            return {}
        skipped = self._skipped[-1]
        bad = sorted(number for loss in skipped.bad_losses for number in loss.samples)
        return {"skipped_batch": skipped.samples, "not_finite_samples": bad}

    def _describe(self, names: list[str], local: LocalStep) -> SkippedStep:
        """Gather what the ranks know of a skipped step; collective.

        Args:
            names: parameters whose gradient this rank found not finite.
            local: what this rank knows of the step.
        """
        losses = []
        for number, (batch, values) in enumerate(zip(local.micro_batches, local.sums.sample_losses, strict=True)):
            bad = batch["sample_index"][~torch.isfinite(values).cpu()].tolist()
            if bad:
                losses.append(BadLoss(self.ranks.rank, number, bad))
        found: list[tuple[list[str], list[BadLoss]]] = gather_objects((names, losses))
        return SkippedStep(
            step=self.state.step + 1,
            samples=self._next_samples(),
            bad_losses=[loss for _, of_rank in found for loss in of_rank],
            bad_gradients=sorted({name for of_rank, _ in found for name in of_rank}),
        )

    def _next_samples(self) -> list[list[int]]:
        """Samples of the global batch that the state has not counted yet, as ranges [first, sample after the last]."""
        skip = spikes.skip_list(self.config, self.state)
        numbers = skip.take(self.state.samples_consumed, self.config.train.global_batch_size).tolist()
        ranges: list[list[int]] = []
        for number in numbers:
            if ranges and ranges[-1][1] == number:
                ranges[-1][1] += 1
            else:
                ranges.append([number, number + 1])
        return ranges

    def _roll_back(self) -> bool:
        """Go back to the last checkpoint; returns False if there is none or health.max_rollbacks are used up."""
        allowed = self.config.health.max_rollbacks
        if self.state.rollbacks >= allowed:
            self.monitor.say(f"continuing: health.max_rollbacks={allowed} rollbacks are used up")
            return False
        with self.heartbeat.patient("rolling back", self.state.step):
            folder = spikes.roll_back(self.saver, self.config, self.state, self.ranks)
        if folder is None:
            self.monitor.say("continuing: there is no whole checkpoint to roll back to")
            return False
        self.monitor.roll_back(self.state.step)
        self.monitor.say(
            f"rolled back to {folder}; samples {_format_ranges(self.state.rolled_back_samples[-1:])} are passed over"
        )
        return True

    def _give_up(self, local: LocalStep) -> None:
        """Run the last micro-batches again to find where the bad numbers begin, write a report, and end the run.

        No checkpoint is started: the next start resumes from an earlier one, and ends here again unless something
        changes.
        """
        found = gather_objects((self._bad_weights(), self._run_again(local)))
        state = self.state
        first, last = state.step - state.skipped_in_a_row + 1, state.step
        path = self.run_dir / FAILURES / f"not_finite_{last:08d}.json"
        skip = [[state.skipped_from, state.samples_consumed]]
        bad_weights = sorted({name for names, _ in found for name in names})
        if bad_weights:
            fix = (
                f"the weight {bad_weights[0]} is not finite: go back to an earlier checkpoint by moving newer ones away"
            )
        else:
            ranges = json.dumps([*self.config.data.skip, *skip], separators=(",", ":"))
            fix = (
                f"start it again with {shlex.quote(f'data.skip={ranges}')} to pass over their samples, or with "
                f"optimizer.lr={self.config.optimizer.lr / 2:g} {shlex.quote('resume_allow=[optimizer.lr]')}"
            )
        message = (
            f"steps {first} to {last} were skipped because a loss or gradient was not finite, as many in a row as "
            f"health.max_skipped={self.config.health.max_skipped} allows; {path} says which; {fix}"
        )
        if self.ranks.is_first:
            content = {
                "message": message,
                "skipped_in_a_row": state.skipped_in_a_row,
                "samples": skip,
                "steps_of_this_start": [asdict(skipped) for skipped in self._skipped],
                "weights_not_finite": bad_weights,
                "last_batch_run_again": [again for _, of_rank in found for again in of_rank],
            }
            try:
                path.parent.mkdir(exist_ok=True)
                write_whole(path, json.dumps(content, indent=1).encode())
            except OSError as error:
                print(f"warning: {path} cannot be written ({error.strerror})", file=sys.stderr)
            print(f"error: {message}", file=sys.stderr, flush=True)
        with self.heartbeat.patient("saving", last):
            self.saver.finish()  # an earlier checkpoint may still be written in the background
        barrier()  # the launcher ends all ranks as soon as one exits
        raise TrainingFault(message)

    def _bad_weights(self) -> list[str]:
        """Names of the parameters of which this rank holds a weight that is not finite."""
        owned = owned_fragments(self.engine)
        return [f.name for f in owned if f.key == WEIGHT and not bool(torch.isfinite(f.tensor).all())]

    def _run_again(self, local: LocalStep) -> list[dict[str, Any]]:
        """Repeat forward and backward, and check each gradient before it is summed over ranks; collective.

        A micro-batch that is finite this time although its step was not points to a device that computes wrongly, or
        to compiled code, which does not run here.
        """
        module, device = self.engine.module, self.engine.device
        flags: dict[str, torch.Tensor] = {}
        handles = []
        for name, parameter in module.named_parameters():

            def note(gradient: torch.Tensor, name: str = name) -> None:
                flags[name] = are_bad(gradient)

            handles.append(parameter.register_hook(note))
        num_targets = count_target_tokens(local.micro_batches, device)
        found = []
        for number, batch in enumerate(local.micro_batches):
            flags.clear()
            with self.engine.plain():
                output = self.engine.forward(to_device(batch, device))
                self.engine.backward(training_loss(output, num_targets, self.config.train.z_loss))
            finite = torch.isfinite(output.token_loss.detach().sum(dim=1)).cpu()
            found.append(
                {
                    "rank": self.ranks.rank,
                    "micro_batch": number,
                    "samples": batch["sample_index"].tolist(),
                    "losses_not_finite": batch["sample_index"][~finite].tolist(),
                    "gradients_not_finite": [name for name, flag in flags.items() if bool(flag)],
                }
            )
        for handle in handles:
            handle.remove()
        return found


def _format_ranges(ranges: list[list[int]]) -> str:
    """Ranges [first, sample after the last] as text: "8 to 15, 20"."""
    return ", ".join(f"{first} to {stop - 1}" if stop - first > 1 else str(first) for first, stop in ranges)
