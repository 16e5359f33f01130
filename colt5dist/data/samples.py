"""Makes sample i: what the plan names is read, denoised, and written to a row of a batch."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from colt5dist.data.config import DataConfig
from colt5dist.data.denoise import denoise
from colt5dist.data.objectives import MIXTURES, lengths_of_mixture, required_sentinels
from colt5dist.data.philox import Stream, random_bits
from colt5dist.data.plan import Plan, PlannedSample
from colt5dist.data.shards import ShardSet
from colt5dist.data.stream import TokenReader


class Samples:
    """The samples of a shard set: sample i is a pure function of (shards, config, seed, i)."""

    def __init__(self, shards: ShardSet, config: DataConfig, *, seed: int, in_turn: bool = False) -> None:
        """Plan the samples.

        Args:
            shards: where the text is.
            config: lengths and mixture.
            seed: another seed gives another order and other masks.
            in_turn: the objectives take turns (sample i has objective i modulo their number) over one order of the text
                each, so that a few samples of a small set have all of them; otherwise they share one order of the text.
        """
        self.shards = shards
        self.config = config
        self.pad_id = shards.tokenizer.pad_id
        self._seed = seed
        self._objectives = MIXTURES[config.mixture]
        lengths = lengths_of_mixture(config.mixture, config.input_length, config.target_length)
        raw_lengths = [length.raw_tokens for length in lengths]
        # objectives that share a plan
        self._groups = [[number] for number in range(len(lengths))] if in_turn else [list(range(len(lengths)))]
        self._plans = [
            Plan(
                shards.index.document_ends,
                [raw_lengths[number] for number in group],
                seed=seed,
                min_document_tokens=config.min_document_tokens,
            )
            for group in self._groups
        ]
        self._reader = TokenReader(shards, cache_bytes=self._plans[0].window_bytes(shards.dtype.itemsize))
        # sentinels stand for no text
        self._byte_lengths = np.pad(shards.tokenizer.byte_lengths, (0, required_sentinels(config)))

    def planned(self, number: int) -> PlannedSample:
        """What sample `number` is made from."""
        turn, place = number % len(self._plans), number // len(self._plans)
        planned = self._plans[turn].sample(place)
        return replace(planned, index=number, objective=self._groups[turn][planned.objective])

    def write(self, number: int, inputs: NDArray[np.int64], targets: NDArray[np.int64]) -> tuple[int, int, int]:
        """Write sample `number` to the first places of (input_length,) `inputs` and (target_length,) `targets`.

        Returns:
            Input tokens, target tokens, and the number of the objective.

        Raises:
            DamagedShardError: its text cannot be read or is not what was written.
        """
        planned = self.planned(number)
        num_inputs, num_targets = denoise(
            self._reader.read_chunk(planned.chunk),
            self._objectives[planned.objective],
            random_bits(self._seed, number, Stream.DENOISE),
            first_sentinel=self.shards.tokenizer.vocab_size,
            eos_id=self.shards.tokenizer.eos_id,
            inputs=inputs,
            targets=targets,
        )
        return num_inputs, num_targets, planned.objective

    def text_bytes(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """(rows,) bytes of text that (rows, tokens) ids stand for; pads, end tokens and sentinels count nothing."""
        return self._byte_lengths[ids].sum(axis=1)
