"""Sums over the global batch: what the loss is divided by, and what is reported of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from colt5dist.data.read.batch import Batch
from colt5dist.model.colt5 import CoLT5Output
from colt5dist.train.ranks import sum_over_ranks


class LossSums:
    """Adds up token losses by objective over micro-batches, and then over ranks.

    All numbers live in one float64 tensor on the device, so that they need one collective and one host read. Layout:
    losses by objective, tokens by objective, z-losses, input tokens, bytes of target text.
    """

    def __init__(self, objectives: tuple[str, ...], device: torch.device) -> None:
        self.objectives = objectives
        self._sums = torch.zeros(2 * len(objectives) + 3, dtype=torch.float64, device=device)
        self.sample_losses: list[torch.Tensor] = []
        """Loss of each sample, (batch,) float64 a micro-batch; this rank's own."""

    def add(self, batch: Batch, output: CoLT5Output) -> None:
        """Count one micro-batch."""
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
        """Add up over ranks, with numbers of the caller, and read on the host; all ranks get the same.

        Args:
            extra: numbers of the host.
            on_device: (k,) float64 tensors of the device; their numbers come after `extra`.
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
    by_objective: dict[str, float]
    z_loss: float
    loss_sum: float
    input_tokens: int
    target_tokens: int
    target_bytes: int
    extra: tuple[float, ...]
    """Sums over ranks of the caller's own numbers."""

    @property
    def is_finite(self) -> bool:
        """Whether every loss of the batch is finite."""
        return math.isfinite(self.loss_sum) and math.isfinite(self.z_loss)


def training_loss(output: CoLT5Output, num_targets: torch.Tensor, z_loss: float) -> torch.Tensor:
    """A micro-batch's share of the global batch's loss, which has `num_targets` valid target tokens in all."""
    return (output.token_loss.sum() + z_loss * output.z_loss.sum()) / num_targets


def count_target_tokens(batches: list[Batch], device: torch.device) -> torch.Tensor:
    """Valid target tokens of the whole global batch, a float32 scalar on the device, without a host read."""
    count = sum(int(batch["target_mask"].sum()) for batch in batches)
    return sum_over_ranks(numbers_on_device([float(count)], torch.float32, device)).squeeze(0)


def numbers_on_device(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers of the host as a tensor on the device, without waiting for the device."""
    tensor = torch.tensor(numbers, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _ratio(total: float, count: float) -> float:
    return total / count if count else float("nan")
