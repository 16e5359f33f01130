"""The settings under `data:`: which text is read, and how it becomes samples.

The text itself is compared by its fingerprint, so the fields that say where it lies keep the result.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from colt5dist.data.order.mixture import lengths_of_mixture, parse_mixture
from colt5dist.errors import ConfigError
from colt5dist.marks import keeps_result, of_a_host

MOST_WORKERS = 256
"""Largest number of reader processes per rank."""
CUT_SIDES = ("end", "beginning")
"""Sides on which an input of a pair may be cut."""
SMALLEST = {"input_length": 16, "target_length": 4}
"""Smallest lengths in tokens."""
SET_NAME = re.compile(r"[A-Za-z0-9_-]+")
"""How the name of a validation set may be written: it is a part of the names of metrics."""
NAMES_OF_METRICS = ("loss", "loss_shuffled_inputs", "bits_per_byte", "ema")
"""Names that metrics below eval/ have, so that no set can have them."""


@dataclass
class SourceConfig:
    """One of several shard sets."""

    shards: str = of_a_host("")
    """Folder, address, "python-stdlib" or "python-stdlib-pairs", like data.shards."""
    weight: float = 1.0
    """Share of the samples that come from it, relative to the other weights (above 0)."""
    name: str = keeps_result("")
    """With a name, its own held-out loss is measured too, as eval/NAME/loss (letters, digits, _, -)."""


@dataclass
class ValidationConfig:
    """One more set of held-out documents, whose loss is measured by itself."""

    name: str = keeps_result("")
    """Its name in the metrics: eval/NAME/loss (letters, digits, _, -)."""
    shards: str = of_a_host("")
    """Folder, address or "python-stdlib", like data.shards; its held-out documents are read."""


@dataclass
class LengthConfig:
    """Lengths from some step on; null keeps the value from the start of the run."""

    step: int = 0
    """First optimizer step with these lengths, 2 or more."""
    input_length: int | None = None
    """Replaces data.input_length (tokens)."""
    target_length: int | None = None
    """Replaces data.target_length (tokens)."""
    micro_batch_size: int | None = keeps_result(None)
    """Replaces train.micro_batch_size (samples per GPU)."""
    num_heavy_tokens: float | None = None
    """Replaces model.num_heavy_tokens."""


@dataclass
class DataConfig:
    """Which text is read and how it is cut into samples."""

    shards: str = of_a_host("python-stdlib")
    """Folder written by launch/prepare.py, its http(s)://, s3:// or gs:// address, or "python-stdlib": built from the
    running Python's own standard library. "python-stdlib-pairs" are questions on that, with their answers."""
    sources: list[SourceConfig] = keeps_result(factory=list)
    """Several shard sets, mixed by weight, instead of data.shards: [{shards: DIR, weight: 2}, ...]. All must have been
    made with the same tokenizer."""
    validation: list[ValidationConfig] = keeps_result(factory=list)
    """Further shard sets whose held-out documents are measured at each evaluation, each by itself:
    [{name: books, shards: DIR}, ...]. All must have been made with the tokenizer of the training text."""
    input_length: int = 4096
    """Tokens of an encoder input, end token included (16 or more; 0 with mixture causal, which has no input)."""
    target_length: int = 910
    """Largest number of tokens of a decoder target, end token included (4 or more)."""
    length_schedule: list[LengthConfig] = field(default_factory=list)
    """Other lengths from later steps on: [{step: 1000, input_length: 16384, micro_batch_size: 2}, ...]. The number of
    samples per global batch stays the same; each entry has its own order of the text."""
    num_workers: int = of_a_host(1)
    """Reader processes per rank, at most 256 (0: the training process reads by itself)."""
    mixture: Any = "colt5"
    """The objectives, a name or a list of names (colt5dist/data/order/mixture.py): colt5, ul2, causal, prefix_lm(rate),
    span_corruption(mean, rate); or pairs: inputs with their targets, from shards that hold pairs."""
    cut_inputs_at: str = "end"
    """With pairs, the side on which an input that is too long loses tokens: end or beginning."""
    num_sentinels: int | None = None
    """Sentinel ids reserved above the tokenizer's vocabulary (null: as many as the mixture needs)."""
    min_document_tokens: int = 0
    """Documents with fewer tokens are left out (0: none)."""
    skip: list[list[int]] = keeps_result(factory=list)
    """Ranges of sample numbers that training leaves out: [[a, b], ...] leaves out a to b - 1 (after a loss spike)."""
    max_bad_records: int = keeps_result(16)
    """Damaged records of the shards that are reported and replaced before the run stops (0: it stops at the first)."""
    cache_gb: float = of_a_host(100.0)
    """Disk space, in 10^9 bytes, for shards that are downloaded from an address; it should hold all data.sources that
    have an address. A larger set is not kept on disk: its members are downloaded one by one as they are needed."""

    @property
    def is_pairs(self) -> bool:
        """Whether the samples are inputs and targets that the shards hold."""
        return not self._mixture_problems() and parse_mixture(self.mixture).is_pairs

    @property
    def is_causal(self) -> bool:
        """Whether the samples are for a decoder-only model."""
        return not self._mixture_problems() and parse_mixture(self.mixture).is_causal

    def stages(self) -> list["DataConfig"]:
        """Return the settings of each stage: those at the start, then those from each entry of the schedule on.

        They have no length schedule of their own.
        """
        first = replace(self, length_schedule=[])
        return [first] + [
            replace(
                first,
                input_length=entry.input_length or self.input_length,
                target_length=entry.target_length or self.target_length,
            )
            for entry in self.length_schedule
        ]

    def problems(self) -> list[str]:
        """Return everything that is wrong with these settings, one line each, which begins with the key."""
        problems = self._mixture_problems()
        causal = self.is_causal
        if causal and (self.input_length or any(entry.input_length for entry in self.length_schedule)):
            problems.append(f"data.input_length: {self.input_length} is not used with data.mixture=causal; set 0")
        for key, smallest in (
            *SMALLEST.items(),
            ("num_workers", 0),
            ("min_document_tokens", 0),
            ("max_bad_records", 0),
        ):
            if getattr(self, key) < smallest and not (causal and key == "input_length"):
                problems.append(f"data.{key}: {getattr(self, key)} is too small; give {smallest} or more")
        if self.num_workers > MOST_WORKERS:
            problems.append(
                f"data.num_workers: {self.num_workers} processes per rank are too many; use {MOST_WORKERS} at most"
            )
        if not self.shards:
            problems.append("data.shards: is empty; give a folder written by launch/prepare.py, or python-stdlib")
        if not self.cache_gb > 0:
            problems.append(f"data.cache_gb: {self.cache_gb} is not positive; give a number of 10^9 bytes")
        if self.cut_inputs_at not in CUT_SIDES:
            problems.append(f"data.cut_inputs_at: {self.cut_inputs_at!r} is no side; use {' or '.join(CUT_SIDES)}")
        if self.is_pairs and self.min_document_tokens:
            problems.append(
                f"data.min_document_tokens: {self.min_document_tokens} is not used with data.mixture=pairs; set 0"
            )
        problems += [*self._source_problems(), *self._validation_problems()]
        problems += self._schedule_problems() + self._skip_problems()
        if problems or self.num_sentinels is None:
            return problems
        for stage in self.stages():
            lengths = lengths_of_mixture(self.mixture, stage.input_length, stage.target_length)
            needed = max(length.num_spans for length in lengths)
            if self.num_sentinels < needed:
                problems.append(
                    f"data.num_sentinels: {self.num_sentinels} are too few, the mixture {self.mixture} needs {needed} "
                    f"at data.input_length={stage.input_length}; raise it to {needed} or set null"
                )
        return problems

    def _mixture_problems(self) -> list[str]:
        if not isinstance(self.mixture, str | list):
            return [f"data.mixture: {self.mixture!r} is neither a name nor a list of names; give for instance colt5"]
        try:
            parse_mixture(self.mixture)
        except ConfigError as error:
            return str(error).splitlines()
        return []

    def _source_problems(self) -> list[str]:
        problems = []
        for number, source in enumerate(self.sources):
            if not source.shards:
                problems.append(f"data.sources[{number}].shards: is empty; give a folder written by launch/prepare.py")
            if not 0 < source.weight < float("inf"):
                problems.append(
                    f"data.sources[{number}].weight: {source.weight} is not positive; give a number above 0"
                )
        return problems

    def _validation_problems(self) -> Iterator[str]:
        named = [(f"data.sources[{number}].name", source.name) for number, source in enumerate(self.sources)]
        for number, entry in enumerate(self.validation):
            key = f"data.validation[{number}]"
            named.append((f"{key}.name", entry.name))
            if not entry.name:
                yield f"{key}.name: is empty; give a name, which the metrics have: eval/NAME/loss"
            if not entry.shards:
                yield f"{key}.shards: is empty; give a folder written by launch/prepare.py"
        names = {name: key for key, name in reversed(named)}
        for key, name in named:
            if name and not SET_NAME.fullmatch(name):
                yield f"{key}: {name!r} has other characters than letters, digits, _ and -; give another name"
            elif name in NAMES_OF_METRICS:
                yield f"{key}: {name} is the name of a metric, eval/{name}; give another name"
            elif name and names[name] != key:
                yield f"{key}: {name} is the name of {names[name].removesuffix('.name')}, too; give another name"

    def _schedule_problems(self) -> list[str]:
        problems = []
        last = 1
        for number, entry in enumerate(self.length_schedule):
            key = f"data.length_schedule[{number}]"
            if entry.step <= last:
                problems.append(f"{key}.step: {entry.step} is not after step {last}; give {last + 1} or more")
            last = max(last, entry.step)
            for name, smallest in (*SMALLEST.items(), ("micro_batch_size", 1)):
                value = getattr(entry, name)
                if value is not None and value < smallest:
                    problems.append(f"{key}.{name}: {value} is too small; give {smallest} or more")
        return problems

    def _skip_problems(self) -> list[str]:
        return [
            f"data.skip: {part} is not a range; give [first sample, sample after the last], for instance [12800, 13056]"
            for part in self.skip
            if len(part) != 2 or not 0 <= part[0] < part[1] < 2**62
        ]
