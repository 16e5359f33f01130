"""Mixtures of objectives: how a configuration names them, and what a mixture needs.

`data.mixture` is a name or a list of names; the samples are divided among the entries in equal parts, and an entry that
stands there twice counts twice. A name is

- `colt5`: prefix-LM at rate 0.5 and noise spans of mean length 3, 8 and 64 at rate 0.15 (Ainslie et al. 2023, arXiv
  2303.09752, section 4.1), four entries;
- `ul2`: the seven of UL2 (Tay et al. 2022, arXiv 2205.05131, figure 2) with their mode tokens, in equal parts: R: mean
  3 and 8 at 0.15; X: mean 3, 8, 64 at 0.5 and 64 at 0.15; S: prefix-LM at rate 0.25;
- `span_corruption(mean, rate)`, `prefix_lm` or `prefix_lm(rate)`: one entry;
- `causal`: next-token prediction, one entry. With nothing else beside it data.input_length is 0.

Ids above the tokenizer's: the mode tokens R, S, X, if the mixture has any, then the sentinels.
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
    """Each once."""
    weights: tuple[int, ...]
    """Parts of the samples that each gets."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the objectives, in the order of a batch's `objective`."""
        return tuple(objective.name for objective in self.objectives)

    @property
    def is_causal(self) -> bool:
        """Whether nothing is read by an encoder: for decoder-only models."""
        return all(objective.is_next_token for objective in self.objectives)

    @property
    def num_modes(self) -> int:
        """Ids of mode tokens."""
        return len(MODES) if any(objective.mode for objective in self.objectives) else 0


def span_corruption(mean_span: float, rate: float, mode: str | None = None) -> Objective:
    """Noise spans of a mean length; at the usual rate the name does not say it."""
    name = f"span_{mean_span:g}" + ("" if rate == 0.15 else f"_rate_{rate:g}")
    return Objective(f"{mode.lower()}_{name}" if mode else name, rate, mean_span, mode)


def prefix_lm(rate: float, mode: str | None = None) -> Objective:
    """The end of the text, as much as `rate` of it in the mean."""
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
"""What stands for several objectives, or for one without settings."""

FORMS = f"{', '.join(MIXTURES)}, prefix_lm, prefix_lm(rate), span_corruption(mean, rate)"
MIXTURE_TYPE = str | Sequence[str]


def parse_mixture(mixture: MIXTURE_TYPE) -> Mixture:
    """The mixture that data.mixture names.

    Raises:
        ConfigError: one line for every entry that names none.
    """
    entries = (mixture,) if isinstance(mixture, str) else tuple(map(str, mixture))
    return _parse_entries(entries)


@lru_cache(maxsize=64)
def _parse_entries(entries: tuple[str, ...]) -> Mixture:
    if not entries:
        raise ConfigError(f"data.mixture: is empty; name some of {FORMS}")
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
        raise ConfigError(f"data.mixture: {entry!r}: the rate must be above 0 and at most 0.5, as the mean suffix")
    if kind == "span_corruption" and len(numbers) == 2:
        mean_span, rate = numbers
        if 1 <= mean_span <= 1 << 20 and 0 < rate <= 0.9:
            return (span_corruption(mean_span, rate),)
        raise ConfigError(f"data.mixture: {entry!r}: give a mean of 1 or more and a rate above 0 and at most 0.9")
    raise ConfigError(f"data.mixture: {entry!r} has another number of settings; write {FORMS}")


def lengths_of_mixture(mixture: MIXTURE_TYPE, input_length: int, target_length: int) -> tuple[SampleLengths, ...]:
    """Lengths of a full sample of every objective of a mixture, in the mixture's order."""
    objectives = parse_mixture(mixture).objectives
    return tuple(sample_lengths(objective, input_length, target_length) for objective in objectives)
