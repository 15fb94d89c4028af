"""MDS shards: our own small writer and reader of the format of mosaicml-streaming (index version 2).

Only what Braid stores: uncompressed shards whose columns are one-dimensional arrays of a fixed dtype and any length.
mosaicml-streaming reads what is written here, and `MDSReader` reads what its `MDSWriter(hashes=["xxh3_64"])` writes.

Layout of a shard (little endian, nothing is aligned):

    u32 number of samples n | u32 offsets[n + 1] from the start of the file | JSON header | samples
    sample = u32 byte size of every column | the columns, in the order of their sorted names
    column = u8 (dimensions << 2 | width code of the shape) | shape | values
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from braid.kernels.errors import InputError

INDEX_FILE = "index.json"
HASH = "xxh3_64"
DTYPES = {"ndarray:uint16": np.dtype("<u2"), "ndarray:uint32": np.dtype("<u4"), "ndarray:int32": np.dtype("<i4")}

# A one-dimensional column begins with `1 << 2 | code`; the code gives the width of its length.
LENGTH_FORMATS = {4: "<B", 5: "<H", 6: "<I", 7: "<Q"}
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


class MDSWriter:
    """Writes samples into `shard.00000.mds`, `shard.00001.mds`, ... of at most `shard_bytes` bytes each.

    columns: name -> encoding, one of `DTYPES`. A sample larger than `shard_bytes` gets a shard of its own.
    first_shard: number of the first shard, for a writer that goes on where another one stopped.
    finished_shards: index entries (name, size, xxh3_64 hash) of the shards that are complete on disk; it grows by one
    whenever `write` or `finish` completes a shard. `write_index` makes a readable folder of them.
    """

    def __init__(
        self, folder: Path, columns: dict[str, str], *, shard_bytes: int = 64 << 20, first_shard: int = 0
    ) -> None:
        unknown = sorted(set(columns.values()) - set(DTYPES))
        assert columns and not unknown, f"columns {columns}: encodings must be of {list(DTYPES)}"
        assert 0 < shard_bytes < 1 << 32, "MDS offsets are 32 bits wide"
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.finished_shards: list[dict] = []
        self._columns = [(name, DTYPES[columns[name]]) for name in sorted(columns)]
        self._first_shard = first_shard
        self._shard_bytes = shard_bytes
        self._entry = {
            "column_encodings": [columns[name] for name, _ in self._columns],
            "column_names": [name for name, _ in self._columns],
            "column_sizes": [None] * len(columns),
            "compression": None,
            "format": "mds",
            "hashes": [HASH],
            "size_limit": shard_bytes,
            "version": 2,
        }
        self._header = json.dumps(self._entry, sort_keys=True).encode()
        self._samples: list[bytes] = []
        self._size = self._empty_size = 4 + 4 + len(self._header)  # count, first offset, header

    def write(self, sample: dict[str, np.ndarray]) -> None:
        """Append one sample: a 1-D array of the declared dtype for every column (empty ones are allowed)."""
        assert len(sample) == len(self._columns), f"columns {sorted(sample)}, expected {self._entry['column_names']}"
        columns = [_encode(sample[name], dtype) for name, dtype in self._columns]
        encoded = b"".join([struct.pack(f"<{len(columns)}I", *map(len, columns)), *columns])
        size = len(encoded) + 4
        if self._samples and self._size + size > self._shard_bytes:
            self._finish_shard()
        assert self._empty_size + size < 1 << 32, f"a sample of {size} bytes does not fit a shard's 32-bit offsets"
        self._samples.append(encoded)
        self._size += size

    def finish(self) -> None:
        """Complete the last shard. The index is not written: see `write_index`."""
        if self._samples:
            self._finish_shard()

    def __enter__(self) -> MDSWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()

    def _finish_shard(self) -> None:
        name = f"shard.{self._first_shard + len(self.finished_shards):05}.mds"
        sizes = [4 + 4 * (len(self._samples) + 1) + len(self._header), *map(len, self._samples)]
        offsets = np.cumsum(sizes).astype("<u4")
        digest = xxhash.xxh3_64()
        with atomic_file(self.folder / name) as file:
            for part in (struct.pack("<I", len(self._samples)), offsets.tobytes(), self._header, *self._samples):
                digest.update(part)
                file.write(part)
        raw_data = {"basename": name, "bytes": self._size, "hashes": {HASH: digest.hexdigest()}}
        assert int(offsets[-1]) == self._size, "size accounting differs from what was written"
        entry = self._entry | {"raw_data": raw_data, "samples": len(self._samples), "zip_data": None}
        self._samples, self._size = [], self._empty_size
        self.finished_shards.append(entry)


def write_index(folder: Path, shards: list[dict]) -> None:
    """Atomically write `index.json`, which makes a dataset of the given `MDSWriter.finished_shards` entries."""
    with atomic_file(Path(folder) / INDEX_FILE) as file:
        file.write(json.dumps({"shards": shards, "version": 2}, sort_keys=True).encode())


class MDSReader:
    """Random access to the rows of a folder of MDS shards, as zero-copy views of memory maps.

    A shard is checked (size and hash) when one of its rows is first asked for, once in a process; a child relies on
    what its parent had checked. No locks and no shared file positions: safe to use from several threads and after a
    fork, and it can be pickled.

    num_rows: rows in all shards. shard_rows: int64 [shards], rows of each. shard_names: their file names.
    Raises InputError for a missing or malformed index, and for a missing or damaged shard when it is touched.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._entries = _read_index(self.folder)
        self.shard_names = [entry["raw_data"]["basename"] for entry in self._entries]
        self.shard_rows = np.array([entry["samples"] for entry in self._entries], np.int64)
        self.num_rows = int(self.shard_rows.sum())
        self._first_rows = [0, *np.cumsum(self.shard_rows).tolist()]
        columns = self._entries[0]
        self._names = columns["column_names"]
        self._dtypes = [DTYPES[encoding] for encoding in columns["column_encodings"]]
        self._sizes_format = f"<{len(self._names)}I"
        self._verified: set[int] = set()
        self._maps: dict[int, mmap.mmap] = {}

    def row(self, i: int) -> dict[str, np.ndarray]:
        """Row `i` of the folder: column name -> read-only 1-D array."""
        if not 0 <= i < self.num_rows:
            raise IndexError(f"row {i} of {self.num_rows}")
        shard = bisect_right(self._first_rows, i) - 1
        return self.shard_row(shard, i - self._first_rows[shard])

    def shard_row(self, shard: int, k: int) -> dict[str, np.ndarray]:
        """Row `k` of a shard: column name -> read-only 1-D array."""
        data = self._maps.get(shard) or self._open(shard)
        (start,) = struct.unpack_from("<I", data, 4 + 4 * k)
        sizes = struct.unpack_from(self._sizes_format, data, start)
        at = start + 4 * len(sizes)
        row = {}
        for name, dtype, size in zip(self._names, self._dtypes, sizes, strict=True):
            length_format = LENGTH_FORMATS.get(data[at])
            if length_format is None:
                raise InputError(
                    f"{self.folder / self.shard_names[shard]}: row {k}: column {name} is not a one-dimensional array",
                    change="write the corpus with `braid prepare`",
                )
            (length,) = struct.unpack_from(length_format, data, at + 1)
            row[name] = np.frombuffer(data, dtype, length, at + size - length * dtype.itemsize)
            at += size
        return row

    def verify_shard(self, shard: int) -> None:
        """Compare size and hash of a shard with the index. Raises InputError with what was expected and found."""
        path, expected = self.folder / self.shard_names[shard], self._entries[shard]["raw_data"]
        digest, buffer = xxhash.xxh3_64(), memoryview(bytearray(1 << 18))
        with _open_shard(path, expected["bytes"]) as file:
            while num_bytes := file.readinto(buffer):  # not through a map, where a failing disk would be a SIGBUS
                digest.update(buffer[:num_bytes])
        if digest.hexdigest() != expected["hashes"][HASH]:
            raise _damaged(path, f"its {HASH} hash is {digest.hexdigest()}, index.json says {expected['hashes'][HASH]}")

    def touch(self, shard: int) -> None:
        """`verify_shard` on the first call for this shard in this process; nothing afterwards."""
        if shard not in self._verified:
            self.verify_shard(shard)
            self._verified.add(shard)

    def _open(self, shard: int) -> mmap.mmap:
        self.touch(shard)
        path, entry = self.folder / self.shard_names[shard], self._entries[shard]
        with _open_shard(path, entry["raw_data"]["bytes"]) as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        (num_rows,) = struct.unpack_from("<I", data)
        if num_rows != entry["samples"]:
            raise _damaged(path, f"it holds {num_rows} rows, index.json says {entry['samples']}")
        if len(self._maps) >= MAX_OPEN_SHARDS:
            self._maps.pop(list(self._maps)[0], None)  # not closed here: rows handed out may still view it
        self._maps[shard] = data
        return data

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_maps": {}}


