"""Faults on request, for tests of the commit protocol. Nothing sets the variable but tests.

`BRAID_FAULT="save:<phase>:<action>[@N]"` makes the N-th save of a store (the first by default; saves that find the
step already there do not count) fail at a phase:

    before_write     the temporary folder exists, nothing of this process is in it
    during_tensors   the first tensor of the first file is on its way, its file is incomplete
    after_tensors    every tensor file of this process is written and fsynced
    before_manifest  every other file is, too
    after_manifest   the manifest is written and fsynced
    before_rename    all was read back from disk and is right
    after_rename     the checkpoint is committed, its name not yet fsynced
    before_pointer   its name is durable, `latest` still names the previous one
    during_purge     an old checkpoint has been taken out of sight and not yet removed

The first three are met by every process that writes, the others by rank 0; in an asynchronous save while training goes
on.

`kill` is SIGKILL to the process itself; `enospc` raises the OSError of a full disk; `hang` stays there for an hour, as
with a file system that does not answer.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time

from braid.kernels.errors import InputError

PHASES = (
    "before_write", "during_tensors", "after_tensors", "before_manifest", "after_manifest",
    "before_rename", "after_rename", "before_pointer", "during_purge",
)  # fmt: skip
ACTIONS = ("kill", "enospc", "hang")


def fault_point(phase: str, save_number: int) -> None:
    """Do what `BRAID_FAULT` asks for at this phase of the `save_number`-th save (counted from 1), if anything."""
    assert phase in PHASES, phase
    wish = os.environ.get("BRAID_FAULT")
    if not wish:
        return
    match = re.fullmatch(r"save:(\w+):(\w+)(?:@(\d+))?", wish)
    if not match or match[1] not in PHASES or match[2] not in ACTIONS:
        raise InputError(
            "BRAID_FAULT is not understood",
            found=wish,
            change=f"unset it, or save:<phase>:<action>[@N] with a phase of {PHASES} and an action of {ACTIONS}",
        )
    if match[1] != phase or int(match[3] or 1) != save_number:
        return
    if match[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if match[2] == "hang":
        time.sleep(3600)
    raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (BRAID_FAULT)")
