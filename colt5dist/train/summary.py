"""The few lines that a run ends with."""

import json
from pathlib import Path

from colt5dist.train.monitor import read_metrics


def summary(run_dir: Path, first_loss: float | None, unigram_entropy: float, tokens_per_second: float | None) -> str:
    """Held-out loss before and after, speed, where the run lies, and how to look at it.

    Args:
        run_dir: the run's folder.
        first_loss: held-out loss before the first step, nats a token.
        unigram_entropy: entropy of the held-out target tokens' frequencies, nats: the loss of counting tokens alone.
        tokens_per_second: of this start; None if it trained no step.
    """
    records = read_metrics(run_dir)
    evaluations = [r for r in records if r.get("eval/loss") is not None]
    status = json.loads((run_dir / "status.json").read_text())
    lines = [f"{status['status']} at step {status['step']}" + (f" ({status['reason']})" if "reason" in status else "")]
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
