"""The learning rate as a function of the step."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colt5dist.errors import ConfigError
from colt5dist.train.config.load import load_config
from colt5dist.train.config.schema import OptimizerConfig, ScheduleConfig
from colt5dist.train.engine.schedule import learning_rate

PEAK = OptimizerConfig(lr=2.0)
TINY = Path(__file__).resolve().parents[3] / "configs" / "tiny.yaml"


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
    assert learning_rate(90, PEAK, schedule) == pytest.approx(2.0 * 11 / 21)
    assert learning_rate(100, PEAK, schedule) == pytest.approx(2.0 / 21)
    schedule = replace(schedule, min_lr_ratio=0.1)
    assert learning_rate(80, PEAK, schedule) == 2.0
    assert learning_rate(90, PEAK, schedule) == pytest.approx(1.1)
    assert learning_rate(100, PEAK, schedule) == learning_rate(500, PEAK, schedule) == pytest.approx(0.2)


@given(
    name=st.sampled_from(["constant", "inverse_sqrt", "cosine", "warmup_stable_decay"]),
    warmup=st.integers(1, 10**7),
    rest=st.integers(1, 10**9),
    decay=st.floats(0, 1),
    minimum=st.sampled_from([0.0, 0.1, 1.0]),
    place=st.floats(0, 1),
)
def test_no_step_is_taken_at_rate_0(
    name: str, warmup: int, rest: int, decay: float, minimum: float, place: float
) -> None:
    """Nor above the peak: the first step, the last of the warm-up, those of the decay, the last, and any other."""
    total = warmup + rest
    schedule = ScheduleConfig(name=name, warmup_steps=warmup, total_steps=total, min_lr_ratio=minimum)
    schedule.decay_steps = max(1, round(decay * rest))
    assert schedule.problems() == []
    least = 2.0 * minimum * 0.999 if name in ("cosine", "warmup_stable_decay") else 0.0
    places = (1, warmup, warmup + 1, total - schedule.decay_steps + 1, total - 1, total, 1 + round(place * (total - 1)))
    for step in places:
        assert (least if step >= warmup else 0.0) < learning_rate(step, PEAK, schedule) <= 2.0


def test_steps_after_a_decay_to_0_are_refused() -> None:
    settings = {"train.steps": 101, "schedule.name": "cosine", "schedule.total_steps": 100, "schedule.warmup_steps": 9}
    load = [f"{key}={value}" for key, value in settings.items()]
    with pytest.raises(ConfigError, match=r"^schedule.total_steps: 100 is before the last step, .* set schedule.total"):
        load_config(TINY, load)
    assert load_config(TINY, [*load, "schedule.min_lr_ratio=0.1"]) and load_config(TINY, [*load, "train.steps=100"])
