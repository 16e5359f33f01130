"""The few lines that a run ends with."""

from pathlib import Path

from colt5dist.errors import ConfigError
from colt5dist.train.checkpoint import TrainerState
from colt5dist.train.report.monitor import read_metrics


def summary(
    run_dir: Path,
    state: TrainerState,
    stopped: str | None,
    *,
    unigram_entropy: float,
    tokens_per_second: float | None,
) -> str:
    """Held-out loss before and after, speed, where the run lies, and how to look at it.

    Args:
        run_dir: the run's folder.
        state: where the run has ended, with the held-out loss before its first step.
        stopped: why before its last step; None if it is finished.
        unigram_entropy: entropy of the held-out target tokens' frequencies, nats: the loss of counting tokens alone.
        tokens_per_second: of this start; None if it trained no step.
    """
    try:
        records = read_metrics(run_dir)
    except ConfigError:  # the run has ended well all the same
        records = []
    evaluations = [r for r in records if r.get("eval/loss") is not None]
    first_loss = state.first_held_out_loss
    lines = [f"stopped at step {state.step} ({stopped})" if stopped else f"finished at step {state.step}"]
    if first_loss is not None and evaluations:
        last = evaluations[-1]
        change = last["eval/loss"] / unigram_entropy - 1
        side = f"{abs(change):.1%} {'below' if change < 0 else 'above'} it"
        lines.append(
            f"held-out loss: {first_loss:.4f} before, {last['eval/loss']:.4f} after step {last['step']} (nats a token)"
        )
        lines.append(f"unigram entropy of the held-out tokens: {unigram_entropy:.4f}; the loss is {side}")
        lines.append(
            f"held-out bits a byte of the text that is asked for: {last['eval/bits_per_byte']:.4f} (sentinels and end "
            "tokens cost bits, and are no bytes)"
        )
        if last.get("eval/loss_shuffled_inputs") is not None:
            change = last["eval/loss_shuffled_inputs"] / last["eval/loss"] - 1
            lines.append(
                f"held-out loss with another sample's input: {last['eval/loss_shuffled_inputs']:.4f} ({change:+.1%}; "
                "near 0 % until the decoder has learnt to read the encoder, after some thousand steps)"
            )
    if tokens_per_second:
        lines.append(f"speed: {tokens_per_second:,.0f} tokens/s")
    lines.append(f"run: {run_dir}")
    lines.append(f"look at it: tensorboard --logdir {run_dir / 'tensorboard'}")
    return "\n".join(lines)
