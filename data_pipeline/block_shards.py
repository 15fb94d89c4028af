"""The formats `wds` and `flat`: shards that other tools can read without us, and a table of where the blocks lie.

A block is a stored row: `tokens` and `ends` (see `formats.COLUMNS`). Shard k holds the blocks that it would as MDS.

    wds     shard.00000.tar: a POSIX tar, for each block the members 00000-000000.tokens.npy and 00000-000000.ends.npy.
            webdataset.WebDataset(urls).decode() gives {"tokens.npy": array, "ends.npy": array} for each.
    flat    shard.00000.bin: the tokens of all blocks one after the other, zeros up to a multiple of 8 bytes, the ends
            of all blocks (int32). numpy.memmap(file, dtype)[:tokens] is the text of the shard.

    blocks.u64    [rows, 5], little endian: where the tokens begin in their shard (bytes) and how many there are, the
                  same of the ends, and the xxh3_64 of both one after the other. It has no header, so that every bit of
                  it belongs to a shard and is under its hash.
    index.json    format, version, dtype, and for each shard its file name, size, hash, rows, and hash in blocks.u64
"""

from __future__ import annotations

import base64
import io
import json
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from braid.data_pipeline.mds import MDSWriter
from braid.data_pipeline.shards import HASH, INDEX_FILE, ShardReader, atomic_file, read_index
from braid.kernels.errors import InputError

BLOCKS_FILE = "blocks.u64"
VERSION = 1
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
ENDS = np.dtype("<i4")


class BlockShardWriter(MDSWriter, ABC):
    """What writes shards of blocks: the interface of `MDSWriter`, whose rule says where a shard ends."""

    def _content(self, number: int) -> Iterator[bytes]:
        blocks = [tuple(columns) for columns in self._samples]  # (ends, tokens): columns are sorted
        self._table = np.zeros((len(blocks), 5), "<u8")
        for row, (ends, tokens) in zip(self._table, blocks, strict=True):
            row[[1, 3, 4]] = len(tokens), len(ends), _block_hash(tokens, ends)
        yield from self._laid_out(number, blocks)

    @abstractmethod
    def _laid_out(self, number: int, blocks: list[tuple[np.ndarray, np.ndarray]]) -> Iterator[bytes]:
        """The shard, part by part; notes in columns 0 and 2 of `_table` where tokens and ends begin."""

    def _entry(self) -> dict:
        return {"blocks": base64.b64encode(self._table.tobytes()).decode()}


class TarWriter(BlockShardWriter):
    suffix = "tar"

    def _laid_out(self, number: int, blocks: list[tuple[np.ndarray, np.ndarray]]) -> Iterator[bytes]:
        at = 0
        for k, (ends, tokens) in enumerate(blocks):
            for column, name, array in ((0, "tokens", tokens), (2, "ends", ends)):
                begin, content = _member(f"{number:05}-{k:06}.{name}.npy", array)
                self._table[k, column] = at + begin
                at += len(content)
                yield content
        yield bytes(2 * tarfile.BLOCKSIZE)  # the end of an archive


class FlatWriter(BlockShardWriter):
    suffix = "bin"

    def _laid_out(self, number: int, blocks: list[tuple[np.ndarray, np.ndarray]]) -> Iterator[bytes]:
        at = 0
        for k, (_, tokens) in enumerate(blocks):
            self._table[k, 0] = at
            at += tokens.nbytes
            yield tokens.tobytes()
        yield bytes(-at % 8)
        at += -at % 8
        for k, (ends, _) in enumerate(blocks):
            self._table[k, 2] = at
            at += ends.nbytes
            yield ends.tobytes()


def write_index(folder: Path, shards: list[dict], format: str, dtype: str) -> None:
    """Atomically write `blocks.u64` and then `index.json` for the given `finished_shards` entries."""
    tables = [np.frombuffer(base64.b64decode(shard["blocks"]), "<u8").reshape(-1, 5) for shard in shards]
    with atomic_file(Path(folder) / BLOCKS_FILE) as file:
        for table in tables:
            file.write(table.tobytes())
    entries = [
        {"raw_data": shard["raw_data"], "samples": shard["samples"], "blocks": {HASH: _table_hash(table)}}
        for shard, table in zip(shards, tables, strict=True)
    ]
    index = {"format": format, "version": VERSION, "dtype": dtype, "shards": entries}
    with atomic_file(Path(folder) / INDEX_FILE) as file:
        file.write(json.dumps(index, sort_keys=True).encode())


