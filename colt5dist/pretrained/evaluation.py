"""The held-out loss of a trained model on any shard set: in all, and by objective, document and position.

The samples are those of the trainer's own evaluations, so on the shards of the run the loss is its `eval/loss`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from colt5dist.data import Batch, DataConfig, Sources, data_problems, held_out_batches, parse_mixture
from colt5dist.data.read.held_out import held_out_samples
from colt5dist.errors import ConfigError
from colt5dist.model.causal_colt5 import CausalCoLT5
from colt5dist.model.colt5 import CoLT5, CoLT5Output
from colt5dist.pretrained.processes import sum_over_processes

EDGES = tuple(256 * 4**power for power in range(6))
"""Bounds, in tokens, between the classes of document lengths and of positions in a document."""
CLASSES = tuple(
    f"{low}-{high - 1}" if high else f"{low}-" for low, high in zip((0, *EDGES), (*EDGES, None), strict=True)
)
"""Names of these classes: the smallest and the largest number of tokens."""


@dataclass(frozen=True)
class Part:
    """The loss of some of the target tokens."""

    loss_sum: float
    """Sum of their losses, in nats."""
    num_target_tokens: int
    """How many they are."""

    @property
    def loss(self) -> float | None:
        """Mean loss in nats; None where there is no token."""
        return self.loss_sum / self.num_target_tokens if self.num_target_tokens else None

    def __add__(self, other: "Part") -> "Part":
        return Part(self.loss_sum + other.loss_sum, self.num_target_tokens + other.num_target_tokens)

    def as_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"loss": self.loss, "num_target_tokens": self.num_target_tokens}


@dataclass(frozen=True, kw_only=True)
class HeldOutLoss:
    """The loss on held-out samples, the same in all processes."""

    total: Part
    """All target tokens, sentinels and end tokens included."""
    by_objective: dict[str, Part]
    """By the name of the objective."""
    by_document_length: dict[str, Part]
    """By the length in tokens of the document that the target token is from."""
    by_position_in_document: dict[str, Part]
    """By the target token's position in its document."""
    shuffled_inputs: Part
    """The same targets, each with the input of the sample before it; no tokens for a decoder-only model."""
    target_bytes: int
    """Bytes of text in the targets."""
    num_samples: int
    """Number of samples."""

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of target text."""
        return self.total.loss_sum / math.log(2) / self.target_bytes if self.target_bytes else None

    def __add__(self, other: "HeldOutLoss") -> "HeldOutLoss":
        sums: dict[str, Any] = {}
        for field in fields(self):
            mine, others = getattr(self, field.name), getattr(other, field.name)
            if isinstance(mine, dict):
                keys = dict.fromkeys((*mine, *others))
                sums[field.name] = {key: mine.get(key, Part(0, 0)) + others.get(key, Part(0, 0)) for key in keys}
            else:
                sums[field.name] = mine + others
        return HeldOutLoss(**sums)

    def as_json(self) -> dict[str, Any]:
        """As `launch/evaluate.py --json` prints it; parts without a token are left out."""

        def parts(of: dict[str, Part]) -> dict[str, Any]:
            return {name: part.as_json() for name, part in of.items() if part.num_target_tokens}

        return {
            "loss": self.total.loss,
            "bits_per_byte": self.bits_per_byte,
            "num_target_tokens": self.total.num_target_tokens,
            "num_samples": self.num_samples,
            "target_bytes": self.target_bytes,
            "loss_shuffled_inputs": self.shuffled_inputs.loss,
            "by_objective": parts(self.by_objective),
            "by_document_length": parts(self.by_document_length),
            "by_position_in_document": parts(self.by_position_in_document),
        }


def data_config(settings: dict[str, Any], where: str) -> DataConfig:
    """The section `data` of a trained model's settings.

    Args:
        settings: the section.
        where: file or folder that it is from, for messages.

    Raises:
        ConfigError: it has keys that this version does not know, or wrong values.
    """
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), settings))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: data: {str(error).splitlines()[0]}; use the version that trained it") from None
    assert isinstance(config, DataConfig)
    problems = config.problems()
    if problems:
        raise ConfigError(f"{where}: {problems[0]}")
    return config


def evaluate(
    model: CoLT5 | CausalCoLT5,
    shards: Sources,
    config: DataConfig,
    *,
    num_samples: int,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> HeldOutLoss:
    """Measure the loss on the held-out documents of shard sets; collective.

    Args:
        model: the model, in evaluation mode.
        shards: the shard sets.
        config: lengths and mixture.
        num_samples: samples of all processes together.
        micro_batch_size: samples that a process handles at once.
        rank: number of this process.
        world_size: number of processes, which are joined where there are several.

    Raises:
        ConfigError: settings, shards and model do not fit together, or the shards cannot be read.
    """
    problems = data_problems(config, shards, model.config.vocab_size)
    if problems:
        raise ConfigError("\n".join(problems))
    objectives = parse_mixture(config.mixture).names
    samples = held_out_samples(shards, config)
    sums = _Sums(len(objectives))
    for others in (False, True)[: 1 if config.is_causal else 2]:
        batches = held_out_batches(
            shards,
            config,
            num_samples=num_samples,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
            inputs_of_previous=others,
        )
        for batch in batches:
            losses = token_losses(model, batch)
            if others:
                sums.shuffled += (losses.sum(), int(batch["target_mask"].sum()))
                continue
            for row, number in enumerate(batch["sample_index"].tolist()):
                if number >= 0:
                    mask = batch["target_mask"][row].numpy()
                    places = samples.target_places(number)
                    sums.add(losses[row][mask], int(batch["objective"][row]), places, int(batch["target_bytes"][row]))
    return sums.read(objectives, next(model.parameters()).device)


def token_losses(model: CoLT5 | CausalCoLT5, batch: Batch) -> NDArray[np.float64]:
    """Loss of every target token of a micro-batch, (b, t), in nats; 0 where masked."""
    return run_batch(model, batch).token_loss.double().cpu().numpy()


def run_batch(model: CoLT5 | CausalCoLT5, batch: Batch, *, collect_routing: bool = False) -> CoLT5Output:
    """A trained model's output for a micro-batch, which is copied to the model's device."""
    device = next(model.parameters()).device
    with torch.no_grad():
        return model(
            batch["input_ids"].to(device),
            batch["decoder_input_ids"].to(device),
            batch["target_ids"].to(device),
            input_mask=batch["input_mask"].to(device),
            target_mask=batch["target_mask"].to(device),
            sample_index=batch["sample_index"].to(device),
            collect_routing=collect_routing,
        )


class _Sums:
    """Sums of this process, which `read` adds up over all of them."""

    def __init__(self, num_objectives: int) -> None:
        self.by_objective = np.zeros((num_objectives, 2))
        self.by_length = np.zeros((len(CLASSES), 2))
        self.by_position = np.zeros((len(CLASSES), 2))
        self.shuffled = np.zeros(2)
        self.counts = np.zeros(2)

    def add(
        self,
        losses: NDArray[np.float64],
        objective: int,
        places: tuple[NDArray[np.int64], NDArray[np.int64]],
        num_bytes: int,
    ) -> None:
        """Add a sample: its (tokens,) losses, and of each token the document's length and the position in it."""
        self.by_objective[objective] += (losses.sum(), len(losses))
        for sums, values in zip((self.by_length, self.by_position), places, strict=True):
            number = np.searchsorted(EDGES, values, side="right")
            sums[:, 0] += np.bincount(number, weights=losses, minlength=len(CLASSES))
            sums[:, 1] += np.bincount(number, minlength=len(CLASSES))
        self.counts += (num_bytes, 1)

    def read(self, objectives: Sequence[str], device: torch.device) -> HeldOutLoss:
        """Sum over all processes; collective."""
        arrays = (self.by_objective, self.by_length, self.by_position, self.shuffled, self.counts)
        flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays])).to(device)
        values = sum_over_processes(flat).cpu().numpy()
        ends = np.cumsum([array.size for array in arrays])[:-1]
        by_objective, by_length, by_position, shuffled, counts = np.split(values, ends)

        def parts(names: Sequence[str], sums: NDArray[np.float64]) -> dict[str, Part]:
            rows = sums.reshape(-1, 2).tolist()
            return {name: Part(loss, int(number)) for name, (loss, number) in zip(names, rows, strict=True)}

        named = parts(objectives, by_objective)
        return HeldOutLoss(
            total=sum(named.values(), Part(0.0, 0)),
            by_objective=named,
            by_document_length=parts(CLASSES, by_length),
            by_position_in_document=parts(CLASSES, by_position),
            shuffled_inputs=parts(("all",), shuffled)["all"],
            target_bytes=int(counts[0]),
            num_samples=int(counts[1]),
        )
