"""The learning rate as a function of the step."""

import pytest

from colt5dist.train.config.schema import OptimizerConfig, ScheduleConfig
from colt5dist.train.engine.schedule import learning_rate

PEAK = OptimizerConfig(lr=2.0)


@pytest.mark.parametrize("name", ["constant", "inverse_sqrt", "cosine", "warmup_stable_decay"])
def test_warm_up_is_linear_to_the_peak(name: str) -> None:
    schedule = ScheduleConfig(name=name, warmup_steps=10, total_steps=100, decay_steps=20)
    assert [learning_rate(step, PEAK, schedule) for step in (1, 5, 10)] == pytest.approx([0.2, 1.0, 2.0])


def test_inverse_sqrt_halves_at_four_times_the_warm_up() -> None:
    schedule = ScheduleConfig(name="inverse_sqrt", warmup_steps=10)
    assert learning_rate(40, PEAK, schedule) == pytest.approx(1.0)
    assert learning_rate(1000, PEAK, schedule) == pytest.approx(0.2)


def test_cosine_ends_at_the_minimum_and_stays() -> None:
    schedule = ScheduleConfig(name="cosine", warmup_steps=10, total_steps=110, min_lr_ratio=0.1)
    assert learning_rate(60, PEAK, schedule) == pytest.approx(0.2 + 1.8 / 2)
    assert learning_rate(110, PEAK, schedule) == pytest.approx(0.2)
    assert learning_rate(5000, PEAK, schedule) == pytest.approx(0.2)


def test_warmup_stable_decay_is_flat_then_linear() -> None:
    schedule = ScheduleConfig(name="warmup_stable_decay", warmup_steps=10, total_steps=100, decay_steps=20)
    assert learning_rate(80, PEAK, schedule) == 2.0
    assert learning_rate(90, PEAK, schedule) == pytest.approx(1.0)
    assert learning_rate(100, PEAK, schedule) == 0.0
