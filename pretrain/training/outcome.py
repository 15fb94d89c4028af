"""`outcome.json`: how a run ended, for the supervisor. torchrun does not pass exit codes through. No torch here."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from braid.pretrain.checkpoint.files import write_atomically

NAME = "outcome.json"
STATUSES = ("done", "preempted", "failed", "data_exhausted", "bad_config")


def write_outcome(run_dir: Path, status: str, exit_code: int, step: int | None, message: str) -> None:
    """Say how the run in `run_dir` ended, replacing what an earlier start left there.

    Never raises for a full or broken disk: it is called on the way out, often because of one, and must not hide why.

    Args:
        status: one of `STATUSES`.
        step: optimizer steps done; None when the run ended before it knew.
        message: for people; empty when all is well.
    """
    assert status in STATUSES, status
    outcome = {"status": status, "exit_code": exit_code, "step": step, "message": message}
    outcome |= {"process": os.getpid(), "time": time.time()}
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir / NAME, (json.dumps(outcome, indent=1) + "\n").encode())
    except OSError as error:
        print(f"warning: {run_dir / NAME} could not be written: {error}", file=sys.stderr, flush=True)


def read_outcome(run_dir: Path) -> dict[str, Any] | None:
    """What the last start said, or None: it was killed, or is running (see `clear_outcome`)."""
    try:
        return json.loads((run_dir / NAME).read_bytes())
    except FileNotFoundError:
        return None


def clear_outcome(run_dir: Path) -> None:
    """At a start: forget the end of the one before, so that a later kill is not taken for it."""
    (run_dir / NAME).unlink(missing_ok=True)
