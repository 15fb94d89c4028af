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
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from braid.data_pipeline.shards import HASH, INDEX_FILE, ShardReader, atomic_file, read_index
from braid.kernels.errors import InputError

DTYPES = {"ndarray:uint16": np.dtype("<u2"), "ndarray:uint32": np.dtype("<u4"), "ndarray:int32": np.dtype("<i4")}

# A one-dimensional column begins with `1 << 2 | code`; the code gives the width of its length.
LENGTHS = {code: struct.Struct(format) for code, format in ((4, "<B"), (5, "<H"), (6, "<I"), (7, "<Q"))}
BEFORE_VALUES = {code: 1 + length.size for code, length in LENGTHS.items()}
OFFSET = struct.Struct("<I")


class MDSWriter:
    """Writes samples into `shard.00000.mds`, `shard.00001.mds`, ... of at most `shard_bytes` bytes each.

    columns: name -> encoding, one of `DTYPES`. A sample larger than `shard_bytes` gets a shard of its own.
    first_shard: number of the first shard, for a writer that goes on where another one stopped.
    finished_shards: index entries (name, size, xxh3_64 hash) of the shards that are complete on disk; it grows by one
    whenever `write` or `finish` completes a shard. `write_index` makes a readable folder of them.

    The order of training rows is made of shards, so writers of other formats (`block_shards`) inherit where one ends.
    """

    suffix = "mds"

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
        self._mds_entry = {
            "column_encodings": [columns[name] for name, _ in self._columns],
            "column_names": [name for name, _ in self._columns],
            "column_sizes": [None] * len(columns),
            "compression": None,
            "format": "mds",
            "hashes": [HASH],
            "size_limit": shard_bytes,
            "version": 2,
        }
        self._header = json.dumps(self._mds_entry, sort_keys=True).encode()
        self._samples: list[list[np.ndarray]] = []
        self._size = self._empty_size = 4 + 4 + len(self._header)  # count, first offset, header

    def write(self, sample: dict[str, np.ndarray]) -> None:
        """Append one sample: a 1-D array of the declared dtype for every column (empty ones are allowed)."""
        assert len(sample) == len(self._columns), f"columns {sorted(sample)}, expected {self._columns}"
        size = 4  # its offset
        for name, dtype in self._columns:
            array = sample[name]
            assert array.ndim == 1 and array.dtype == dtype, f"expected 1-D {dtype}, got {array.ndim}-D {array.dtype}"
            size += 4 + len(_length_prefix(array)) + array.nbytes
        if self._samples and self._size + size > self._shard_bytes:
            self._finish_shard()
        assert self._empty_size + size < 1 << 32, f"a sample of {size} bytes does not fit a shard's 32-bit offsets"
        self._samples.append([sample[name].copy() for name, _ in self._columns])
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
        number = self._first_shard + len(self.finished_shards)
        name = f"shard.{number:05}.{self.suffix}"
        digest, num_bytes = xxhash.xxh3_64(), 0
        with atomic_file(self.folder / name) as file:
            for part in self._content(number):
                digest.update(part)
                num_bytes += file.write(part)
        raw_data = {"basename": name, "bytes": num_bytes, "hashes": {HASH: digest.hexdigest()}}
        entry = self._entry() | {"raw_data": raw_data, "samples": len(self._samples)}
        self._samples, self._size = [], self._empty_size
        self.finished_shards.append(entry)

    def _content(self, number: int) -> Iterator[bytes]:
        """What shard `number` holds, part by part."""
        samples = [_encoded(columns) for columns in self._samples]
        sizes = [4 + 4 * (len(samples) + 1) + len(self._header), *map(len, samples)]
        offsets = np.cumsum(sizes).astype("<u4")
        assert int(offsets[-1]) == self._size, "size accounting differs from what is written"
        yield from (struct.pack("<I", len(samples)), offsets.tobytes(), self._header, *samples)

    def _entry(self) -> dict:
        """What the index says of a shard besides its file and rows, once `_content` has come to its end."""
        return self._mds_entry | {"zip_data": None}


def write_index(folder: Path, shards: list[dict]) -> None:
    """Atomically write `index.json`, which makes a dataset of the given `MDSWriter.finished_shards` entries."""
    with atomic_file(Path(folder) / INDEX_FILE) as file:
        file.write(json.dumps({"shards": shards, "version": 2}, sort_keys=True).encode())


class MDSReader(ShardReader):
    """Rows of a folder of MDS shards."""

    def __init__(self, folder: Path) -> None:
        change = f"write raw MDS shards with hashes=['{HASH}'] and columns of {list(DTYPES)}"
        index = read_index(Path(folder), _problem, change)
        super().__init__(Path(folder), index["shards"])
        columns = self._entries[0]
        dtypes = [DTYPES[encoding] for encoding in columns["column_encodings"]]
        self._columns = [(name, t, t.itemsize) for name, t in zip(columns["column_names"], dtypes, strict=True)]
        self._sizes_format = f"<{len(self._columns)}I"

    def shard_row(self, shard: int, k: int) -> dict[str, np.ndarray]:
        """Row `k` of a shard: column name -> read-only 1-D array."""
        data = self._maps.get(shard) or self._open(shard)
        (start,) = OFFSET.unpack_from(data, 4 + 4 * k)
        sizes = struct.unpack_from(self._sizes_format, data, start)
        at = start + 4 * len(sizes)
        row = {}
        for (name, dtype, itemsize), size in zip(self._columns, sizes, strict=True):
            before = BEFORE_VALUES.get(data[at])
            if before is None:
                raise InputError(
                    f"{self.folder / self.shard_names[shard]}: row {k}: column {name} is not a one-dimensional array",
                    change="write the corpus with `braid prepare`",
                )
            row[name] = np.frombuffer(data, dtype, (size - before) // itemsize, at + before)
            at += size
        return row

    def _open(self, shard: int) -> mmap.mmap:
        data = super()._open(shard)
        (num_rows,) = OFFSET.unpack_from(data)
        if num_rows != self._entries[shard]["samples"]:
            self._maps.pop(shard, None)
            raise self._damaged(shard, f"it holds {num_rows} rows, index.json says {self._entries[shard]['samples']}")
        return data


def _encoded(columns: list[np.ndarray]) -> bytes:
    """One sample."""
    encoded = [_length_prefix(array) + array.tobytes() for array in columns]
    return b"".join([struct.pack(f"<{len(encoded)}I", *map(len, encoded)), *encoded])


def _length_prefix(array: np.ndarray) -> bytes:
    length = len(array)
    code = 4 if length < 1 << 8 else 5 if length < 1 << 16 else 6
    return bytes([code]) + LENGTHS[code].pack(length)


def _problem(index: dict) -> str | None:
    """Why `MDSReader` cannot read what an index describes."""
    version, entries = index["version"], index["shards"]
    if version != 2:
        return f"version {version}"
    return (
        next(filter(None, (_entry_problem(entry, entries[0]) for entry in entries)), None) if entries else "no shards"
    )


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
