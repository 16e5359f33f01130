"""The learning rate as a pure function of the step: there is no scheduler state to save or to get wrong on resume."""

import math

from colt5dist.train.config.schema import OptimizerConfig, ScheduleConfig


def learning_rate(step: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Learning rate of optimizer step `step` (counted from 1).

    Linear warm-up from 0 to `optimizer.lr`, then by name:
    constant; inverse_sqrt: lr * sqrt(warmup / step) (T5 1910.10683, section 3.1.2, whose rate is constant during the
    warm-up); cosine down to the minimum at `total_steps`; warmup_stable_decay: constant, then linear down to
    the minimum over the last `decay_steps` before `total_steps`. A minimum of 0 would be reached one step later, so
    that no step up to `total_steps` is taken at rate 0.
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
    end = total if schedule.min_lr_ratio else total + 1
    if schedule.name == "cosine":
        remaining = max((end - step) / (end - warmup), 0.0)
        share = math.sin(math.pi / 2 * remaining) ** 2  # 0.5 * (1 + cos(pi * progress)), also exact near the end
    else:
        assert schedule.decay_steps is not None
        share = min(max((end - step) / (schedule.decay_steps + end - total), 0.0), 1.0)
    return peak * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * share)
