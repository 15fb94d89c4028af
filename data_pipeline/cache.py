"""Shards of a store, kept as files on this machine for all of its processes.

    CACHE/KEY/train/shard.00000.mds           a shard that was fetched whole and checked
    CACHE/KEY/train/shard.00000.mds.lock      held (flock) by the process that fetches it; the others wait for it, and
                                              read in it why the last fetch failed, if it did
    CACHE/KEY/train/shard.00000.mds.HEX.tmp   what has come so far; without the lock held it is left over, and removed
    CACHE/.room.lock                          held while shards are removed to make room, and one is put in place

Locks belong to the kernel, which takes them back from a process however it ends: no start waits for a dead one. A
reader holds a shared lock on the shard itself as long as its file or a map of it is open, and nothing that is locked is
removed. Where that cannot hold (a file system without locks between machines) a map still outlives the name of its
file.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from braid.data_pipeline.remote import Store, content_problem
from braid.kernels.errors import BraidError, ConfigError, InputError, StoreFailed

HASH = "xxh3_64"
LOCK_POLL_S = 0.02
GRACE_S = 2.0  # waiting for another process is a little longer than it may take
AHEAD_THREADS = 4


@contextmanager
def locked(path: Path, timeout_s: float) -> Iterator[None]:
    """Hold the lock file `path` alone. Raises BlockingIOError where another process holds it for `timeout_s`."""
    with open(path, "ab") as file:
        _lock(file, fcntl.LOCK_EX, timeout_s)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # a child that was forked meanwhile has it open too


def _lock(file: BinaryIO, mode: int, timeout_s: float) -> None:
    give_up = time.monotonic() + timeout_s
    while True:
        try:
            return fcntl.flock(file, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up:
                raise
            time.sleep(LOCK_POLL_S * random.uniform(0.5, 1))


class CachedShards:
    """The shards of one split of a store, as files of `folder` in the cache. Shards are named by their entries in
    index.json (`raw_data`: basename, bytes, hashes).

    Each is fetched once, whichever process asks first. Above the limit, the shards that were opened longest ago are
    removed, of any corpus in the cache, except those that a process is reading; what is being fetched comes on top.
    """

    def __init__(self, store: Store, split: str, folder: Path) -> None:
        self.store, self.split, self.folder = store, split, folder
        self.limit_bytes = store.fetching.limit_bytes

    def open(self, entry: dict) -> BinaryIO:
        """The shard, fetched if it is not there. It stays there while the file, or a map of it, is open.

        Raises InputError when it is missing or damaged in the store, StoreFailed when it did not come in time."""
        begun, patience = time.time(), self.store.fetching.timeout_s + GRACE_S
        path = self._path(entry)
        with self._as_errors(path):
            while (file := self._opened(path, patience)) is None:
                with locked(_lock_of(path), patience):
                    if not path.exists():
                        _raise_failure_since(begun, _lock_of(path))  # of the fetch that was waited for
                        self._fetch(entry, path)
            return file

    def fetch_ahead(self, entry: dict) -> None:
        """Fetch the shard, unless it is here or another process fetches it."""
        path = self._path(entry)
        if not path.exists():
            with self._as_errors(path), suppress(BlockingIOError), locked(_lock_of(path), 0):
                if not path.exists():
                    self._fetch(entry, path)

    def discard(self, entry: dict) -> bool:
        """Remove a shard that was damaged on this machine; False when there is none."""
        path = self._path(entry)
        with self._as_errors(path), locked(_lock_of(path), self.store.fetching.timeout_s):
            there = path.exists()
            path.unlink(missing_ok=True)
        return there

    def _path(self, entry: dict) -> Path:
        name = entry["basename"]
        if Path(name).name != name:
            raise InputError(
                f"{self.store.url}/{self.split}/index.json names a shard outside of its folder",
                found=repr(name),
                change="prepare the corpus again",
            )
        return self.folder / name

    def _opened(self, path: Path, patience: float) -> BinaryIO | None:
        try:
            file = open(path, "rb")
        except FileNotFoundError:
            return None
        # On the file itself: a map keeps its file open, and with it the lock.
        _lock(file, fcntl.LOCK_SH, patience)
        if os.fstat(file.fileno()).st_nlink == 0:  # removed before it was locked
            file.close()
            return None
        os.utime(file.fileno())
        return file

    def _fetch(self, entry: dict, path: Path) -> None:
        """With the lock of the shard held."""
        remove_copies(path)
        num_bytes, expected = entry["bytes"], entry["hashes"][HASH]
        name = f"{self.split}/{path.name}"
        try:
            temporary = self.store.fetch(name, path, lambda copy: content_problem(copy, num_bytes, expected))
        except (InputError, StoreFailed) as error:
            failure = [type(error).__name__, error.what, error.found, error.change]
            _lock_of(path).write_text(json.dumps(failure), encoding="utf-8")
            raise
        # Not synced to disk: what a power failure leaves of it does not pass the check of its first reader.
        with locked(self.folder.parents[1] / ".room.lock", self.store.fetching.timeout_s):
            self._make_room(num_bytes)
            os.replace(temporary, path)

    def _make_room(self, num_bytes: int) -> None:
        if not self.limit_bytes:
            return
        found = []
        for path in self.folder.parents[1].glob("*/*/shard.*"):
            if path.suffix not in (".lock", ".tmp"):
                with suppress(FileNotFoundError):
                    status = path.stat()
                    found.append((status.st_mtime_ns, status.st_size, path))
        excess = sum(size for _, size, _ in found) + num_bytes - self.limit_bytes
        for _, size, path in sorted(found):
            if excess <= 0:
                break
            if _removed(path):
                excess -= size

    @contextmanager
    def _as_errors(self, path: Path) -> Iterator[None]:
        try:
            yield
        except BlockingIOError as error:
            raise StoreFailed(
                f"{path.name} of {self.store.url}/{self.split} did not come: another process is fetching it",
                found=f"{_lock_of(path)} is held for more than data.timeout_s={self.store.fetching.timeout_s:g}",
                change="see what that process waits for, or raise data.timeout_s",
            ) from error
        except OSError as error:
            raise StoreFailed(
                f"the cache of {self.store.url} cannot be used",
                found=f"{self.folder}: {error}",
                change="let data.cache name a folder on a local disk that this user may write to and that has space",
            ) from error


def remove_copies(path: Path) -> None:
    """Remove what killed processes have fetched of a file, whose lock is held."""
    for left in path.parent.glob(f"{path.name}.*.tmp"):
        left.unlink(missing_ok=True)


def remove_half_files(folder: Path) -> None:
    """The same of all shards in a folder, but those that a process is fetching."""
    for path in {left.with_name(left.name.rsplit(".", 2)[0]) for left in folder.glob("shard.*.tmp")}:
        with suppress(BlockingIOError), locked(_lock_of(path), 0):
            remove_copies(path)


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _raise_failure_since(begun: float, lock: Path) -> None:
    """Raise what the fetch of another has ended with."""
    if lock.stat().st_size and lock.stat().st_mtime >= begun:
        kind, what, found, change = json.loads(lock.read_text(encoding="utf-8"))
        raise {"InputError": InputError, "StoreFailed": StoreFailed}[kind](what, found=found, change=change)


def _removed(path: Path) -> bool:
    """Remove a shard, unless a process is reading it."""
    try:
        with open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    return True


class FetchingAhead:
    """Threads that fetch shards before they are read.

    A shard that does not come this way is fetched by its reader, who then says what is wrong with it."""

    def __init__(self, shards: CachedShards, entries: Sequence[dict], num_wanted: int) -> None:
        """num_wanted: shards that are wanted at a time, at most."""
        largest = sorted((entry["bytes"] for entry in entries), reverse=True)[:num_wanted]
        self.num_needed, self.bytes_needed, self.limit_bytes = len(largest), sum(largest), shards.limit_bytes
        self._shards, self._entries = shards, entries
        self._changed, self._wanted, self._closed = threading.Condition(), [], False
        self._threads: list[threading.Thread] = []

    def want(self, shards: Sequence[int]) -> None:
        """These shards are read next, in this order; what was wanted before and is not begun is forgotten."""
        with self._changed:
            self._wanted = list(shards)
            self._changed.notify_all()
        while len(self._threads) < AHEAD_THREADS:  # not before, for workers are forked from a process without threads
            self._threads.append(threading.Thread(target=self._run, name="fetching ahead", daemon=True))
            self._threads[-1].start()

    def close(self) -> None:
        with self._changed:
            self._wanted, self._closed = [], True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._closed)
                if self._closed:
                    return
                shard = self._wanted.pop(0)
            with suppress(BraidError):  # see above
                self._shards.fetch_ahead(self._entries[shard])


def check_limit(fetching: Sequence[FetchingAhead]) -> None:
    """Raises ConfigError when what the corpora of a run need at a time does not fit the cache they share."""
    limit = max((one.limit_bytes for one in fetching), default=0)
    needed = sum(one.bytes_needed for one in fetching)
    if limit and needed > limit:
        number = sum(one.num_needed for one in fetching)
        sources = f" of {len(fetching)} sources" if len(fetching) > 1 else ""
        raise ConfigError(
            "the cache is too small: shards would be removed before they are read",
            found=f"data.cache_gb = {limit / 1e9:g}; two windows of data.window shards, with the shards that follow "
            f"each, are up to {number} shards{sources} or {needed / 1e9:g} GB",
            change=f"data.cache_gb={needed / 1e9 * 1.01:.3g} or more, 0 for no limit, or a smaller data.window",
        )
