"""What every stored format shares: files that appear whole or not at all, and shards that are checked before use.

A split is a folder of numbered shards, described by `index.json`: for each its file name, size, xxh3_64 hash and rows.
A format says what a shard holds (`mds`, `block_shards`); `formats` chooses among them.
"""

from __future__ import annotations

import json
import mmap
import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import xxhash

from braid.kernels.errors import InputError

if TYPE_CHECKING:
    from braid.data_pipeline.cache import CachedShards

INDEX_FILE = "index.json"
HASH = "xxh3_64"
MAX_OPEN_SHARDS = 128  # a memory map holds a file descriptor, and 1024 of them is a common limit


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` whole, synced to disk, or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name is durable only when its folder is
    finally:
        os.close(folder)


def read_index(folder: Path, problem_of: Callable[[dict], str | None], change: str) -> dict:
    """The content of `index.json`. `problem_of` says what keeps it from being read, `change` what would help then.

    Raises InputError when it is missing, no JSON, or has a problem."""
    path = folder / INDEX_FILE
    try:
        index = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"{folder} is not a folder of shards",
            found=f"{path}: {error.strerror}",
            change="give a folder written by `braid prepare`",
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is damaged", found=str(error), change="prepare the corpus again") from error
    try:
        problem = problem_of(index)
    except (KeyError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise InputError(f"{path} describes no shards that can be read here", found=problem, change=change)
    return index


class ShardReader(ABC):
    """Random access to the rows of a folder of shards, as zero-copy views of memory maps.

    A shard is checked (size and hash) when one of its rows is first asked for, once in a process; a child relies on
    what its parent had checked. No locks and no shared file positions: safe to use from several threads and after a
    fork, and it can be pickled.

    remote: where the shards come from if the folder is one of a cache; each is fetched when it is first read.
    num_rows: rows in all shards. shard_rows: int64 [shards], rows of each. shard_names: their file names.
    Raises InputError for a missing or malformed index, and for a missing or damaged shard when it is touched.
    """

    def __init__(self, folder: Path, entries: list[dict]) -> None:
        self.folder, self._entries = folder, entries
        self.remote: CachedShards | None = None
        self.shard_names = [entry["raw_data"]["basename"] for entry in entries]
        self.shard_rows = np.array([entry["samples"] for entry in entries], np.int64)
        self.num_rows = int(self.shard_rows.sum())
        self._first_rows = [0, *np.cumsum(self.shard_rows).tolist()]
        self._verified: set[int] = set()
        self._maps: dict[int, mmap.mmap] = {}

    @abstractmethod
    def shard_row(self, shard: int, k: int) -> dict[str, np.ndarray]:
        """Row `k` of a shard: column name -> read-only 1-D array."""

    def row(self, i: int) -> dict[str, np.ndarray]:
        """Row `i` of the folder: column name -> read-only 1-D array."""
        if not 0 <= i < self.num_rows:
            raise IndexError(f"row {i} of {self.num_rows}")
        shard = bisect_right(self._first_rows, i) - 1
        return self.shard_row(shard, i - self._first_rows[shard])

    def verify_shard(self, shard: int) -> None:
        """Compare size and hash of a shard with the index. Raises InputError with what was expected and found."""
        expected = self.stored(shard)
        digest, buffer = xxhash.xxh3_64(), memoryview(bytearray(1 << 18))
        with self._opened(shard) as file:
            while num_bytes := file.readinto(buffer):  # not through a map, where a failing disk would be a SIGBUS
                digest.update(buffer[:num_bytes])
            if digest.hexdigest() != expected["hashes"][HASH]:
                hashes = f"its {HASH} hash is {digest.hexdigest()}, index.json says {expected['hashes'][HASH]}"
                raise self._damaged(shard, hashes + self._damaged_rows(shard, file))

    def touch(self, shard: int) -> None:
        """`verify_shard` on the first call for this shard in this process; nothing afterwards."""
        if shard not in self._verified:
            try:
                self.verify_shard(shard)
            except InputError:  # of a shard that was fetched whole: it has changed in the cache
                if self.remote is None or not self.remote.discard(self.stored(shard)):
                    raise
                self.verify_shard(shard)
            self._verified.add(shard)

    def stored(self, shard: int) -> dict:
        """What the index says of the file of a shard: basename, bytes, hashes."""
        return self._entries[shard]["raw_data"]

    def table_problem(self) -> str | None:
        """How files beside the shards differ from what the index says of them."""
        return None

    def _open(self, shard: int) -> mmap.mmap:
        """Map a shard whose content is right, and keep the map."""
        while self._maps and self._are_too_many(self.stored(shard)["bytes"]):
            self._maps.pop(list(self._maps)[0], None)  # not closed here: rows handed out may still view it
        self.touch(shard)
        with self._opened(shard) as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._maps[shard] = data
        return data

    def _are_too_many(self, num_bytes: int) -> bool:
        """Whether a map must go before one of `num_bytes` comes. What is mapped is not removed from a cache: the maps
        of a process take a quarter of it, and leave the rest to what comes next and to other jobs."""
        limit = self.remote.limit_bytes if self.remote else 0
        over = limit and 4 * (sum(map(len, list(self._maps.values()))) + num_bytes) > limit
        return len(self._maps) >= MAX_OPEN_SHARDS or bool(over)

    @contextmanager
    def _opened(self, shard: int) -> Iterator[BinaryIO]:
        """The open file, if its size is right; whatever the system says about it becomes the error of the shard."""
        expected_bytes, path = self.stored(shard)["bytes"], self.folder / self.shard_names[shard]
        try:
            with self.remote.open(self.stored(shard)) if self.remote else open(path, "rb") as file:
                num_bytes = os.fstat(file.fileno()).st_size
                if num_bytes != expected_bytes:
                    raise self._damaged(shard, f"it has {num_bytes} bytes, index.json says {expected_bytes}")
                yield file
        except OSError as error:
            raise self._damaged(shard, f"it cannot be read: {error.strerror}") from error

    def _damaged_rows(self, shard: int, file: BinaryIO) -> str:
        """More about a shard with a wrong hash, where its format knows more."""
        return ""

    def _damaged(self, shard: int, found: str) -> InputError:
        return InputError(
            f"{self.folder / self.shard_names[shard]} is missing or damaged",
            found=found,
            change="copy this shard again from its source, prepare the corpus again, or leave its rows out "
            "(data.damaged=skip)",
        )

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_maps": {}}