def _encode(array: np.ndarray, dtype: np.dtype) -> bytes:
    assert array.ndim == 1 and array.dtype == dtype, f"expected 1-D {dtype}, got {array.ndim}-D {array.dtype}"
    length = len(array)
    code = 4 if length < 1 << 8 else 5 if length < 1 << 16 else 6
    return struct.pack("<B" + LENGTH_FORMATS[code][1], code, length) + array.tobytes()


@contextmanager
def _open_shard(path: Path, expected_bytes: int) -> Iterator[BinaryIO]:
    """The open file, if its size is right; whatever the system says about it becomes the error of a damaged shard."""
    try:
        with open(path, "rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            if num_bytes != expected_bytes:
                raise _damaged(path, f"it has {num_bytes} bytes, index.json says {expected_bytes}")
            yield file
    except OSError as error:
        raise _damaged(path, f"it cannot be read: {error.strerror}") from error


def _damaged(path: Path, found: str) -> InputError:
    return InputError(
        f"{path} is missing or damaged",
        found=found,
        change="copy this shard again from its source, prepare the corpus again, or leave its rows out "
        "(data.damaged=skip)",
    )


def _read_index(folder: Path) -> list[dict]:
    """The entries of `index.json`, checked to be something that `MDSReader` can read."""
    path = folder / INDEX_FILE
    try:
        index = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"{folder} is not a folder of MDS shards",
            found=f"{path}: {error.strerror}",
            change="give a folder written by `braid prepare`",
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is damaged", found=str(error), change="prepare the corpus again") from error
    try:
        version, entries = index["version"], index["shards"]
        problem = f"version {version}" if version != 2 else "no shards" if not entries else None
        for entry in entries:
            problem = problem or _entry_problem(entry, entries[0])
    except (KeyError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise InputError(
            f"{path} describes no shards that can be read here",
            found=problem,
            change=f"write raw MDS shards with hashes=['{HASH}'] and columns of {list(DTYPES)}",
        )
    return entries


def _entry_problem(entry: dict, first: dict) -> str | None:
    checks = {
        f"format {entry['format']}": entry["format"] != "mds",
        f"compression {entry['compression']}": entry["compression"] is not None,
        f"columns {entry['column_encodings']}": not set(entry["column_encodings"]) <= set(DTYPES),
        "columns that differ from those of the first shard": any(
            entry[key] != first[key] for key in ("column_names", "column_encodings")
        ),
        f"no {HASH} hash": HASH not in entry["raw_data"]["hashes"],
        f"{entry['samples']} rows": entry["samples"] < 1,
    }
    problems = [problem for problem, found in checks.items() if found]
    return f"shard {entry['raw_data']['basename']}: {', '.join(problems)}" if problems else None
