"""Errors a user can act on. The command line prints them without a traceback and exits with their documented code.

They live here because every other package may import `braid.kernels` and it imports none of them. No torch.
"""

from __future__ import annotations


class BraidError(ValueError):
    """What is wrong, the values found, what to change. Exit code 2 unless a subclass says otherwise."""

    exit_code = 2

    def __init__(self, what: str, *, found: str = "", change: str = "") -> None:
        self.what, self.found, self.change = what, found, change
        lines = [what]
        if found:
            lines.append(f"  found:  {found}")
        if change:
            lines.append(f"  change: {change}")
        super().__init__("\n".join(lines))


class ConfigError(BraidError):
    """The configuration is wrong; the message lists every problem at once."""


class InputError(BraidError):
    """A file or folder given by the user is missing, empty, malformed or does not fit."""


class CheckpointError(BraidError):
    """No valid checkpoint, or one that does not fit the model, the data or the configuration."""


class Preempted(BraidError):
    """A signal or a deadline stopped the run; its state was saved."""

    exit_code = 3


class TrainingFailed(BraidError):
    """Training cannot go on: a loss that is not finite, a dead worker, no space left for the last checkpoint."""

    exit_code = 4


class DataExhausted(BraidError):
    """The corpus cannot provide what the run asks for."""

    exit_code = 5


class StoreFailed(BraidError):
    """A store does not hand out what it holds: it cannot be reached, fails or is too slow. Later it may."""

    exit_code = 4
