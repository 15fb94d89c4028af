"""Saving a run from all its ranks, while training waits or while it goes on.

Every rank writes its share (`layout.py`), all of them into one temporary folder, so all must see the run directory;
what each has written (names, sizes, hashes) travels to rank 0, which commits (`store.py`). A failure on any of them is
a failure of the save, which leaves nothing behind.

Tensors come one after the other, moved to the rank that writes them and to the host when it is their turn, and a thread
writes them. In an asynchronous save training waits until all have come, as copies, and goes on while they are written:
that costs every rank the memory of its share once more, freed tensor by tensor. In a synchronous one, and where memory
would run short (`available_memory`), no more of them are there at a time than fit into `BUFFER` and two beyond,
whatever the size of the model, and training waits to the end. The files are the same, bit for bit.

No deadlock. The thread has a process group of its own (gloo) and nobody else uses it, so its one collective cannot
cross those of training. What training needs to know, that the save in flight is over and how it ended, it asks in its
own collectives (`settle`), at points that all ranks reach alike: after each step, and before the next save. There is
one save in flight at most. Ranks that move tensors wait for each other's disks, a buffer at a time; those that are done
with it wait for the others on a group that has the patience.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from braid.parallel.mesh import Mesh

from .folder import reads_back
from .handover import Handover
from .pieces import LocalTensor
from .store import Attempt, CheckpointStore, SaveFailed, format_bytes
from .writing import Written, write_tensors

WRITING_TIMEOUT_S = 3600.0
"""Patience of a rank that is done with one that still writes."""
CLOSING_TIMEOUT_S = 600.0
"""Patience of a run that ends in an error with its save in flight."""
FOLDER_TIMEOUT_S = 30.0
"""How long a network file system may take to show a folder that another machine has made."""
MEMORY_MARGIN = 2**29
"""Bytes of host memory that an asynchronous save leaves free."""
MEMORY_STEP = 2**26
"""Bytes copied before it is asked again how much there is: other processes copy too."""
BUFFER = 2**28
"""Bytes of tensors on the host that are not yet written, in a save for which training waits; one may be more."""
POLL_S = 0.02


@dataclass(frozen=True)
class Ended:
    """A save that is over; `problem` is None when the checkpoint is there."""

    step: int
    problem: SaveFailed | None


class Saver:
    """Saves on all ranks of a mesh. `start`, `settle` and the construction are collective.

    Args:
        store: of each rank; rank 0 has entered its own.
        asynchronous: train on while the files are written.
        report: told whatever is worth a line.
    """

    def __init__(
        self, store: CheckpointStore, mesh: Mesh, *, asynchronous: bool, report: Callable[[str], None] = print
    ) -> None:
        self.store, self.world, self.asynchronous, self.report = store, mesh.world, asynchronous, report
        self._group = self._patient = None
        if self.world.size > 1:
            # One for the threads, and one for those who wait.
            self._group, self._patient = (
                dist.new_group(timeout=timedelta(seconds=WRITING_TIMEOUT_S), backend="gloo") for _ in range(2)
            )
        self._step: int | None = None  # of the save in flight
        self._problem: SaveFailed | None = None  # known to rank 0, once it is over
        self._defect: Exception | None = None  # an error of ours on this rank
        self._thread: threading.Thread | None = None

    def start(
        self,
        step: int,
        groups: Mapping[str, Mapping[str, LocalTensor]],
        state: dict[str, Any],
        files: Mapping[str, bytes] | None = None,
        values: Iterable[tuple[str, str, Tensor]] | None = None,
    ) -> None:
        """Begin a save; it is over when `settle` says so. A step already saved and valid is left alone.

        Args:
            groups: group -> name -> what this rank writes of the tensor.
            state: what JSON gives back as it was (string keys, lists); rank 0's counts.
            files: relative name -> content; rank 0's count.
            values: (group, name, values) of each of `groups`, which may then be on the device `meta`; the iteration may
                be collective, and is not begun where nothing is saved.
        """
        assert self._step is None, "settle the save before"
        text, files = json.dumps(state, indent=1), files or {}
        assert json.loads(text) == state or "NaN" in text, "state must survive JSON: string keys, lists, no tuples"
        size = sum(each.values.nbytes for named in groups.values() for each in named.values())
        size = int(self.world.all_reduce_sum(torch.tensor(size)))
        attempt = problem = None
        if self.world.rank == 0:
            try:
                attempt = self.store.begin(step, size + len(text) + sum(map(len, files.values())))
            except SaveFailed as error:
                problem = error
        attempt, problem = self.world.broadcast_object((attempt, problem))
        self._step, self._problem, self._defect, self._thread = step, problem, None, None
        if attempt is None:  # it has failed, or was there already
            return
        self.store.num_saves += 1
        handover = Handover()
        work = (attempt, groups, handover, text, files)
        self._thread = threading.Thread(target=self._work, args=work, name="checkpoint", daemon=True)
        self._thread.start()
        if values is None:
            values = ((group, name, each.values) for group, named in groups.items() for name, each in named.items())
        try:
            short = self._give(values, handover)
        except BaseException:
            handover.end()
            self._thread = None  # what was not given cannot be finished
            raise
        num_short = self._count(short)
        if num_short and self.world.rank == 0:
            self.report(
                f"the checkpoint of step {step} is saved while training waits: its {format_bytes(size)} are more than "
                f"the host memory of {num_short} of {self.world.size} ranks can hold once more"
            )
        if num_short or not self.asynchronous:
            self._wait()

    def settle(self, *, wait: bool) -> Ended | None:
        """How the save in flight ended; None where there is none, or it is not over and nobody is to wait for it."""
        if self._step is None:
            return None
        if wait:
            self._wait()
        elif self._running():
            return None
        problem = self.world.broadcast_object(self._problem)
        if self._defect is not None:
            raise self._defect
        step, self._step, self._thread = self._step, None, None
        return Ended(step, problem)

    def _running(self) -> bool:
        """Whether a writer is not done, on all ranks alike. Collective."""
        return self.world.any(self._thread is not None and self._thread.is_alive())

    def _wait(self) -> None:
        """Until all writers are done. In short collectives, for they may write longer than one has patience."""
        while self._running():
            self._thread.join(POLL_S)

    def _count(self, flag: bool) -> int:
        """On how many ranks it is true, once all have come here; they may still write what others wait for."""
        count = torch.tensor(int(flag))
        if self._patient is not None:
            with self.world.watching():
                arriving = dist.all_reduce(count, group=self._patient, async_op=True)
                while not arriving.is_completed():  # else no signal would be looked at
                    time.sleep(POLL_S)
                arriving.wait()
        return int(count)

    def close(self, *, wait: bool) -> None:
        """The run ends, perhaps in the middle of a save, and perhaps without its peers: not collective. The save is
        finished if it can be, or, not to `wait`, left as a kill would leave it."""
        if self._thread is None:
            return
        if wait:
            self._thread.join(CLOSING_TIMEOUT_S)
        if self.world.rank == 0 and self._thread.is_alive():
            self.report(f"the checkpoint of step {self._step} was not finished")
        elif self._problem is not None:
            self.report(f"the checkpoint of step {self._step} could not be saved\n{self._problem}")

    def _give(self, values: Iterable[tuple[str, str, Tensor]], handover: Handover) -> bool:
        """Hand what this rank writes to its thread, on the CPU; for an asynchronous save copies, as long as there is
        memory for them. Whether there was not."""
        room, short = 0, False
        for group, name, each in values:
            if self.asynchronous and not short and room < each.nbytes:
                room = min(available_memory() - MEMORY_MARGIN, max(each.nbytes, MEMORY_STEP))
                short = room < each.nbytes
            room -= each.nbytes
            copied = self.asynchronous and not short
            handover.give((group, name), each.detach().to("cpu", copy=copied), None if copied else BUFFER)
            del each  # while the next is waited for
        return short

    # -- what a writer does, in its thread -----------------------------------------------------------------------------

    def _work(
        self,
        attempt: Attempt,
        groups: Mapping[str, Mapping[str, LocalTensor]],
        handover: Handover,
        state: str,
        files: Mapping[str, bytes],
    ) -> None:
        cause = None
        try:
            written = self._write(attempt, groups, handover)
        except Exception as error:
            cause, written = error, f"{type(error).__name__}: {error}"
            if isinstance(error, OSError):
                written = str(error)
            else:
                self._defect = error
            if self.world.rank:
                written = f"rank {self.world.rank} on {socket.gethostname()}: {written}"
        handover.end()
        try:
            self._finish(attempt, self._gather(written), cause, state, files)
        except SaveFailed as failure:
            self._problem = failure
        except Exception as error:
            self._defect = error

    def _write(self, attempt: Attempt, groups: Mapping[str, Mapping[str, LocalTensor]], handover: Handover) -> Written:
        deadline = time.monotonic() + FOLDER_TIMEOUT_S
        while not attempt.temporary.is_dir():
            if time.monotonic() > deadline:
                raise OSError(
                    f"{attempt.temporary.absolute()}, made by rank 0, is not seen here; "
                    "run.dir must be on a file system that all machines of the run share"
                )
            time.sleep(0.1)
        rank, size = self.world.rank, self.world.size
        written = write_tensors(attempt.temporary, groups, self.store.fault, rank, size, handover.take)
        if rank and (problem := reads_back(attempt.temporary, written.files)):
            raise OSError(f"what was written reads back differently: {problem}")
        return written

    def _gather(self, written: Written | str) -> list[Written | str]:
        """What every writer has written, or why it has not; rank 0 alone gets it."""
        if self._group is None:
            return [written]
        box = [None] * self.world.size if self.world.rank == 0 else None
        try:
            dist.gather_object(written, box, group=self._group, group_dst=0)
        except RuntimeError as error:  # all that gloo raises
            return [f"another rank died or is stuck: {str(error).splitlines()[0]}"]
        return box or []

    def _finish(
        self,
        attempt: Attempt,
        by_writers: list[Written | str],
        cause: Exception | None,
        state: str,
        files: Mapping[str, bytes],
    ) -> None:
        if self.world.rank != 0:
            return
        problems = [each for each in by_writers if isinstance(each, str)]
        if problems:
            self.store.abandon(attempt)
            raise attempt.failed("; ".join(problems)) from cause
        self.store.commit(attempt, by_writers, state, files)


def available_memory() -> int:
    """Bytes of host memory that this process can still take: the machine's, or the container's (cgroup 2) if less."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    fields = {name: int(value.split()[0]) * 1024 for name, value in (line.split(":") for line in lines)}
    available = fields.get("MemAvailable", 2**63 - 1)
    group = Path("/sys/fs/cgroup")
    try:
        most = (group / "memory.max").read_text().strip()
        if most != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cached = int(stat["inactive_file"]) + int(stat["active_file"])
            available = min(available, int(most) - int((group / "memory.current").read_text()) + cached)
    except (OSError, KeyError):  # no such controller here
        pass
    return available
