"""Mixtures of objectives: their names in a configuration, and the lengths that they need.

`data.mixture` is a name or a list of names. Every entry gets an equal share of the samples; an entry that is listed
twice counts twice. A name is

- `colt5`: prefix-LM at rate 0.5 and noise spans of mean length 3, 8 and 64 at rate 0.15 (Ainslie et al. 2023, arXiv
  2303.09752, section 4.1), four entries;
- `ul2`: the seven of UL2 (Tay et al. 2022, arXiv 2205.05131, figure 2) with their mode tokens, in equal parts: R: mean
  3 and 8 at 0.15; X: mean 3, 8, 64 at 0.5 and 64 at 0.15; S: prefix-LM at rate 0.25;
- `span_corruption(mean, rate)`, `prefix_lm` or `prefix_lm(rate)`: one entry;
- `causal`: next-token prediction, one entry. If it is the only entry, data.input_length is 0;
- `pairs`: inputs with their targets as they are in the shards; it is the only entry.

The ids above the tokenizer's are the mode tokens R, S, X, if the mixture has any, then the sentinels. A model that is
trained on pairs keeps those that it has: `reserving_mixture`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from colt5dist.data.order.objectives import MODES, Objective, SampleLengths, sample_lengths
from colt5dist.errors import ConfigError


@dataclass(frozen=True)
class Mixture:
    """The objectives that share the samples."""

    objectives: tuple[Objective, ...]
    """The objectives, each once."""
    weights: tuple[int, ...]
    """Share of the samples that each objective gets, as a number of equal parts."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the objectives; the `objective` of a batch is an index into them."""
        return tuple(objective.name for objective in self.objectives)

    @property
    def is_causal(self) -> bool:
        """Whether there is no encoder input, which is for decoder-only models."""
        return all(objective.is_next_token for objective in self.objectives)

    @property
    def is_pairs(self) -> bool:
        """Whether the samples are inputs and targets that the shards hold."""
        return any(objective.is_pair for objective in self.objectives)

    @property
    def num_modes(self) -> int:
        """Number of ids that are reserved for mode tokens."""
        return len(MODES) if any(objective.mode for objective in self.objectives) else 0


def span_corruption(mean_span: float, rate: float, mode: str | None = None) -> Objective:
    """Return a span-corruption objective; its name contains the rate unless it is 0.15.

    Args:
        mean_span: mean tokens per noise span.
        rate: share of the raw tokens that are noise.
        mode: its mode token, one of MODES, or None.
    """
    name = f"span_{mean_span:g}" + ("" if rate == 0.15 else f"_rate_{rate:g}")
    return Objective(f"{mode.lower()}_{name}" if mode else name, rate, mean_span, mode)


def prefix_lm(rate: float, mode: str | None = None) -> Objective:
    """Return a prefix-LM objective; its name contains the rate unless it is 0.5.

    Args:
        rate: mean share of the text that is the suffix.
        mode: its mode token, one of MODES, or None.
    """
    name = "prefix_lm" + ("" if rate == 0.5 else f"_rate_{rate:g}")
    return Objective(f"{mode.lower()}_{name}" if mode else name, rate, None, mode)


MIXTURES: dict[str, tuple[Objective, ...]] = {
    "colt5": (prefix_lm(0.5), span_corruption(3, 0.15), span_corruption(8, 0.15), span_corruption(64, 0.15)),
    "ul2": (
        span_corruption(3, 0.15, "R"),
        span_corruption(8, 0.15, "R"),
        span_corruption(3, 0.5, "X"),
        span_corruption(8, 0.5, "X"),
        span_corruption(64, 0.15, "X"),
        span_corruption(64, 0.5, "X"),
        prefix_lm(0.25, "S"),
    ),
    "causal": (Objective("next_token", 1.0, None),),
}
"""Names without settings, and their objectives."""

PAIRS = "pairs"
"""The mixture that reads inputs and targets from shards of pairs."""
DEFAULT = "colt5"

FORMS = f"{', '.join(MIXTURES)}, prefix_lm, prefix_lm(rate), span_corruption(mean, rate), {PAIRS}"
MIXTURE_TYPE = str | Sequence[str]


def parse_mixture(mixture: MIXTURE_TYPE) -> Mixture:
    """Return the mixture that a value of data.mixture names.

    Raises:
        ConfigError: an entry is unknown or has wrong settings; one line for every such entry.
    """
    entries = (mixture,) if isinstance(mixture, str) else tuple(map(str, mixture))
    return _parse_entries(entries)


@lru_cache(maxsize=64)
def _parse_entries(entries: tuple[str, ...]) -> Mixture:
    if not entries:
        raise ConfigError(f"data.mixture: is empty; give some of {FORMS}")
    if PAIRS in entries:
        if len(entries) > 1:
            raise ConfigError(f"data.mixture: {PAIRS} cannot be mixed with other entries; give it alone")
        return Mixture((Objective(PAIRS, 0.0, None),), (1,))
    counts: dict[Objective, int] = {}
    problems = []
    for entry in entries:
        try:
            for objective in _parse_entry(entry):
                counts[objective] = counts.get(objective, 0) + 1
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return Mixture(tuple(counts), tuple(counts.values()))


def _parse_entry(entry: str) -> tuple[Objective, ...]:
    if entry in MIXTURES:
        return MIXTURES[entry]
    form = re.fullmatch(r"\s*(prefix_lm|span_corruption)\s*(?:\((.*)\))?\s*", entry)
    if form is None:
        quote = "; on the command line an entry with a comma needs quotes" if "(" in entry or ")" in entry else ""
        raise ConfigError(f"data.mixture: {entry!r} is unknown; choose some of {FORMS}{quote}")
    kind, inside = form.groups()
    try:
        numbers = [float(number) for number in inside.split(",")] if inside else []
    except ValueError:
        raise ConfigError(f"data.mixture: {entry!r} needs numbers in the brackets; write {FORMS}") from None
    if kind == "prefix_lm" and len(numbers) <= 1:
        (rate,) = numbers or [0.5]
        if 0 < rate <= 0.5:
            return (prefix_lm(rate),)
        raise ConfigError(
            f"data.mixture: {entry!r}: the rate (mean share of the suffix) must be above 0 and at most 0.5"
        )
    if kind == "span_corruption" and len(numbers) == 2:
        mean_span, rate = numbers
        if 1 <= mean_span <= 1 << 20 and 0 < rate <= 0.9:
            return (span_corruption(mean_span, rate),)
        raise ConfigError(f"data.mixture: {entry!r}: give a mean of 1 or more and a rate above 0 and at most 0.9")
    raise ConfigError(f"data.mixture: {entry!r} has the wrong number of settings; write {FORMS}")


def reserving_mixture(mixture: MIXTURE_TYPE) -> MIXTURE_TYPE:
    """Return the mixture that decides which ids above the tokenizer's are reserved.

    It is the mixture itself. With pairs it is the default one, so that a model has the same ids as one that is
    pretrained with the same lengths.
    """
    return DEFAULT if parse_mixture(mixture).is_pairs else mixture


def lengths_of_mixture(mixture: MIXTURE_TYPE, input_length: int, target_length: int) -> tuple[SampleLengths, ...]:
    """Return the lengths of a full sample of every objective, in the order of the mixture.

    Args:
        mixture: a value of data.mixture.
        input_length: tokens of an encoder input (data.input_length).
        target_length: most tokens of a decoder target (data.target_length).
    """
    objectives = parse_mixture(mixture).objectives
    return tuple(sample_lengths(objective, input_length, target_length) for objective in objectives)
