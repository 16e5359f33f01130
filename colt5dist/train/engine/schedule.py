"""The learning rate as a pure function of the step: there is no scheduler state to save or to get wrong on resume."""

import math

from colt5dist.train.config.schema import OptimizerConfig, ScheduleConfig


def learning_rate(step: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Learning rate of optimizer step `step` (counted from 1).

    Linear warm-up from 0 to `optimizer.lr`, then by name:
    constant; inverse_sqrt: lr * sqrt(warmup / step) (T5 1910.10683, section 3.1.2, whose rate is constant during the
    warm-up); cosine down to the minimum at `total_steps`; warmup_stable_decay: constant, then linear down to
    the minimum over the last `decay_steps` before `total_steps`.
    """
    warmup, peak = schedule.warmup_steps, optimizer.lr
    if step < warmup:
        return peak * step / warmup
    if schedule.name == "constant":
        return peak
    if schedule.name == "inverse_sqrt":
        return peak * math.sqrt(warmup / step)
    total = schedule.total_steps
    assert total is not None
    if schedule.name == "cosine":
        progress = min((step - warmup) / (total - warmup), 1.0)
        share = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        assert schedule.decay_steps is not None
        share = min(max((total - step) / schedule.decay_steps, 0.0), 1.0)
    return peak * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * share)
