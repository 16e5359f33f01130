"""The trainer's few integers, which a checkpoint holds besides weights and moments."""

from dataclasses import dataclass, field


@dataclass
class TrainerState:
    """What a run has to remember besides weights and moments. No random generator in training has a state to save."""

    step: int = 0
    """Finished optimizer steps, skipped ones included."""
    samples_consumed: int = 0
    """Number of the next sample in the run's order: the position in the data. Samples in data.skip count as read."""
    optimizer_step: int = 0
    """Optimizer steps that were applied."""
    averaged_steps: int = 0
    """Steps that the moving average of the weights has taken in since it began."""
    skipped_steps: int = 0
    """Steps that were skipped because a loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    """Steps skipped since the last applied step."""
    skipped_from: int = 0
    """Number of the first sample of the steps that are counted in `skipped_in_a_row`."""
    data_fingerprint: str = ""
    """Fingerprint of the shards' manifest."""
    tokenizer_fingerprint: str = ""
    """Fingerprint of the shards' tokenizer; empty in checkpoints that were written before it was kept."""
    skipped_samples: list[list[int]] = field(default_factory=list)
    """Ranges [first, sample after the last] of samples that data.skip has left out so far."""
    bad_records: int = 0
    """Damaged records that were replaced, counted by each rank and each start that read them."""
    recent_losses: list[float] = field(default_factory=list)
    """Losses of the last health.spike_window applied steps, oldest first."""
    spikes: int = 0
    """Loss spikes, including those that were rolled back."""
    rollbacks: int = 0
    """Number of rollbacks to a checkpoint after a spike."""
    rolled_back_samples: list[list[int]] = field(default_factory=list)
    """Ranges [first, sample after the last] of samples around those spikes; left out like those of data.skip."""
    first_held_out_loss: float | None = None
    """Held-out loss before the first step, in nats per token."""
    best_key: str = ""
    """Key of evaluations by which the following are judged; empty before the first one that is."""
    best_value: float | None = None
    """Best value of it so far; None where no value was a number."""
    best_step: int = 0
    """Step of that evaluation."""
    evaluations_since_best: int = 0
    """Evaluations after it, none of them better."""
    evaluation_left_out: bool = False
    """Whether a request to stop has cut the evaluation of this step short, which the next start then makes up for."""
