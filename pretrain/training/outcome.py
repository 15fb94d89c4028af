"""`outcome.json`: how a run ended, for the supervisor. torchrun does not pass exit codes through. No torch here.

One rank's failure ends the others, and all of them end at about the same time. So the first to write is believed: rank
0 removes what an earlier start has left (`clear_outcome`) before any rank can fail, and nobody replaces what one has
written. A rank whose only complaint is a lost peer learns of it after that peer has written, and so cannot hide why.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from braid.kernels.errors import BraidError, CheckpointError
from braid.pretrain.checkpoint.files import RunLock, write_atomically

NAME = "outcome.json"
STATUSES = ("done", "preempted", "failed", "data_exhausted", "bad_config")
STATUS = {2: "bad_config", 3: "preempted", 4: "failed", 5: "data_exhausted"}
"""The status of each exit code of a BraidError."""

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


def write_outcome(run_dir: Path, status: str, exit_code: int, step: int | None, message: str, rank: int = 0) -> None:
    """Say how this start of the run in `run_dir` ended, unless another rank of it has said so already.

    Never raises for a full or broken disk: it is called on the way out, often because of one, and must not hide why.

    Args:
        status: one of `STATUSES`.
        step: optimizer steps done; None when the run ended before it knew.
        message: for people; empty when all is well.
        rank: who says so.
    """
    content = _render(status, exit_code, step, message, rank)
    own = run_dir / f".outcome-rank-{rank}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(own, content)
        _put_if_absent(own, run_dir / NAME)
    except OSError as error:
        _warn(run_dir, error)


def _put_if_absent(file: Path, target: Path) -> None:
    """Give `file` the name `target`, or remove it where that is taken."""
    try:
        os.link(file, target)  # on a network file system the server decides, whatever this client has cached
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if not target.exists():
            os.replace(file, target)
    finally:
        file.unlink(missing_ok=True)


def write_failed_start(run_dir: Path, error: BraidError) -> None:
    """Say that a start ended before it held the run directory, in place of what an earlier one has left there.

    A directory that another process is writing keeps its silence: that run has not ended. Never raises, as above.
    """
    content = _render(STATUS[error.exit_code], error.exit_code, None, str(error), int(os.environ.get("RANK", "0")))
    try:
        lock = RunLock(run_dir, wait_s=1)  # a peer with the same complaint is out of the way at once
    except (CheckpointError, OSError):  # a living run's, or nobody can write there
        return
    try:
        write_atomically(run_dir / NAME, content)
    except OSError as failure:
        _warn(run_dir, failure)
    finally:
        lock.release()


def _render(status: str, exit_code: int, step: int | None, message: str, rank: int) -> bytes:
    assert status in STATUSES, status
    outcome = {"status": status, "exit_code": exit_code, "step": step, "message": message}
    outcome |= {"rank": rank, "process": os.getpid(), "time": time.time()}
    return (json.dumps(outcome, indent=1) + "\n").encode()


def _warn(run_dir: Path, error: OSError) -> None:
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
