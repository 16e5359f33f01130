"""The samples of the next step, read before the ranks agree on this one: so a rank that has none does not hang them."""

import sys

from colt5dist.data.batch import Batch
from colt5dist.data.loader import DataWorkerError, TrainingBatches
from colt5dist.errors import ConfigError
from colt5dist.train.runtime import Ranks, raise_together


class ReadAhead:
    """One step's micro-batches of this rank, and what is wrong with the data, kept until all ranks know of it."""

    def __init__(self, batches: TrainingBatches, ranks: Ranks) -> None:
        """Read the first step."""
        self._batches = batches
        self._ranks = ranks
        self._coming: list[Batch] = []
        self._num_bad_records = 0
        self.failure: ConfigError | DataWorkerError | None = None
        self.read()

    def read(self) -> None:
        """Read the next step, or keep the reason why it cannot be read."""
        try:
            self._coming = next(self._batches)
        except (ConfigError, DataWorkerError) as error:
            self.failure = error
        found = self._batches.new_bad_records()
        self._num_bad_records += len(found)
        for line in found:
            print(f"rank {self._ranks.rank}: damaged record: {line}", file=sys.stderr, flush=True)

    def take(self) -> list[Batch]:
        """The step that was read."""
        step, self._coming = self._coming, []
        return step

    def count_bad_records(self) -> int:
        """Damaged records that were met since the last call."""
        count, self._num_bad_records = self._num_bad_records, 0
        return count

    def stop_together(self, *, bad_records: int = 0, allowed: int = 0) -> None:
        """See that all ranks have their data; all call this at the same time.

        Args:
            bad_records: damaged records that all ranks have met.
            allowed: as many may be.

        Raises:
            DataWorkerError: on all ranks, if a reader process of some rank was killed.
            ConfigError: on all ranks, if some rank cannot read its samples, or more records are damaged than may be.
        """
        message = None if self.failure is None else f"rank {self._ranks.rank}: {self.failure}"
        fault = isinstance(self.failure, DataWorkerError)
        raise_together(message if fault else None, DataWorkerError)
        raise_together(None if fault else message and str(self.failure))
        if bad_records > allowed:
            raise_together(
                f"data.max_bad_records: {bad_records} damaged records were met, {allowed} are allowed; each is named "
                "above; copy or prepare the shards again"
            )

    def close(self) -> None:
        """Stop the reader processes."""
        self._batches.close()
