"""The keys of an evaluation's record that a run can choose its best checkpoint by, and which way each is better."""

from typing import Any

from colt5dist.data.order.mixture import parse_mixture

TEXT_KEYS = (
    "eval/rouge1",
    "eval/rouge2",
    "eval/rougeL",
    "eval/rouge_geometric_mean",
    "eval/f1",
    "eval/exact_match",
)
"""Scores of generated texts, from colt5dist/pretrained/metrics.py."""
DEFAULT_KEY = "eval/loss"
"""What an early stop looks at where no other key is chosen."""


def evaluation_keys(config: Any) -> list[str]:
    """Keys that every evaluation of a run has.

    Args:
        config: the `RunConfig`.
    """
    objectives = parse_mixture(config.data.mixture).names
    measured = ["loss", "bits_per_byte"]
    if config.train.eval_samples >= len(objectives):  # they take turns
        measured += [f"loss/{name}" for name in objectives]
    sets = [entry.name for entry in (*config.data.validation, *config.data.sources) if entry.name]
    keys = [f"{prefix}/{name}" for prefix in ("eval", *(f"eval/{name}" for name in sets)) for name in measured]
    if config.train.eval_shuffled_inputs:
        keys.append("eval/loss_shuffled_inputs")
    if config.train.ema:
        keys.append("eval/ema/loss")
    return [*keys, *(TEXT_KEYS if config.train.eval_generate_samples else ())]


def smaller_is_better(key: str) -> bool:
    """Whether a smaller value of an evaluation's key is better: of losses and bits, not of the scores of texts."""
    return key not in TEXT_KEYS


def best_key(config: Any) -> str | None:
    """The key by which a run judges its evaluations; None where nothing depends on it.

    Args:
        config: the `RunConfig`.
    """
    if config.checkpoint.keep_best is not None:
        return str(config.checkpoint.keep_best)
    return DEFAULT_KEY if config.train.early_stopping_patience is not None else None


def evaluation_problems(config: Any) -> list[str]:
    """What is wrong with the settings of evaluations by generated texts, and with what depends on evaluations.

    Args:
        config: the `RunConfig`, whose sections are right by themselves.

    Returns:
        One line per problem.
    """
    found = []
    if config.train.eval_generate_samples:
        key = "train.eval_generate_samples"
        if not config.data.is_pairs:
            found.append(f"{key}: only pairs have answers to generate, not data.mixture={config.data.mixture}; set 0")
    chosen = config.checkpoint.keep_best
    if chosen is not None and chosen not in (known := evaluation_keys(config)):
        found.append(f"checkpoint.keep_best: no evaluation of this run has {chosen!r}; use one of {', '.join(known)}")
    return found
