"""The held-out loss: the same samples at every evaluation and for any number of ranks."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from colt5dist.data.read.batch import Batch
from colt5dist.train.engine.engine import Engine
from colt5dist.train.engine.micro_batch_graph import to_device
from colt5dist.train.losses import LossMeans, LossSums
from colt5dist.train.report.monitor import Record


class CutShortError(Exception):
    """An evaluation was not finished, on any rank, because a stop was requested."""


@dataclass(frozen=True)
class HeldOut:
    """This rank's part of the held-out samples, as many micro-batches as every other rank has."""

    batches: list[Batch]
    with_other_inputs: list[Batch] | None
    """The same targets, each with the input of the sample before it; None where that is not measured."""
    sets: Mapping[str, list[Batch]] = field(default_factory=dict)
    """The same of further held-out text, by the name of the set."""


def evaluate(
    engine: Engine,
    held_out: HeldOut,
    objectives: tuple[str, ...],
    *,
    shuffled_inputs: bool = False,
    stop_wanted: Callable[[], bool] = lambda: False,
) -> Record:
    """Measure the mean held-out loss; collective.

    Args:
        engine: the engine; the model is in training mode again afterwards.
        held_out: the samples; every rank calls this with its part.
        objectives: names of the objectives, in the order of `batch["objective"]`.
        shuffled_inputs: also measure with each sample given its neighbour's input: the loss of a decoder that reads
            another document's encoder output. It is far above the loss once the decoder has learnt to read its input.
        stop_wanted: called before each batch; must return the same on all ranks.

    Returns:
        The loss in nats per token, in all and by objective, and in bits per byte of the target text: `eval/...` of the
        held-out samples, and `eval/NAME/...` of each further set; and `eval/ema/loss` of the averaged weights
        (`train.ema`), once they have taken in a step.

    Raises:
        CutShortError: on all ranks, if `stop_wanted` returns True.
    """
    record: Record = {}
    parts = {"eval": held_out.batches, **{f"eval/{name}": part for name, part in held_out.sets.items()}}
    for prefix, batches in parts.items():
        means = _measure(engine, batches, objectives, stop_wanted)
        record[f"{prefix}/loss"] = means.loss
        record.update({f"{prefix}/loss/{name}": loss for name, loss in means.by_objective.items()})
        bits = means.loss_sum / math.log(2)
        record[f"{prefix}/bits_per_byte"] = bits / means.target_bytes if means.target_bytes else None
    if shuffled_inputs and held_out.with_other_inputs is not None:
        others = held_out.with_other_inputs
        record["eval/loss_shuffled_inputs"] = _measure(engine, others, objectives, stop_wanted).loss
    if engine.average is not None and engine.average.num_updates:
        with engine.averaged_weights():
            record["eval/ema/loss"] = _measure(engine, held_out.batches, objectives, stop_wanted).loss
    return record


def _measure(
    engine: Engine, batches: list[Batch], objectives: tuple[str, ...], stop_wanted: Callable[[], bool]
) -> LossMeans:
    sums = LossSums(objectives, engine.device)
    engine.train(False)
    try:
        with torch.no_grad():
            for batch in batches:
                if stop_wanted():
                    raise CutShortError
                on_device = to_device(batch, engine.device)
                sums.add(on_device, engine.forward(on_device))
    finally:
        engine.train(True)
    return sums.read()
