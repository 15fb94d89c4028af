"""Files that survive a crash: atomic replacement, fsync, hashes, and a lock."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

from braid.kernels.errors import CheckpointError, InputError

CHUNK = 8 * 2**20
"""Bytes written or read at a time."""


def fsync_folder(folder: Path) -> None:
    """Make the entries of `folder` (created, renamed, removed names) durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems without directory fsync say EINVAL; they have nothing to flush
            raise
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content` so that a reader, or a crash, sees the old file or the new one, never a mixture."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def hash_file(path: Path, *, from_disk: bool = False) -> tuple[int, str]:
    """Size in bytes and xxh3_128 of a file. `from_disk` drops its cached pages first, where the system can."""
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "rb", buffering=0) as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def write_file(path: Path, chunks: Iterator[bytes | memoryview]) -> tuple[int, str]:
    """Write a new file and fsync it; returns its size and the xxh3_128 of what was handed in (not of what was read)."""
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "xb") as file:
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            file.write(chunk)
            del chunk  # it may be the memory of a tensor
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def file_chunks(path: Path) -> Iterator[bytes]:
    """The bytes of an existing file, a chunk at a time."""
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


class RunLock:
    """Exclusive lock of a run folder, held by the one process that writes it: `<run>/.lock`.

    A POSIX record lock: the system drops it when the process ends, however it ends, and a forked loader process does
    not inherit it (a `flock` would outlive a killed trainer in its children and stop the restart). It excludes other
    processes, not a second lock within this one.

    Raises:
        CheckpointError: the folder cannot be made or written, or another process still holds the lock after `wait_s`
            seconds (the message names its process id and host).
    """

    def __init__(self, run_dir: Path, *, wait_s: float = 10.0, report: Callable[[str], None] = print) -> None:
        self.path = run_dir / ".lock"
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(
                f"the run folder {run_dir} cannot be written", found=str(error), change="choose another run.dir"
            ) from error
        # A process that was just killed may take a moment to go, and its successor must not fail for it: hence a wait.
        deadline = time.monotonic() + wait_s
        while not self._try_lock(report):
            if time.monotonic() >= deadline:
                holder = os.read(self._descriptor, 200).decode(errors="replace").strip() or "an unknown process"
                os.close(self._descriptor)
                raise CheckpointError(
                    f"another process is writing the run in {run_dir}",
                    found=f"{self.path} is held by {holder}; waited {wait_s:g} s",
                    change="end that process, or give this run another run.dir",
                )
            time.sleep(0.05)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def _try_lock(self, report: Callable[[str], None]) -> bool:
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # POSIX allows either for "held by another"
                return False
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                report(f"{self.path}: no locks on this file system ({error}); see that one process writes this run")
                return True
            raise
        return True

    def release(self) -> None:
        """Give the lock back. The file stays: removing it would race with a process that has just opened it."""
        os.close(self._descriptor)


def check_place(path: Path) -> None:
    """Make the folder of a file that is to be written later, and try it: what cannot be written should be known before
    the work for it is done.

    Raises InputError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        change = "name a file in a folder that can be written to"
        raise InputError(f"{path} cannot be written", found=os.strerror(error.errno), change=change) from error
