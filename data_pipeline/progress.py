"""What a long preparation says while it runs: a live bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Use as a context manager; everything goes to `stream`, standard error by default. Not `enabled`: silent."""

    def __init__(self, enabled: bool = True, *, stream: TextIO | None = None, interval: float = 5.0) -> None:
        self._enabled = enabled
        self._stream = stream or sys.stderr
        self._interval = interval
        self._bar: Bar | None = None
        self._begun_at: float | None = None
        self.position = 0  # of the input, as last said

    def __enter__(self) -> Progress:
        if self._enabled and self._stream.isatty():
            columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(file=self._stream), transient=True)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def note(self, message: str) -> None:
        """Say something once."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False)
        elif self._enabled:
            print(message, file=self._stream, flush=True)

    def begin(self, total: int) -> None:
        """`total` input bytes will be read."""
        self._total = total
        if self._bar is not None:
            self._task = self._bar.add_task("", total=total)

    def update(self, documents: int, num_bytes: int, tokens: int, position: int) -> None:
        """Totals so far: `num_bytes` of text, `position` of the input bytes. The first call is what speed and time left
        are measured from, so what an earlier run did does not count."""
        now = time.monotonic()
        self.position = position
        if self._begun_at is None:
            self._begun_at = self._said_at = now
            self._first_tokens, self._first_position = tokens, position
        speed = (tokens - self._first_tokens) / max(now - self._begun_at, 1e-9)
        state = f"{documents:,} documents, {num_bytes / 1e6:,.1f} MB, {tokens:,} tokens, {speed:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=position, description=state)
        elif self._enabled and now - self._said_at >= self._interval:
            self._said_at = now
            self.note(f"{state}, {self._remaining(position, now - self._begun_at)}")

    def _remaining(self, position: int, elapsed: float) -> str:
        """Time left, from the share of the input read in this run: the only measure known before the end."""
        done = position - self._first_position
        if done <= 0:
            return "time left unknown"
        seconds = round(elapsed * (self._total - position) / done)
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
