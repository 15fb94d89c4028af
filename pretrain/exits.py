"""The one place where exceptions become messages and exit codes, for every way to start Braid."""

from __future__ import annotations

import errno
import os
import select
import sys
from collections.abc import Callable

from braid.kernels.errors import BraidError

EXIT_CODES = """exit codes:
  0  done
  2  bad configuration or input, or a place that cannot be written; the message says what to change
  3  preempted: stopped by a signal or a deadline, with the state saved
  4  training failed, or a store did not answer in time
  5  the data cannot provide what the run asks for"""

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
CLOSED_PIPE = 141  # 128 + SIGPIPE

_PLACES = {
    errno.ENOSPC: "there is no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EACCES: "access is denied",
    errno.EPERM: "the operation is not permitted",
}


def run_and_report(command: Callable[[], int]) -> int:
    """Run a command; return its exit code.

    Errors that a user can act on are printed on stderr without a traceback. Any other exception is a defect of ours and
    passes through with its traceback.
    """
    try:
        return _finish(command)
    except BraidError as error:
        return _complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED, kind="")
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise  # some other pipe, to a process of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not complain either
        return CLOSED_PIPE
    except OSError as error:
        if not is_about_a_place(error):
            raise
        return _complain(_describe_place(error), BraidError.exit_code)


def _finish(command: Callable[[], int]) -> int:
    """Run to the end, argparse's own exits included, and flush while a closed pipe can still be caught."""
    try:
        code = command()
    except SystemExit as stop:
        code = stop.code or 0
    sys.stdout.flush()
    return code


def _complain(message: str, code: int, kind: str = "error: ") -> int:
    rank = os.environ.get("RANK", "") if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    print(f"braid: {f'[rank {rank}] ' if rank else ''}{kind}{message}", file=sys.stderr, flush=True)
    return code


def is_about_a_place(error: OSError) -> bool:
    """A full disk, or a path that may not be used. Denials that name no path (of a signal, a socket) are not."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or (error.errno in _PLACES and error.filename is not None)


def _describe_place(error: OSError) -> str:
    named = error.filename is not None
    path = os.path.abspath(os.fsdecode(error.filename)) if named else "a file that the system does not name"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        change = "free some space (`df -h` shows the file systems) or choose another output folder, and start again"
    else:
        change = "choose a place that you may use, or change the permissions of this one"
    return f"{_PLACES[error.errno]}: {path}\n  change: {change}"


def _stdout_is_closed() -> bool:
    """Whether the reader of our standard output has gone away."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
