"""Checkpoints that a crash at any instant leaves loadable.

`folder.py` says what one checkpoint is; this file makes them, finds them and clears them away. A save commits in this
order, and each arrow is a point at which the process may die (`faults.py`):

    free space is enough -> temporary folder beside the checkpoints -> files, each fsynced -> manifest, fsynced
    -> everything read back from disk -> rename -> parent fsynced -> `latest` replaced -> old checkpoints removed

Nothing is ever written into a committed folder. `latest` is for people and scripts; loading looks at the folders
themselves, because a process may die between the rename and the pointer.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from braid.kernels.errors import BraidError, CheckpointError
from braid.pretrain.checkpoint.faults import fault_point
from braid.pretrain.checkpoint.files import (
    RunLock,
    file_chunks,
    fsync_folder,
    safetensors_chunks,
    write_atomically,
    write_file,
)
from braid.pretrain.checkpoint.folder import (
    FORMAT,
    MANIFEST,
    STATE,
    Checkpoint,
    load_checkpoint,
    render_manifest,
    verify_folder,
)

if TYPE_CHECKING:
    from torch import Tensor

POINTER = "latest"
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
        space = f"needs {_bytes(needed)}, free {_bytes(free) if free >= 0 else 'unknown'}"
        change = "free space or permissions there; earlier checkpoints are untouched"
        super().__init__(f"checkpoint {path} could not be saved", found=f"{reason} ({space})", change=change)


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
        self._num_saves = 0
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

    def latest_valid(self, report: Report | None = None) -> tuple[int, Path] | None:
        """Step and folder of the newest checkpoint that verifies; says which newer ones do not, and why."""
        for step in reversed(self.steps()):
            problem = self.verify(step)
            if problem is None:
                return step, self._path(step)
            (report or self.report)(f"checkpoint {self._path(step)} is damaged and was passed over: {problem}")
        return None

    def load(self, path: Path, groups: Collection[str] | None = None) -> Checkpoint:
        """See `load_checkpoint`."""
        return load_checkpoint(path, groups)

    # -- writing ------------------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        groups: Mapping[str, Mapping[str, Tensor]],
        state: dict[str, Any],
        files: Mapping[str, bytes | Path] | None = None,
    ) -> Path:
        """Commit a checkpoint and remove the ones it makes superfluous. A step already saved and valid is left alone.

        Args:
            groups: group -> name -> tensor (any device; full logical tensors); `<group>.safetensors` each.
            state: what JSON gives back as it was (string keys, lists).
            files: relative name -> content, or a file to copy.

        Returns:
            the checkpoint's folder.

        Raises:
            SaveFailed: no space, no permission, an I/O error, or what was written reads back differently.
        """
        assert self._lock is not None, "enter the store before saving: `with store:`"
        files = files or {}
        text = json.dumps(state, indent=1)
        assert json.loads(text) == state or "NaN" in text, "state must survive JSON: string keys, lists, no tuples"
        final = self._path(step)
        if final.exists() and self.verify(step) is None:
            self.report(f"checkpoint {final} exists and is valid: not written again")
            self._point_to(final)
            return final
        self._num_saves += 1
        needed = len(text) + SPACE_MARGIN
        needed += sum(t.numel() * t.element_size() for tensors in groups.values() for t in tensors.values())
        temporary = self.folder / f".tmp-{final.name}-{os.getpid()}"
        free, committed = -1, False
        try:
            needed += sum(len(f) if isinstance(f, bytes) else f.stat().st_size for f in files.values())
            self.folder.mkdir(exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise SaveFailed(final, needed, free, "too little space")
            self._write(temporary, step, groups, text.encode(), files)
            problem = verify_folder(temporary, step=step, from_disk=True)
            if problem:
                raise SaveFailed(final, needed, free, f"what was written reads back differently: {problem}")
            self._fault("before_rename")
            self._move_aside(final)
            os.rename(temporary, final)
            committed = True
            self._fault("after_rename")
            fsync_folder(self.folder)
        except OSError as error:
            raise SaveFailed(final, needed, free, str(error)) from error
        finally:
            if not committed:
                shutil.rmtree(temporary, ignore_errors=True)
        self._problems[step] = None
        self._point_to(final)
        self._purge(step)
        return final

    def _write(
        self,
        folder: Path,
        step: int,
        groups: Mapping[str, Mapping[str, Tensor]],
        state: bytes,
        files: Mapping[str, bytes | Path],
    ) -> None:
        """Everything below `folder`, manifest last, all of it durable."""
        folder.mkdir()
        self._fault("before_write")
        written: dict[str, dict[str, Any]] = {}

        def write(name: str, chunks: Iterator[bytes | memoryview]) -> None:
            parts = PurePosixPath(name).parts
            assert parts and ".." not in parts and not name.startswith("/"), f"{name}: not a name below the checkpoint"
            assert name not in written and name != MANIFEST, f"{name}: taken"
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            size, digest = write_file(path, chunks)
            written[name] = {"size": size, "xxh3_128": digest}

        for group, tensors in groups.items():
            write(f"{group}.safetensors", safetensors_chunks(tensors, lambda: self._fault("during_tensors")))
        self._fault("after_tensors")
        write(STATE, iter([state]))
        for name, content in files.items():
            write(name, iter([content]) if isinstance(content, bytes) else file_chunks(content))
        for subfolder in {parent for name in written for parent in Path(name).parents}:
            fsync_folder(folder / subfolder)
        self._fault("before_manifest")
        manifest = {"format": FORMAT, "step": step, "groups": list(groups), "files": written}
        write_file(folder / MANIFEST, iter([render_manifest(manifest)]))
        fsync_folder(folder)
        self._fault("after_manifest")

    def _point_to(self, final: Path) -> None:
        """Replace `latest`. The checkpoint is committed by now, so a failure is told and costs nothing."""
        try:
            self._fault("before_pointer")
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
                    self._fault("during_purge")
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

    def _fault(self, phase: str) -> None:
        fault_point(phase, self._num_saves)


def _bytes(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
