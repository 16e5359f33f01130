"""The settings of a run for TensorBoard's page "HParams", on which several runs are compared."""

from collections.abc import Mapping
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.summary_v2 import HParam, Metric, hparams_config_pb, hparams_pb

from colt5dist.train.report.tensorboard.tags import place

COMPARED = (
    "optimizer.name",
    "optimizer.lr",
    "optimizer.weight_decay",
    "schedule.name",
    "schedule.warmup_steps",
    "train.global_batch_size",
    "data.input_length",
    "data.target_length",
    "data.mixture",
    "model.architecture",
    "model.encoder",
    "model.routing",
    "model.num_heavy_tokens",
    "model.d_model",
    "model.num_encoder_layers",
    "model.num_decoder_layers",
    "parameters",
    "processes",
    "zero.stage",
    "train.precision",
    "seed",
)
"""Columns of the page, which shows the first five of the alphabet until others are ticked."""
METRICS = ("eval/loss", "loss", "eval/bits_per_byte", "tokens_per_second", "mfu", "grad_norm")
"""Numbers beside them, by their keys in metrics.jsonl; the page shows the last value of each."""


def hyperparameters(settings: Mapping[str, Any], trial: str) -> list[Summary]:
    """What TensorBoard needs to know of a run's settings.

    They lie in the events of the run itself, so there is no second run for them.

    Args:
        settings: value of each setting by its dotted key; of the others than those in COMPARED, none is shown.
        trial: what the page calls the run; the starts of a run have the same one, and other runs have others.
    """
    known = {key: _plain(settings[key]) for key in COMPARED if settings.get(key) is not None}
    columns = [HParam(key) for key in COMPARED]
    metrics = [Metric(place(key).tag, display_name=key, description=place(key).description) for key in METRICS]
    return [hparams_config_pb(columns, metrics), hparams_pb(known, trial_id=trial)]


def _plain(value: Any) -> bool | int | float | str:
    """A value as the page can show it: lists and mappings become text."""
    return value if isinstance(value, bool | int | float | str) else str(value)
