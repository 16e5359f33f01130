"""How much text, and how many sentinels, the samples of a configuration need."""

from colt5dist.data.config import DataConfig
from colt5dist.data.order.mixture import lengths_of_mixture, parse_mixture, reserving_mixture

PUBLISHED_LENGTHS = (4096, 910)
"""Input and target length of CoLT5's pretraining (Ainslie et al. 2023, arXiv 2303.09752, section 4.1)."""


def text_tokens_of_sample(config: DataConfig) -> float:
    """Return the tokens of text that a full sample is made from, as the mean over the mixture (pairs: the most)."""
    weights = parse_mixture(config.mixture).weights
    lengths = lengths_of_mixture(config.mixture, config.input_length, config.target_length)
    return sum(w * length.raw_tokens for w, length in zip(weights, lengths, strict=True)) / sum(weights)


def required_sentinels(config: DataConfig) -> int:
    """Return the number of sentinel ids that the mixture needs, at the longest lengths of the length schedule.

    Pairs need none; it is the number of a model that is pretrained with these lengths and the default mixture.
    """
    return max(
        length.num_spans
        for stage in config.stages()
        for length in lengths_of_mixture(reserving_mixture(config.mixture), stage.input_length, stage.target_length)
    )


def length_notes(config: DataConfig) -> list[str]:
    """Return a line for every objective with fewer noise tokens because data.target_length is short.

    The trainer prints these lines at start.
    """
    notes = []
    objectives = parse_mixture(config.mixture).objectives
    lengths = lengths_of_mixture(config.mixture, config.input_length, config.target_length)
    for objective, length in zip(objectives, lengths, strict=True):
        if objective.is_next_token or objective.is_pair:
            continue
        if objective.mean_span is None:
            share = (1 + length.noise_tokens) / 2 / length.raw_tokens
        else:
            share = length.noise_tokens / length.raw_tokens
        if share >= 0.98 * objective.noise_rate:
            continue
        input_length, target_length = PUBLISHED_LENGTHS
        if (config.input_length, config.target_length) == PUBLISHED_LENGTHS:
            advice = "these are the CoLT5 paper's own lengths, and nothing needs to be changed"
        elif round(config.input_length * target_length / input_length) == config.target_length:
            advice = (
                f"{config.input_length}/{config.target_length} is the proportion of the CoLT5 paper's lengths "
                f"({input_length}/{target_length}), and nothing needs to be changed"
            )
        else:
            advice = "a larger data.target_length holds more"
        notes.append(
            f"{objective.name}: targets of at most {config.target_length} tokens hold on average {share:.1%} of its "
            f"text, not {objective.noise_rate:.0%}; {advice}"
        )
    return notes
