"""Sums of losses and tokens over the global batch: the loss's divisor, and the figures that are reported."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from colt5dist.data.read.batch import Batch
from colt5dist.model.colt5 import CoLT5Output
from colt5dist.train.ranks import sum_over_ranks


class LossSums:
    """Sums token losses by objective over micro-batches, and then over ranks.

    All sums are in one float64 tensor on the device, so that they need one collective and one host read. Layout: losses
    by objective, tokens by objective, z-losses, input tokens, bytes of target text.

    Args:
        objectives: names of the objectives, in the order of `batch["objective"]`.
        device: device of this rank.

    Attributes:
        sample_losses: loss of each sample of this rank, one (batch,) float64 tensor per micro-batch.
    """

    def __init__(self, objectives: tuple[str, ...], device: torch.device) -> None:
        self.objectives = objectives
        self._sums = torch.zeros(2 * len(objectives) + 3, dtype=torch.float64, device=device)
        self.sample_losses: list[torch.Tensor] = []

    def add(self, batch: Batch, output: CoLT5Output) -> None:
        """Add one micro-batch.

        Args:
            batch: the micro-batch, on the device.
            output: the model's output for it.
        """
        num = len(self.objectives)
        kinds = torch.nn.functional.one_hot(batch["objective"].clamp(min=0), num).to(
            torch.float64
        )  # (batch, objectives)
        sample_loss = output.token_loss.detach().double().sum(dim=1)
        self.sample_losses.append(sample_loss)
        self._sums[:num] += kinds.T @ sample_loss
        self._sums[num : 2 * num] += kinds.T @ batch["target_mask"].sum(dim=1).double()
        self._sums[2 * num] += output.z_loss.detach().double().sum()
        self._sums[2 * num + 1] += batch["input_mask"].sum()
        self._sums[2 * num + 2] += batch["target_bytes"].sum()

    def read(self, extra: Sequence[float] = (), on_device: Sequence[torch.Tensor] = ()) -> "LossMeans":
        """Sum over ranks, together with numbers of the caller, and read the result on the host; collective.

        Args:
            extra: further numbers to sum, on the host.
            on_device: further (k,) float64 tensors to sum, on the device; their sums follow those of `extra`.

        Returns:
            Means and sums over the global batch, the same on all ranks.
        """
        others = numbers_on_device(extra, torch.float64, self._sums.device)
        values = sum_over_ranks(torch.cat([self._sums, others, *on_device])).tolist()
        num = len(self.objectives)
        losses, tokens = values[:num], values[num : 2 * num]
        return LossMeans(
            loss=_ratio(sum(losses), sum(tokens)),
            by_objective={
                name: _ratio(loss, count)
                for name, loss, count in zip(self.objectives, losses, tokens, strict=True)
                if count
            },
            z_loss=_ratio(values[2 * num], sum(tokens)),
            loss_sum=sum(losses),
            input_tokens=int(values[2 * num + 1]),
            target_tokens=int(sum(tokens)),
            target_bytes=int(values[2 * num + 2]),
            extra=tuple(values[2 * num + 3 :]),
        )


@dataclass(frozen=True, kw_only=True)
class LossMeans:
    """Losses of a global batch on the host, in nats per valid target token."""

    loss: float
    """Mean loss."""
    by_objective: dict[str, float]
    """Mean loss of each objective that occurs in the batch."""
    z_loss: float
    """Mean squared log-normaliser of the output softmax."""
    loss_sum: float
    """Sum of the losses of all target tokens, in nats."""
    input_tokens: int
    """Number of valid input tokens."""
    target_tokens: int
    """Number of valid target tokens."""
    target_bytes: int
    """Bytes of text in the targets."""
    extra: tuple[float, ...]
    """Sums over ranks of the caller's own numbers."""

    @property
    def is_finite(self) -> bool:
        """Whether every loss of the batch is finite."""
        return math.isfinite(self.loss_sum) and math.isfinite(self.z_loss)


def training_loss(output: CoLT5Output, num_targets: torch.Tensor, z_loss: float) -> torch.Tensor:
    """A micro-batch's share of the loss of the global batch.

    Args:
        output: the model's output for the micro-batch.
        num_targets: number of valid target tokens of the whole global batch, a scalar.
        z_loss: weight of the squared log-normaliser.

    Returns:
        A scalar; the shares of all micro-batches and ranks add up to the loss.
    """
    return (output.token_loss.sum() + z_loss * output.z_loss.sum()) / num_targets


def count_target_tokens(batches: list[Batch], device: torch.device) -> torch.Tensor:
    """Count the valid target tokens of the whole global batch, without a host read; collective.

    Args:
        batches: this rank's micro-batches.
        device: device of this rank.

    Returns:
        A float32 scalar on the device.
    """
    count = sum(int(batch["target_mask"].sum()) for batch in batches)
    return sum_over_ranks(numbers_on_device([float(count)], torch.float32, device)).squeeze(0)


def numbers_on_device(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers of the host as a tensor on the device, without waiting for the device."""
    tensor = torch.tensor(numbers, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _ratio(total: float, count: float) -> float:
    return total / count if count else float("nan")
