"""How text is written: the arguments of `generate`, checked."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from colt5dist.ops.checks import check_counts, check_optional_counts, check_whole, is_number, not_a_number
from colt5dist.ops.counter_random import counter_uniform


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Arguments of `generate`.

    Args:
        max_new_tokens: most tokens that are written, the end token included.
        temperature: 0: the likeliest token each time; above 0: drawn from softmax(logits / temperature).
        top_k: only the k likeliest tokens are drawn; None: all.
        top_p: only the likeliest tokens whose probabilities, after top_k, first reach this sum are drawn; None: all.
        num_beams: beams of a beam search; 1: none.
        length_penalty: a finished beam's score is the sum of its log-probabilities over length ** length_penalty.
        num_return_sequences: sequences for each sample: drawn independently, or the best beams.
        seed: of the draws; None: from PyTorch's default generator.
        pad_id: fills a row after its end token, and is what the decoder of a CoLT5 starts with.
        eos_id: the end token; None: there is none, and max_new_tokens are written.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    num_return_sequences: int = 1
    seed: int | None = None
    pad_id: int = 0
    eos_id: int | None = 1

    def check(self, vocab_size: int) -> None:
        """Raise for a wrong argument.

        Raises:
            TypeError: an argument has the wrong type, such as a string for a number.
            ValueError: an argument has a wrong value, or does not fit another one; the message says what to use.
        """
        check_counts(
            max_new_tokens=self.max_new_tokens,
            num_beams=self.num_beams,
            num_return_sequences=self.num_return_sequences,
        )
        check_optional_counts(top_k=self.top_k)
        for name in ("temperature", "length_penalty", *(("top_p",) if self.top_p is not None else ())):
            if not is_number(getattr(self, name)):
                raise TypeError(not_a_number(name, getattr(self, name)))
        if self.seed is not None:
            check_whole(seed=self.seed)
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: {self.temperature}; use 0 or more")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty: {self.length_penalty}; use a finite number")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p}; use a number above 0, at most 1")
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError(
                f"temperature: {self.temperature} with num_beams {self.num_beams}; use 0, beams draw nothing"
            )
        if self.temperature == 0:
            for name in ("top_k", "top_p"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: {getattr(self, name)} with temperature 0; use a temperature above 0")
        if 2 * self.num_beams > vocab_size:
            raise ValueError(f"num_beams: {self.num_beams} of {vocab_size} ids; use {vocab_size // 2} or fewer")
        if self.num_return_sequences > self.num_beams and self.temperature == 0:
            remedy = f"use {self.num_beams} or fewer, or a temperature above 0"
            raise ValueError(
                f"num_return_sequences: {self.num_return_sequences} of num_beams {self.num_beams}; {remedy}"
            )

    @property
    def rows_per_sample(self) -> int:
        """Sequences that are written at a time for each sample."""
        return self.num_beams if self.num_beams > 1 else self.num_return_sequences

    def draws(self, sample_index: Tensor) -> Tensor | None:
        """Uniform numbers in [0, 1) for each row and step, (rows, max_new_tokens) float32; None without draws.

        A number depends on the seed, the sample's number, which of its sequences it is for, and the step: the same text
        is drawn whatever the batch, the other samples, and max_new_tokens.

        Args:
            sample_index: (b,) int64.
        """
        if self.temperature == 0:
            return None
        seed = int(torch.randint(2**62, ())) if self.seed is None else int(self.seed)
        streams = range(self.num_return_sequences)
        rows = [counter_uniform(sample_index, self.max_new_tokens, stream=stream, seed=seed) for stream in streams]
        return torch.stack(rows, dim=1).flatten(0, 1)
