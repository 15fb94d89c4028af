"""Checkpoints that a crash at any instant leaves loadable.

`folder.py` says what one checkpoint is; this file finds them, commits them and clears them away. A save (`saver.py`)
goes in this order, and each arrow is a point at which a process may die (`faults.py`):

    free space is enough -> temporary folder beside the checkpoints -> tensors by every writer, each file fsynced
    -> the other files, manifest last, fsynced -> everything read back from disk -> rename -> parent fsynced
    -> `latest` replaced -> old checkpoints removed

Nothing is ever written into a committed folder. `latest` is for people and scripts; loading looks at the folders
themselves, because a process may die between the rename and the pointer.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from braid.kernels.errors import BraidError, CheckpointError
from braid.parallel.data_parallel import World
from braid.pretrain.checkpoint.faults import fault_point
from braid.pretrain.checkpoint.files import RunLock, fsync_folder, write_atomically
from braid.pretrain.checkpoint.folder import verify_folder
from braid.pretrain.checkpoint.writing import Written, seal_folder

ALONE = World.single()
POINTER = "latest"
UNSEEN = "there is no such folder"
SPACE_MARGIN = 16 * 2**20
"""Bytes that must stay free beside the checkpoint's own: metadata of the file system, logs written meanwhile."""

Report = Callable[[str], None]


class SaveFailed(BraidError):
    """A checkpoint could not be written; the ones before it are untouched. The training loop decides what to do.

    Attributes:
        path: the checkpoint that was to be. needed, free: bytes (free is -1 where the system would not say).
    """

    exit_code = 4

    def __init__(self, path: Path, needed: int, free: int, reason: str) -> None:
        self.path, self.needed, self.free = path, needed, free
        space = f"needs {format_bytes(needed)}, free {format_bytes(free) if free >= 0 else 'unknown'}"
        change = "free space or permissions there; earlier checkpoints are untouched"
        super().__init__(f"checkpoint {path} could not be saved", found=f"{reason} ({space})", change=change)
        self._reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return SaveFailed, (self.path, self.needed, self.free, self._reason)


@dataclass(frozen=True)
class Attempt:
    """A checkpoint that is being written; `needed` and `free` are bytes."""

    step: int
    final: Path
    temporary: Path
    needed: int
    free: int

    def failed(self, reason: str) -> SaveFailed:
        return SaveFailed(self.final, self.needed, self.free, reason)


