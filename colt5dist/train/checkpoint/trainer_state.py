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
    """Steps that were dropped because a loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    """Those of them since the last applied step."""
    skipped_from: int = 0
    """Number of the first sample of the steps that were skipped in a row."""
    data_fingerprint: str = ""
    """Fingerprint of the shards' manifest."""
    skipped_samples: list[list[int]] = field(default_factory=list)
    """Ranges of samples that data.skip left out on the way here."""
    bad_records: int = 0
    """Damaged records that were replaced, counted by each rank and each start that met them."""
    recent_losses: list[float] = field(default_factory=list)
    """Losses of the last health.spike_window applied steps, oldest first."""
    spikes: int = 0
    """Loss spikes, those that were rolled back included."""
    rollbacks: int = 0
    """How often a spike took the run back to a checkpoint."""
    rolled_back_samples: list[list[int]] = field(default_factory=list)
    """Ranges of samples around those spikes: with data.skip they are what the order of the samples leaves out."""
    first_held_out_loss: float | None = None
    """Held-out loss before the first step, nats a token."""
