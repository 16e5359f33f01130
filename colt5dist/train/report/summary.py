"""The lines that a run prints at its end."""

import re
import shlex
from pathlib import Path

from colt5dist.errors import ConfigError
from colt5dist.train.checkpoint import TrainerState
from colt5dist.train.report.monitor import TENSORBOARD, read_metrics

KEEP_ALL = "--samples_per_plugin scalars=1000000"
"""Has TensorBoard show every point: by itself it shows a thousand of each curve, and may leave out a spike. (The
documented `scalars=0`, for all points, shows none in TensorBoard 2.21.)"""


def tensorboard_command(run_dir: Path) -> str:
    """What to type to look at a run."""
    return f"tensorboard --logdir {shlex.quote(str(run_dir / TENSORBOARD))} {KEEP_ALL}"


def summary(
    run_dir: Path,
    state: TrainerState,
    stopped: str | None,
    *,
    unigram_entropy: float,
    tokens_per_second: float | None,
    finished_early: str | None = None,
) -> str:
    """Summarise a run: held-out loss before and after, speed, its folder, and how to look at it.

    Args:
        run_dir: folder of the run.
        state: the trainer's state at the end, with the held-out loss before the first step.
        stopped: why the run stopped before its last step; None if it is finished.
        unigram_entropy: entropy of the held-out target tokens' frequencies, in nats: the loss of a model that only
            knows how often each token occurs.
        tokens_per_second: speed of this start; None if it trained no step.
        finished_early: why the run is finished before its last step, if it is.

    Returns:
        Several lines.
    """
    try:
        records = read_metrics(run_dir)
    except ConfigError:  # the run itself ended without an error
        records = []
    evaluations = [r for r in records if r.get("eval/loss") is not None]
    first_loss = state.first_held_out_loss
    why = stopped or finished_early
    lines = [f"{'stopped' if stopped else 'finished'} at step {state.step}{f' ({why})' if why else ''}"]
    if stopped:
        lines[0] += "; the same command continues it"
    if first_loss is not None and evaluations:
        last = evaluations[-1]
        lines.append(
            f"held-out loss: {first_loss:.4f} before, {last['eval/loss']:.4f} after step {last['step']} "
            "(nats per token)"
        )
        if unigram_entropy > 0:
            change = last["eval/loss"] / unigram_entropy - 1
            side = f"{abs(change):.1%} {'below' if change < 0 else 'above'} it"
            lines.append(f"unigram entropy of the held-out tokens: {unigram_entropy:.4f}; the loss is {side}")
        else:
            lines.append("unigram entropy of the held-out tokens: 0, since all target tokens are the same")
        if last.get("eval/bits_per_byte") is not None:
            lines.append(
                f"held-out bits per byte of target text: {last['eval/bits_per_byte']:.4f} (sentinels and end tokens "
                "cost bits, but are no bytes)"
            )
        else:
            lines.append(
                "held-out bits per byte of target text: not measured, since the held-out targets hold no byte of text "
                "(are most tokens unknown to the tokenizer? `prepare.py info` counts them)"
            )
        sets = {key.split("/")[1]: last[key] for key in last if re.fullmatch("eval/[^/]+/loss", key)}
        written = {name: "not finite" if loss is None else f"{loss:.4f}" for name, loss in sets.items()}
        if average := written.pop("ema", None):
            lines.append(f"held-out loss of the averaged weights (train.ema): {average}")
        if written:
            losses = [f"{name} {loss}" for name, loss in written.items()]
            lines.append(f"held-out loss of each validation set: {', '.join(losses)}")
        if last.get("eval/loss_shuffled_inputs") is not None and last["eval/loss"]:
            change = last["eval/loss_shuffled_inputs"] / last["eval/loss"] - 1
            lines.append(
                f"held-out loss with another sample's input: {last['eval/loss_shuffled_inputs']:.4f} ({change:+.1%}; "
                "near 0 % until the decoder reads the encoder)"
            )
    if state.best_value is not None:
        lines.append(f"best evaluation: {state.best_key} {state.best_value:.4f} at step {state.best_step}")
    if tokens_per_second:
        lines.append(f"speed: {tokens_per_second:,.0f} tokens/s")
    lines.append(f"run: {run_dir}")
    lines.append(f"look at it: {tensorboard_command(run_dir)}")
    return "\n".join(lines)