class BlockShardReader(ShardReader):
    """Rows of a folder of wds or flat shards. A shard with a wrong hash is named with the blocks that are to blame."""

    def __init__(self, folder: Path) -> None:
        index = read_index(Path(folder), _problem, "write it with `braid prepare --format wds`, or flat")
        super().__init__(Path(folder), index["shards"])
        self._dtype = DTYPES[index["dtype"]]
        self._open_table()

    def shard_row(self, shard: int, k: int) -> dict[str, np.ndarray]:
        """Row `k` of a shard: column name -> read-only 1-D array."""
        data = self._maps.get(shard) or self._open(shard)
        at, num_tokens, ends_at, num_ends, _ = self._table[self._first_rows[shard] + k].tolist()
        return {
            "tokens": np.frombuffer(data, self._dtype, num_tokens, at),
            "ends": np.frombuffer(data, ENDS, num_ends, ends_at),
        }

    def verify_shard(self, shard: int) -> None:
        """Compare size and hash of a shard, and its part of blocks.u64, with the index. Raises InputError."""
        if problem := self._part_problem(shard):
            raise self._damaged(shard, f"the {HASH} hash of its part {problem}")
        super().verify_shard(shard)

    def table_problem(self) -> str | None:
        """How blocks.u64 differs from what the index says of it."""
        problems = ((shard, self._part_problem(shard)) for shard in range(len(self.shard_names)))
        return next((f"the part of {self.shard_names[k]} {problem}" for k, problem in problems if problem), None)

    def _part_problem(self, shard: int) -> str | None:
        found, expected = _table_hash(self._table_of(shard)), self._entries[shard]["blocks"][HASH]
        return f"of {BLOCKS_FILE} is {found}, not {expected}" if found != expected else None

    def _damaged_rows(self, shard: int, file: BinaryIO) -> str:
        def content(at: int, num: int, dtype: np.dtype) -> np.ndarray:
            file.seek(at)
            return np.frombuffer(file.read(num * dtype.itemsize), dtype)

        table = self._table_of(shard).tolist()
        wrong = [
            str(k)
            for k, (at, num_tokens, ends_at, num_ends, expected) in enumerate(table)
            if _block_hash(content(at, num_tokens, self._dtype), content(ends_at, num_ends, ENDS)) != expected
        ]
        if not wrong:
            return "; all of its blocks are whole, what lies between them is not"
        return f"; damaged are {len(wrong)} of its {len(table)} blocks: {', '.join(wrong[:8])}" + ", ..." * (
            len(wrong) > 8
        )

    def _table_of(self, shard: int) -> np.ndarray:
        return self._table[self._first_rows[shard] : self._first_rows[shard + 1]]

    def _open_table(self) -> None:
        path = self.folder / BLOCKS_FILE
        try:
            table = np.asarray(np.memmap(path, "<u8", mode="r"))  # not itself: its indexing is slow
        except (OSError, ValueError) as error:
            raise self._no_table(str(error)) from error
        if len(table) != 5 * self.num_rows:
            raise self._no_table(f"{8 * len(table)} bytes, {40 * self.num_rows} for the rows in {INDEX_FILE}")
        self._table = table.reshape(-1, 5)

    def _no_table(self, found: str) -> InputError:
        change = "copy it again or prepare the corpus again"
        return InputError(f"{self.folder / BLOCKS_FILE} is missing or damaged", found=found, change=change)

    def __getstate__(self) -> dict:
        # The map of a file would be copied whole.
        return {name: value for name, value in super().__getstate__().items() if name != "_table"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open_table()


def _member(name: str, array: np.ndarray) -> tuple[int, bytes]:
    """A member of a tar, an array as .npy, and where in it the values begin."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=(1, 0))
    content = file.getvalue()
    info = tarfile.TarInfo(name)  # no time, no owner: the same content gives the same bytes
    info.size = len(content)
    padding = bytes(-len(content) % tarfile.BLOCKSIZE)
    begin = tarfile.BLOCKSIZE + len(content) - array.nbytes
    return begin, info.tobuf(tarfile.USTAR_FORMAT) + content + padding


def _block_hash(tokens: np.ndarray, ends: np.ndarray) -> int:
    digest = xxhash.xxh3_64(tokens.tobytes())
    digest.update(ends.tobytes())
    return digest.intdigest()


def _table_hash(table: np.ndarray) -> str:
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(table).tobytes())


def _problem(index: dict) -> str | None:
    """Why `BlockShardReader` cannot read what an index describes."""
    checks = {
        f"format {index['format']}": index["format"] not in ("wds", "flat"),
        f"version {index['version']}": index["version"] != VERSION,
        f"dtype {index['dtype']}": index["dtype"] not in DTYPES,
        "no shards": not index["shards"],
    }
    for entry in index["shards"]:
        whole = entry["samples"] > 0 and all(HASH in part for part in (entry["raw_data"]["hashes"], entry["blocks"]))
        checks[f"shard {entry['raw_data']['basename']}: no rows, or no {HASH} hashes"] = not whole
    return ", ".join(problem for problem, found in checks.items() if found) or None
