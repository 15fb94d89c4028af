"""The progress line to the letter, and the meter on a clock that the test turns."""

from __future__ import annotations

import re
import time

import pytest

from braid.pretrain.telemetry.progress import ProgressMeter, _count, _duration, format_line

RECORD = {
    "step": 120, "split": "train", "loss": 5.43210987, "lr": 3e-4, "grad_norm": 0.81249, "tokens_per_second": 12345.6,
    "mfu": None, "data_wait": 0.0123, "seconds": 60.0,
}  # fmt: skip


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_line() -> None:
    assert format_line(RECORD, 1000, 187.4) == (
        "step  120/1000  12.0%  loss 5.4321  lr 3.00e-04  grad_norm 0.812  tokens/s 12.3k  mfu n/a  data_wait 1.2%  "
        "eta 3m07s"
    )
    full = format_line(RECORD | {"step": 1000, "mfu": 0.4567, "loss": None, "tokens_per_second": None}, 1000, None)
    assert full == (
        "step 1000/1000 100.0%  loss n/a  lr 3.00e-04  grad_norm 0.812  tokens/s n/a  mfu 45.7%  data_wait 1.2%  "
        "eta n/a"
    )
    odd = format_line(RECORD | {"loss": float("nan"), "grad_norm": float("inf")}, 1000, 0.0)
    assert "loss nan" in odd and "grad_norm inf" in odd and odd.endswith("eta 0s")
    assert re.search(r"loss [0-9.]+", full) is None and re.search(r"mfu [0-9.]+%", full)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (7.25, "7.25"), (953.4, "953"), (999.6, "1k"), (12345, "12.3k"), (999_600, "1M"), (4.567e6, "4.57M"),
     (1.2e9, "1.2G"), (5e12, "5T"), (None, "n/a"), (float("inf"), "n/a")],
)  # fmt: skip
def test_counts(value: float | None, text: str) -> None:
    assert _count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0s"), (42, "42s"), (59.6, "1m00s"), (187, "3m07s"), (3600, "1h00m"), (5 * 3600 + 12 * 60 + 59, "5h12m"),
     (51 * 3600, "2d03h"), (None, "n/a"), (float("inf"), "n/a")],
)  # fmt: skip
def test_durations(seconds: float | None, text: str) -> None:
    assert _duration(seconds) == text


def test_rates_of_an_interval_leave_pauses_out() -> None:
    clock = Clock()
    meter = ProgressMeter(100, clock=clock)
    for _ in range(10):
        clock.now += 2.0
        meter.step(512)
        with meter.paused():
            clock.now += 50.0  # validation, a checkpoint
            assert meter.elapsed == 2.0 * meter._step
    lap = meter.lap()
    assert lap.seconds == 20.0 and lap.tokens_per_second == 10 * 512 / 20.0 and lap.eta == 90 * 2.0
    assert meter.elapsed == 20.0
    clock.now += 4.0
    meter.step(512)
    assert meter.lap().tokens_per_second == 128.0, "the last interval alone"
    with pytest.raises(RuntimeError), meter.paused():
        clock.now += 10.0
        raise RuntimeError
    assert meter.elapsed == 24.0, "a pause that fails is a pause"
    with meter.paused(), pytest.raises(AssertionError):
        meter.paused().__enter__()


def test_the_eta_follows_a_change_of_speed_but_not_one_slow_interval() -> None:
    clock = Clock()
    meter = ProgressMeter(1000, clock=clock)

    def interval(seconds_per_step: float) -> float:
        for _ in range(10):
            clock.now += seconds_per_step
            meter.step(1)
        return meter.lap().eta / (1000 - meter._step)

    assert interval(10.0) == pytest.approx(10.0)  # the first steps warm up
    for _ in range(20):
        rate = interval(1.0)
    assert 1.0 < rate < 1.3, "a slow start is forgotten"
    assert interval(5.0) < 1.8, "one slow interval hardly counts"
    for _ in range(40):
        rate = interval(3.0)
    assert rate == pytest.approx(3.0, rel=0.02), "a lasting change does"


def test_a_resumed_run_counts_on() -> None:
    clock = Clock()
    meter = ProgressMeter(100, first_step=60, elapsed=300.0, clock=clock)
    assert meter.lap().eta is None and meter.lap().tokens_per_second is None, "nothing is known yet"
    clock.now += 3.0
    meter.step(8)
    lap = meter.lap()
    assert lap.tokens_per_second == pytest.approx(8 / 3) and lap.eta == pytest.approx(39 * 3)
    assert meter.elapsed == pytest.approx(303.0)


def test_the_real_clock() -> None:
    meter = ProgressMeter(2)
    time.sleep(0.05)
    meter.step(100)
    with meter.paused():
        time.sleep(0.2)
    lap = meter.lap()
    assert 0.05 <= lap.seconds < 0.2 and lap.tokens_per_second == 100 / lap.seconds
