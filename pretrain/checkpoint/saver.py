"""Saving a run from all its ranks, while training waits or while it goes on.

Writers are the ranks with position 0 on the reduction axis: together they hold the model once. All of them write into
one temporary folder, so all must see the run directory; what each has written (names, sizes, hashes) travels to rank 0,
which commits (`store.py`). A failure on any of them is a failure of the save, which leaves nothing behind.

An asynchronous save costs every writer the memory of what it writes once more, on the host: with AdamW and averaged
weights 16 bytes for each parameter it holds. Training waits while that is copied; a thread then writes the copies, and
commits, and frees them. Where memory would run short (`available_memory`), training waits for that save instead. The
files are the same, bit for bit.

No deadlock. The thread has a process group of its own (gloo, writers only) and nobody else uses it, so its one
collective cannot cross those of training. What training needs to know, that the save in flight is over and how it
ended, it asks in its own collectives (`settle`), at points that all ranks reach alike: after each step, and before the
next save. There is one save in flight at most.
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

from braid.parallel.mesh import Mesh

from .folder import reads_back
from .pieces import LocalTensor
from .store import Attempt, CheckpointStore, SaveFailed, format_bytes
from .writing import Written, write_tensors

WRITING_TIMEOUT_S = 3600.0
"""Patience of a writer that is done with one that still writes."""
CLOSING_TIMEOUT_S = 600.0
"""Patience of a run that ends in an error with its save in flight."""
FOLDER_TIMEOUT_S = 30.0
"""How long a network file system may take to show a folder that another machine has made."""
MEMORY_MARGIN = 2**29
"""Bytes of host memory that an asynchronous save leaves free."""
MEMORY_STEP = 2**26
"""Bytes copied before it is asked again how much there is: other processes copy too."""
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
        writes = self.world.all_gather_object(mesh.reduction.rank == 0)
        writers = [rank for rank, each in enumerate(writes) if each]
        self.num_writers = len(writers)
        self.writer = writers.index(self.world.rank) if self.world.rank in writers else None
        self._group = None
        if self.num_writers > 1:
            self._group = dist.new_group(writers, timedelta(seconds=WRITING_TIMEOUT_S), backend="gloo")
        self._step: int | None = None  # of the save in flight
        self._problem: SaveFailed | None = None  # known to rank 0, once it is over
        self._defect: Exception | None = None  # an error of ours on this rank
        self._thread: threading.Thread | None = None

    def start(
        self,
        step: int,
        groups: Mapping[str, Iterable[tuple[str, LocalTensor]]],
        state: dict[str, Any],
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Begin a save; it is over when `settle` says so. A step already saved and valid is left alone.

        Args:
            groups: group -> (name, what this rank writes of the tensor); the iteration may be collective, so that ranks
                which write nothing go through it too.
            state: what JSON gives back as it was (string keys, lists); rank 0's counts.
            files: relative name -> content; rank 0's count.
        """
        assert self._step is None, "settle the save before"
        text, files = json.dumps(state, indent=1), files or {}
        assert json.loads(text) == state or "NaN" in text, "state must survive JSON: string keys, lists, no tuples"
        tensors, short = self._collect(groups)
        size = sum(each.values.nbytes for named in tensors.values() for each in named.values())
        size, num_short = self.world.all_reduce_sum(torch.tensor([size, short])).tolist()
        if num_short and self.world.rank == 0:
            self.report(
                f"the checkpoint of step {step} is saved while training waits: its {format_bytes(size)} are more than "
                f"the host memory of {num_short} of {self.num_writers} writers can hold once more"
            )
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
        work = (attempt, tensors, text, files)
        if self.writer is not None:
            self._thread = threading.Thread(target=self._work, args=work, name="checkpoint", daemon=True)
            self._thread.start()
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
            if self._thread is None:
                time.sleep(POLL_S)
            else:
                self._thread.join(POLL_S)

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

    def _collect(self, groups: Mapping[str, Iterable[tuple[str, LocalTensor]]]) -> tuple[dict, bool]:
        """What this rank writes, on the CPU; for an asynchronous save copies, as long as there is memory for them.
        Whether there was not."""
        tensors: dict[str, dict[str, LocalTensor]] = {}
        room, short = 0, False
        for group, named in groups.items():
            tensors[group] = {}
            for name, local in named:
                values = local.values.detach()
                if self.asynchronous and not short and room < values.nbytes:
                    room = min(available_memory() - MEMORY_MARGIN, max(values.nbytes, MEMORY_STEP))
                    short = room < values.nbytes
                room -= values.nbytes
                values = values.to("cpu", copy=self.asynchronous and not short)
                tensors[group][name] = LocalTensor(values, local.shape, local.part)
        return tensors, short

    # -- what a writer does, in its thread -----------------------------------------------------------------------------

    def _work(self, attempt: Attempt, tensors: dict, state: str, files: Mapping[str, bytes]) -> None:
        cause = None
        try:
            written = self._write(attempt, tensors)
        except Exception as error:
            cause, written = error, f"{type(error).__name__}: {error}"
            if isinstance(error, OSError):
                written = str(error)
            else:
                self._defect = error
            if self.writer:
                written = f"rank {self.world.rank} on {socket.gethostname()}: {written}"
        try:
            self._finish(attempt, self._gather(written), cause, state, files)
        except SaveFailed as failure:
            self._problem = failure
        except Exception as error:
            self._defect = error

    def _write(self, attempt: Attempt, tensors: dict[str, dict[str, LocalTensor]]) -> Written:
        deadline = time.monotonic() + FOLDER_TIMEOUT_S
        while not attempt.temporary.is_dir():
            if time.monotonic() > deadline:
                raise OSError(
                    f"{attempt.temporary.absolute()}, made by rank 0, is not seen here; "
                    "run.dir must be on a file system that all machines of the run share"
                )
            time.sleep(0.1)
        written = write_tensors(attempt.temporary, tensors, self.store.fault, self.writer, self.num_writers)
        if self.writer and (problem := reads_back(attempt.temporary, written.files)):
            raise OSError(f"what was written reads back differently: {problem}")
        return written

    def _gather(self, written: Written | str) -> list[Written | str]:
        """What every writer has written, or why it has not; rank 0 alone gets it."""
        if self._group is None:
            return [written]
        box = [None] * self.num_writers if self.writer == 0 else None
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
        if self.writer != 0:
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
