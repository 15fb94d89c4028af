"""Tensors on their way from training to the thread that writes them."""

from __future__ import annotations

import errno
import threading

from torch import Tensor

POLL_S = 0.1
"""Signals are looked at this often by a process that waits."""

Key = tuple[str, str]
"""Group and name."""


class Handover:
    """One side gives tensors, the other takes each once, in an order that may differ a little."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._given: dict[Key, Tensor] = {}
        self._wanted: Key | None = None
        self._taken = 0  # bytes of what is being written
        self._over = False

    def give(self, key: Key, values: Tensor, room: int | None) -> None:
        """Hand over; with `room`, wait until it and what is not yet written are no more bytes than that, or it is
        alone, or what the other side waits for comes later. Once the end was told, nothing is kept."""
        with self._changed:
            while room is not None and not self._over and self._num_bytes() and not self._starving():
                if self._num_bytes() + values.nbytes <= room:
                    break
                self._changed.wait(POLL_S)
            if not self._over:
                self._given[key] = values
            self._changed.notify_all()

    def take(self, group: str, name: str) -> Tensor:
        """Wait for a tensor; the one before is written. Raises OSError where it will not come."""
        with self._changed:
            self._wanted, self._taken = (group, name), 0
            self._changed.notify_all()
            while self._wanted not in self._given:
                if self._over:
                    raise OSError(errno.ECANCELED, "training ended before it had given all that is saved")
                self._changed.wait()
            values = self._given.pop(self._wanted)
            self._wanted, self._taken = None, values.nbytes
            return values

    def end(self) -> None:
        """Nothing more is given, or taken."""
        with self._changed:
            self._over = True
            self._given.clear()
            self._changed.notify_all()

    def _num_bytes(self) -> int:
        return self._taken + sum(values.nbytes for values in self._given.values())

    def _starving(self) -> bool:
        return self._wanted is not None and self._wanted not in self._given
