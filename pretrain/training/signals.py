"""Asking a run to stop: signals and a deadline, seen by all ranks after the same step."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType

import torch

from braid.parallel.data_parallel import World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What schedulers send before they kill (SIGTERM, SIGUSR1) and what Ctrl-C sends (SIGINT)."""
SAME_KEY_PRESS_S = 0.5
"""Under torchrun one Ctrl-C reaches a worker twice: from the terminal, and passed on by the launcher."""


class StopRequest:
    """While entered, a signal only leaves a note; the loop asks for it at the end of each step.

        with StopRequest() as stop:
            while ...:
                train one step
                if reason := stop.poll(world):
                    save and leave

    A second Ctrl-C, pressed while the run is stopping, raises KeyboardInterrupt where the main thread stands. On exit
    the handlers that were there before are back.

    Args:
        deadline_s: ask to stop by itself this many seconds after construction (a job's time limit less what saving
            takes); None never does.
    """

    def __init__(self, deadline_s: float | None = None) -> None:
        self._deadline = None if deadline_s is None else time.monotonic() + deadline_s
        self._received: dict[int, float] = {}  # signal number -> when it first came

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        first = self._received.setdefault(number, time.monotonic())
        if number == signal.SIGINT and time.monotonic() - first > SAME_KEY_PRESS_S:
            raise KeyboardInterrupt

    def poll(self, world: World) -> str | None:
        """Why to stop: `SIGTERM`, `SIGINT`, `SIGUSR1` or `deadline`, or None to go on.

        Collective: all ranks call it after the same step and all get the same answer, whichever rank has been told.
        """
        reasons = [*SIGNALS, "deadline"]
        here = [number in self._received for number in SIGNALS]
        here.append(self._deadline is not None and time.monotonic() >= self._deadline)
        anywhere = world.all_reduce_sum(torch.tensor(here, dtype=torch.int32)).tolist()
        for reason, told in zip(reasons, anywhere, strict=True):
            if told:
                return reason.name if isinstance(reason, signal.Signals) else reason
        return None
