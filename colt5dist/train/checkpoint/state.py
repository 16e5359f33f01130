"""The trainer's few integers, which a checkpoint keeps beside weights and moments."""

from dataclasses import dataclass, field


@dataclass
class TrainerState:
    """What a run knows beside weights and moments. Nothing in training draws from a generator with a state."""

    step: int = 0
    """Finished optimizer steps, skipped ones included."""
    samples_consumed: int = 0
    """Number of the next sample in the run's order: the position in the data. data.skip counts as read."""
    optimizer_step: int = 0
    """Steps that were applied."""
    skipped_steps: int = 0
    """Steps that were dropped because a gradient was not finite."""
    data_fingerprint: str = ""
    """Fingerprint of the shards' manifest."""
    skipped_samples: list[list[int]] = field(default_factory=list)
    """Ranges of samples that data.skip left out on the way here."""
    bad_records: int = 0
    """Damaged records that were replaced, counted by each rank and each start that met them."""
    first_held_out_loss: float | None = None
    """Held-out loss before the first step, nats a token."""
