"""Functions of the step: ends, middle, monotony, bounds."""

import math

import pytest

from knowsam.schedules import ema_decay, lr_factor, sigmoid_rampup

SCHEDULES = ("constant", "linear", "polynomial", "cosine")


@pytest.mark.parametrize(
    ("step", "length", "expected"),
    [
        (0, 100, math.exp(-5)),
        (50, 100, math.exp(-1.25)),
        (100, 100, 1.0),
        (5000, 100, 1.0),
        (-3, 100, math.exp(-5)),
        (0, 0, 1.0),
        (7, -1, 1.0),
        (1, 2.5, math.exp(-5 * 0.36)),
    ],
)
def test_sigmoid_rampup(step, length, expected):
    assert sigmoid_rampup(step, length) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "half"), [("constant", 1.0), ("linear", 0.5), ("polynomial", 0.5**0.9), ("cosine", 0.5)]
)
def test_lr_factor_start_middle_end(schedule, half):
    assert lr_factor(0, 100, schedule=schedule) == 1.0
    assert lr_factor(50, 100, schedule=schedule) == pytest.approx(half)
    end = 1.0 if schedule == "constant" else 0.0
    assert lr_factor(100, 100, schedule=schedule) == pytest.approx(end, abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lr_factor_never_negative_never_climbs(schedule):
    """The published code's learning rate turned negative after its last step."""
    values = [lr_factor(step, 40, schedule=schedule) for step in range(60)]
    assert all(0.0 <= v <= 1.0 for v in values)
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup(schedule):
    values = [lr_factor(step, 1000, schedule=schedule, warmup=4) for step in range(6)]
    plain = [lr_factor(step, 1000, schedule=schedule) for step in range(6)]
    assert [v / p for v, p in zip(values, plain, strict=True)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert values[0] > 0  # the first step learns too


def test_lr_factor_of_a_run_without_steps():
    assert lr_factor(0, 0) == 1.0


def test_unknown_schedule_is_refused():
    with pytest.raises((KeyError, ValueError), match="step_wise"):
        lr_factor(0, 10, schedule="step_wise")


def test_ema_decay():
    assert ema_decay(0, 0.99) == 0.0  # the first update copies the student
    assert ema_decay(1, 0.99) == 0.5
    assert ema_decay(98, 0.99) == pytest.approx(1 - 1 / 99)
    assert ema_decay(10_000, 0.99) == 0.99
    assert ema_decay(10_000, 0.0) == 0.0
    values = [ema_decay(step, 0.999) for step in range(3000)]
    assert values == sorted(values)
