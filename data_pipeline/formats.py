"""The formats a split can be stored in, behind one interface. Whichever it is, shards hold the same rows, so the order
of training rows and every batch are the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from braid.data_pipeline import block_shards, mds
from braid.data_pipeline.block_shards import BLOCKS_FILE, BlockShardReader, FlatWriter, TarWriter
from braid.data_pipeline.mds import MDSReader, MDSWriter
from braid.data_pipeline.shards import ShardReader

WRITERS = {"mds": MDSWriter, "wds": TarWriter, "flat": FlatWriter}
FORMATS = tuple(WRITERS)
TABLE_FILES = {"mds": [], "wds": [BLOCKS_FILE], "flat": [BLOCKS_FILE]}
"""What a folder of shards has besides them and its index."""


def COLUMNS(dtype: np.dtype | str) -> dict[str, str]:
    """Columns of a split: `tokens`, a flat block of raw tokens of `dtype`, and `ends`, the offsets in 0..len(tokens)
    before which a document of the block ends, in order; two are equal where a document is empty."""
    return {"tokens": f"ndarray:{np.dtype(dtype).name}", "ends": "ndarray:int32"}


def shard_writer(format: str, folder: Path, dtype: np.dtype, *, shard_bytes: int, first_shard: int = 0) -> MDSWriter:
    """A writer of samples with the columns `COLUMNS`; see `MDSWriter`."""
    return WRITERS[format](folder, COLUMNS(dtype), shard_bytes=shard_bytes, first_shard=first_shard)


def write_index(format: str, folder: Path, dtype: np.dtype, shards: list[dict]) -> None:
    """Make a readable folder of a writer's `finished_shards`."""
    if format == "mds":
        mds.write_index(folder, shards)
    else:
        block_shards.write_index(folder, shards, format, np.dtype(dtype).name)


def shard_reader(format: str, folder: Path) -> ShardReader:
    """A reader of the folder. Raises InputError when it holds something else."""
    return (MDSReader if format == "mds" else BlockShardReader)(folder)
