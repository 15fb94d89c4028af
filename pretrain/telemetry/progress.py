"""The progress line, and the meter behind its rates.

The line is plain text, the same on a terminal and in a log file, and each figure follows its name, so that
`grep -o 'loss [0-9.]*'` works on any log.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

SMOOTHING = 0.9
"""Weight of the past in the rate behind the ETA, per interval."""


def format_line(record: Mapping[str, Any], total_steps: int, eta: float | None) -> str:
    """One line for a record of metrics.jsonl.

    Args:
        record: `step`, `loss`, `lr`, `grad_norm`, `tokens_per_second`, `mfu` (share or None), `data_wait` (share).
        total_steps: steps of the whole run.
        eta: seconds left; None when nothing is known yet.
    """
    step = record["step"]
    return "  ".join(
        [
            f"step {step:>{len(str(total_steps))}}/{total_steps} {100 * step / total_steps:5.1f}%",
            f"loss {_figure(record['loss'], '.4f')}",
            f"lr {_figure(record['lr'], '.2e')}",
            f"grad_norm {_figure(record['grad_norm'], '.3f')}",
            f"tokens/s {_count(record['tokens_per_second'])}",
            f"mfu {_share(record['mfu'])}",
            f"data_wait {_share(record['data_wait'])}",
            f"eta {_duration(eta)}",
        ]
    )


@dataclass(frozen=True)
class Lap:
    """Rates since the last lap, of time spent training."""

    tokens_per_second: float | None
    """Over all ranks; None when no step was done."""
    seconds: float
    """Time since the last lap, pauses left out."""
    eta: float | None
    """Seconds of training left at the smoothed rate; None before the first step."""


class ProgressMeter:
    """Counts steps and time; validation, sampling and saving (`with meter.paused():`) are left out of every rate.

    Args:
        total_steps: steps of the whole run.
        first_step: steps done before this process started (a resumed run).
        elapsed: seconds of training that they took.
        clock: seconds from any origin, never going back.
    """

    def __init__(
        self,
        total_steps: int,
        first_step: int = 0,
        elapsed: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.total_steps = total_steps
        self._clock = clock
        self._lap_tokens = 0
        self._step = self._lap_step = first_step
        self._origin = clock() - elapsed  # moved forward by every pause
        self._paused_at: float | None = None
        self._lap_elapsed = elapsed
        # Exponentially weighted sums over intervals: the ratio is the smoothed time of a step from the first one on.
        self._smoothed_seconds = self._smoothed_steps = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds of training, pauses left out, those before a resume included."""
        return (self._clock() if self._paused_at is None else self._paused_at) - self._origin

    def step(self, num_tokens: int) -> None:
        """A step is done, of a global batch of `num_tokens`, padding left out."""
        self._step += 1
        self._lap_tokens += num_tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside is not training."""
        assert self._paused_at is None, "a pause within a pause"
        self._paused_at = self._clock()
        try:
            yield
        finally:
            self._origin += self._clock() - self._paused_at
            self._paused_at = None

    def lap(self) -> Lap:
        """The rates since the last lap, which ends here."""
        elapsed = self.elapsed
        seconds, steps = elapsed - self._lap_elapsed, self._step - self._lap_step
        tokens, self._lap_tokens = self._lap_tokens, 0
        self._lap_elapsed, self._lap_step = elapsed, self._step
        self._smoothed_seconds = SMOOTHING * self._smoothed_seconds + seconds
        self._smoothed_steps = SMOOTHING * self._smoothed_steps + steps
        eta = None
        if self._smoothed_steps:
            eta = (self.total_steps - self._step) * self._smoothed_seconds / self._smoothed_steps
        rate = tokens / seconds if steps and seconds > 0 else None
        return Lap(rate, seconds, eta)


def _figure(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.1f}%"


def _count(value: float | None) -> str:
    """Three significant digits and a unit: 953, 12.3k, 4.57M."""
    if value is None or not math.isfinite(value):
        return "n/a"
    units = ["", "k", "M", "G", "T"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        del units[0]
    return f"{value:.3g}{units[0]}"


def _duration(seconds: float | None) -> str:
    """The two largest units: 42s, 3m07s, 5h12m, 2d03h."""
    if seconds is None or not math.isfinite(seconds):
        return "n/a"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    if hours:
        return f"{h}h{m:02d}m"
    return f"{m}m{s:02d}s" if minutes else f"{s}s"
