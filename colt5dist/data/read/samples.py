"""Makes sample i: reads the text that the plan names, denoises it, and writes it to a row of a batch.

A sample whose text is damaged is made from the text of the next sample instead, and so on. So the replacement depends
only on the damage, and everything else only on (seed, i).
"""

import numpy as np
from numpy.typing import NDArray

from colt5dist.data.config import DataConfig
from colt5dist.data.order.mixture import lengths_of_mixture, parse_mixture, reserving_mixture
from colt5dist.data.order.plan import Plan, PlannedSample
from colt5dist.data.order.random_numbers import Draws, Stream
from colt5dist.data.read.denoise import denoise, split_pair, write_pair
from colt5dist.data.read.shards import ShardSet
from colt5dist.data.read.sources import Interleave, Sources, as_sources
from colt5dist.data.read.token_reader import DamagedShardError, TokenReader, UnreadableShardError
from colt5dist.data.sample_lengths import required_sentinels

MAX_TRIES = 10_000  # consecutive samples whose text may be damaged


class Samples:
    """The samples of shard sets: sample i is a pure function of (shards, config, seed, stage, i).

    Args:
        shards: where the text is: a shard set, or several.
        config: lengths and mixture; a length schedule in it is ignored.
        seed: seed of the order and of the masks, below 2^32.
        stage: stage of the length schedule (0 at the start of the run); each has its own order.
        in_turn: the objectives take turns (sample i of a set has objective i modulo their number), each with its own
            order of the text, so that a few samples of a small set have all objectives. Otherwise the objectives share
            one order.
    """

    def __init__(
        self,
        shards: ShardSet | Sources,
        config: DataConfig,
        *,
        seed: int,
        stage: int = 0,
        in_turn: bool = False,
    ) -> None:
        self.sources = as_sources(shards)
        self.config = config
        self.pad_id = self.sources.tokenizer.pad_id
        self._seed = seed + (stage << 32)
        self._mixture = parse_mixture(config.mixture)
        lengths = lengths_of_mixture(config.mixture, config.input_length, config.target_length)
        numbers = list(range(len(lengths)))
        # objectives that share a plan
        self._groups = [[number] for number in numbers] if in_turn else [numbers]
        self._plans = [
            [
                Plan(
                    part.index.document_ends,
                    [lengths[number].raw_tokens for number in group],
                    seed=self._seed,
                    weights=[self._mixture.weights[number] for number in group],
                    min_document_tokens=config.min_document_tokens,
                    pairs=self._mixture.is_pairs,
                )
                for group in self._groups
            ]
            for part in self.sources.parts
        ]
        self._readers = [
            TokenReader(part, cache_bytes=plans[0].window_bytes(part.dtype.itemsize))
            for part, plans in zip(self.sources.parts, self._plans, strict=True)
        ]
        self._interleave = Interleave(self.sources.weights, seed=self._seed)
        num_modes = parse_mixture(reserving_mixture(config.mixture)).num_modes
        self.first_sentinel = self.sources.tokenizer.vocab_size + num_modes
        # mode tokens and sentinels represent no text
        reserved = num_modes + required_sentinels(config)
        self._byte_lengths = np.pad(self.sources.tokenizer.byte_lengths, (0, reserved))
        self._draws = Draws()
        self._bad_records: set[str] = set()
        self._new_bad_records: list[str] = []

    def planned(self, number: int) -> PlannedSample:
        """Return what sample `number` is made from, if its text is not damaged."""
        source, place = self._interleave.find(number)
        plans = self._plans[source]
        turn, place = place % len(plans), place // len(plans)
        planned = plans[turn].sample(place)
        objective = self._groups[turn][planned.objective]
        return PlannedSample(number, planned.epoch, objective, planned.block, planned.chunk, source)

    @property
    def num_pairs(self) -> list[int] | None:
        """Samples of each set in an epoch, where they are pairs; None where they are not."""
        return [plans[0].epoch_samples(0) for plans in self._plans] if self._mixture.is_pairs else None

    def place_in_set(self, number: int) -> tuple[int, int]:
        """Return the set that a sample comes from, and its number in the order of that set."""
        return self._interleave.find(number)

    def write(self, number: int, inputs: NDArray[np.int64], targets: NDArray[np.int64]) -> tuple[int, int, int]:
        """Write a sample to the start of two rows.

        Args:
            number: number of the sample.
            inputs: (input_length,) row for the input.
            targets: (target_length,) row for the target.

        Returns:
            Number of input tokens, number of target tokens, and number of the objective.

        Raises:
            DamagedShardError: more records are damaged than data.max_bad_records allows.
            UnreadableShardError: a shard cannot be read.
        """
        planned, tokens = self._undamaged_text(number)
        if self._mixture.is_pairs:
            num_inputs, num_targets = write_pair(
                tokens,
                eos_id=self.sources.tokenizer.eos_id,
                cut_inputs_at=self.config.cut_inputs_at,
                inputs=inputs,
                targets=targets,
            )
            return num_inputs, num_targets, planned.objective
        num_inputs, num_targets = denoise(
            tokens,
            self._mixture.objectives[planned.objective],
            self._draws.restart(self._seed, number, Stream.DENOISE),
            first_sentinel=self.first_sentinel,
            eos_id=self.sources.tokenizer.eos_id,
            inputs=inputs,
            targets=targets,
        )
        return num_inputs, num_targets, planned.objective

    def target_places(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the tokens of a sample's target stand in their documents.

        A sentinel counts as the token after it, an end token as the one before it.

        Args:
            number: number of the sample.

        Returns:
            Two (target tokens,) arrays: tokens of the document, and position of the token in it.

        Raises:
            DamagedShardError: more records are damaged than data.max_bad_records allows.
        """
        planned, tokens = self._undamaged_text(number)
        if self._mixture.is_pairs:
            first = split_pair(tokens, self.sources.tokenizer.eos_id) + 1
            places = np.minimum(first + np.arange(self.config.target_length), len(tokens) - 1)
            places = places[: min(len(tokens) - first + 1, self.config.target_length)]
            places[-1] = places[-2]
            return planned.chunk.documents_at(places, self.sources.parts[planned.source].index.document_ends)
        inputs = np.empty(self.config.input_length, dtype=np.int64)
        targets = np.empty(self.config.target_length, dtype=np.int64)
        # the same draws as in `write`, on the places of the tokens instead of the tokens; sentinels are above them
        _, num_targets = denoise(
            np.arange(len(tokens)),
            self._mixture.objectives[planned.objective],
            self._draws.restart(self._seed, number, Stream.DENOISE),
            first_sentinel=len(tokens) + self._mixture.num_modes,
            eos_id=-1,
            inputs=inputs,
            targets=targets,
        )
        places = targets[:num_targets]
        is_sentinel = np.flatnonzero(places >= len(tokens))
        places[is_sentinel] = places[is_sentinel + 1]
        places[places < 0] = len(tokens) - 1
        return planned.chunk.documents_at(places, self.sources.parts[planned.source].index.document_ends)

    def _undamaged_text(self, number: int) -> tuple[PlannedSample, NDArray[np.integer]]:
        """Plan and text of the first sample from `number` on that is not damaged."""
        for replacement in range(number, number + MAX_TRIES):
            planned = self.planned(replacement)
            try:
                return planned, self._readers[planned.source].read_chunk(planned.chunk)
            except UnreadableShardError:
                raise
            except DamagedShardError as error:
                message = str(error)
                if message not in self._bad_records:
                    self._bad_records.add(message)
                    self._new_bad_records.append(message)
                if len(self._bad_records) > self.config.max_bad_records:
                    raise DamagedShardError(_too_many(message, self.config.max_bad_records)) from None
        raise DamagedShardError(f"{message}; {MAX_TRIES} samples from {number} on have damaged text")

    def new_bad_records(self) -> list[str]:
        """Return the damaged records that were found since the last call, one line each."""
        found, self._new_bad_records = self._new_bad_records, []
        return found

    def text_bytes(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the bytes of text that ids represent; pads, end tokens and sentinels represent none.

        Args:
            ids: (rows, tokens) ids.

        Returns:
            (rows,) bytes.
        """
        return self._byte_lengths[ids].sum(axis=1)


def _too_many(message: str, allowed: int) -> str:
    return f"{message} (more than the data.max_bad_records={allowed} that are allowed)" if allowed else message