class CheckpointStore:
    """The checkpoints of one run, in `<run>/checkpoints`.

    Any process may construct one and read. The one process that saves enters it (`with store:`), which takes the run's
    lock (`<run>/.lock`) and removes what interrupted saves left behind. In a run of several ranks that is rank 0; the
    others wait at a barrier of the caller's.

    Args:
        folder: the folder of the `step-N` folders; its parent is the run folder.
        keep: newest valid checkpoints kept when a newer one has been verified; 0 keeps all.
        report: told, in one line, whatever is worth saying: damage, leftovers, what was removed or moved aside.
    """

    def __init__(self, folder: Path, keep: int = 2, report: Report | None = None) -> None:
        self.folder, self.keep = Path(folder), keep
        self.report = report or _to_stderr
        self._lock: RunLock | None = None
        self.num_saves = 0  # begun by this process
        # What full verification found, so that a purge hashes each older checkpoint once per process, not per save.
        self._problems: dict[int, str | None] = {}

    def __enter__(self) -> CheckpointStore:
        self._lock = RunLock(self.folder.parent, report=self.report)
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            self.__exit__()
            change = "clear the way for it, or choose another run.dir"
            raise CheckpointError(f"{self.folder} cannot be made", found=str(error), change=change) from error
        for leftover in sorted(self.folder.glob(".tmp-*")):  # the lock is ours, so no living process is writing them
            self._remove(leftover, "left by an interrupted save")
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._lock is not None
        self._lock.release()
        self._lock = None

    # -- reading ------------------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Steps that have a folder, valid or not, oldest first."""
        if not self.folder.is_dir():
            return []
        matches = (re.fullmatch(r"step-(\d{8,})", entry.name) for entry in self.folder.iterdir() if entry.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def latest_step(self) -> int | None:
        """Newest step that has a folder, valid or not: a listing, cheap enough for every step."""
        return max(self.steps(), default=None)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of `step`.

        Raises:
            CheckpointError: there is none; the message lists the steps there are.
        """
        if step not in self.steps():
            present = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(
                f"no checkpoint of step {step} in {self.folder}", found=f"steps {present}", change="name one of these"
            )
        return self._path(step)

    def verify(self, step: int) -> str | None:
        """What is wrong with the checkpoint of `step`, all hashes re-computed; None when nothing is."""
        self._problems[step] = problem = verify_folder(self._path(step), step=step)
        return problem

    def latest_valid(
        self, report: Report | None = None, *, groups: Collection[str] | None = None, world: World = ALONE
    ) -> tuple[int, Path] | None:
        """Step and folder of the newest checkpoint that verifies; says which newer ones do not, and why. Collective
        over the ranks of `world`, which share the work and get the same answer.

        groups: the groups whose tensors matter; None is all of them.

        Raises:
            CheckpointError: a rank does not see what rank 0 sees.
        """
        for step in reversed(world.broadcast_object(self.steps())):
            path = self._path(step)
            share = (world.rank, world.size)
            here = verify_folder(path, step=step, groups=groups, share=share) if path.is_dir() else UNSEEN
            problems = world.all_gather_object(here)
            _check_seen(path, problems)
            problem = next(filter(None, problems), None)
            if groups is None:
                self._problems[step] = problem
            if problem is None:
                return step, path
            if world.rank == 0:
                (report or self.report)(f"checkpoint {path} is damaged and was passed over: {problem}")
        return None

    # -- writing ------------------------------------------------------------------------------------------------------

    def begin(self, step: int, num_bytes: int) -> Attempt | None:
        """Make the temporary folder of a checkpoint of so many bytes. None where the step is saved already and valid:
        such a checkpoint is left alone.

        Raises:
            SaveFailed: no space, no permission, an I/O error.
        """
        assert self._lock is not None, "enter the store before saving: `with store:`"
        final = self._path(step)
        if final.exists() and self.verify(step) is None:
            self.report(f"checkpoint {final} exists and is valid: not written again")
            self._point_to(final)
            return None
        temporary = self.folder / f".tmp-{final.name}-{os.getpid()}"
        attempt = Attempt(step, final, temporary, num_bytes + SPACE_MARGIN, -1)
        try:
            self.folder.mkdir(exist_ok=True)
            attempt = replace(attempt, free=shutil.disk_usage(self.folder).free)
            if attempt.free < attempt.needed:
                raise attempt.failed("too little space")
            temporary.mkdir()
        except OSError as error:
            raise attempt.failed(str(error)) from error
        return attempt

    def commit(
        self, attempt: Attempt, by_writers: Sequence[Written], state: str, files: Mapping[str, bytes | Path]
    ) -> Path:
        """Finish the folder in which all writers have written, this process as the first of them; put it in its place
        and remove the checkpoints it makes superfluous. What the other writers wrote they have read back themselves.

        Returns:
            the checkpoint's folder.

        Raises:
            SaveFailed: an I/O error, or what was written reads back differently; the temporary folder is gone.
        """
        committed = False
        try:
            seal_folder(attempt.temporary, attempt.step, by_writers, state, files, self.fault)
            trusted = {name for written in by_writers[1:] for name in written.files}
            problem = verify_folder(attempt.temporary, step=attempt.step, from_disk=True, trusted=trusted)
            if problem:
                raise attempt.failed(f"what was written reads back differently: {problem}")
            self.fault("before_rename")
            self._move_aside(attempt.final)
            os.rename(attempt.temporary, attempt.final)
            committed = True
            self.fault("after_rename")
            fsync_folder(self.folder)
        except OSError as error:
            raise attempt.failed(str(error)) from error
        finally:
            if not committed:
                self.abandon(attempt)
        self._problems[attempt.step] = None
        self._point_to(attempt.final)
        self._purge(attempt.step)
        return attempt.final

    def abandon(self, attempt: Attempt) -> None:
        """Remove what was written of a checkpoint that will not be."""
        shutil.rmtree(attempt.temporary, ignore_errors=True)

    def fault(self, phase: str) -> None:
        """Die here if a test asks for it."""
        fault_point(phase, self.num_saves)

    def _point_to(self, final: Path) -> None:
        """Replace `latest`. The checkpoint is committed by now, so a failure is told and costs nothing."""
        try:
            self.fault("before_pointer")
            write_atomically(self.folder / POINTER, f"{final.name}\n".encode())
        except OSError as error:
            self.report(f"{final} is saved, but {self.folder / POINTER} could not be updated: {error}")

    def _purge(self, saved: int) -> None:
        """Remove all but the newest `keep` valid checkpoints. Damaged ones neither count nor are touched.

        Never raises: what cannot be removed today is tried again after the next save.
        """
        if self.keep == 0:
            return
        num_valid = 0
        try:
            for step in reversed(self.steps()):
                path = self._path(step)
                if step not in self._problems and self.verify(step) is not None:
                    self.report(f"checkpoint {path} is damaged and not counted: {self._problems[step]}")
                if self._problems[step] is not None:
                    continue
                num_valid += 1
                if num_valid > self.keep and step != saved:
                    hidden = self.folder / f".tmp-purged-{path.name}-{os.getpid()}"
                    os.rename(path, hidden)  # out of sight first: half a folder must not look like a damaged checkpoint
                    self.fault("during_purge")
                    self._remove(hidden)
        except OSError as error:
            self.report(f"old checkpoints in {self.folder} could not all be removed: {error}")

    def _remove(self, path: Path, why: str = "") -> None:
        try:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError as error:
            self.report(f"{path} could not be removed: {error}")
        else:
            if why:
                self.report(f"removed {path}, {why}")

    def _move_aside(self, final: Path) -> None:
        """Keep an invalid folder of this step, for whoever wants to see what happened, but under no step's name."""
        if not final.exists():
            return
        number = 1
        while (aside := final.with_name(f"{final.name}.damaged-{number}")).exists():
            number += 1
        os.rename(final, aside)
        self.report(f"moved the damaged {final} aside, to {aside.name}")

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"


def _check_seen(path: Path, problems: Sequence[str | None]) -> None:
    blind = [rank for rank, problem in enumerate(problems) if problem == UNSEEN]
    if blind:
        raise CheckpointError(
            f"not every rank sees the checkpoint {path}",
            found=f"it is not there for rank {', '.join(map(str, blind))}",
            change="put run.dir on a file system that all machines of the run share, under the same path",
        )


def format_bytes(number: int) -> str:
    """For people."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
