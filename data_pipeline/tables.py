"""Columns of .parquet, .arrow and .feather files (Arrow's IPC files and streams), a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

from braid.data_pipeline.inputs import required
from braid.kernels.errors import InputError

PARQUET, ARROW = (".parquet",), (".arrow", ".feather")
ROWS = 256
"""Rows made into Python objects at a time."""


def rows(
    location: str, file: BinaryIO, columns: Sequence[str], check: Callable[[Sequence[str]], None]
) -> Iterator[tuple[list[tuple], float | None]]:
    """(values of `columns` in a few rows, share of the file that has been read where the format tells).

    `check` gets the names of the columns there are. Raises InputError for a file that cannot be read to its end.
    """
    pyarrow = required("pyarrow", location)
    is_parquet = location.lower().endswith(PARQUET)
    try:
        for batch, share in (_parquet if is_parquet else _arrow)(file, columns, check):
            for start in range(0, batch.num_rows, ROWS):
                part = batch.slice(start, ROWS)
                yield list(zip(*(part.column(name).to_pylist() for name in columns), strict=True)), share
    except (pyarrow.ArrowException, OSError) as error:
        kind = "parquet" if is_parquet else "Arrow"
        found = str(error).splitlines()[0]
        change = "it is cut off or damaged: copy or download it again"
        raise InputError(f"{location} is not a readable {kind} file", found=found, change=change) from error


def _parquet(file: BinaryIO, columns: Sequence[str], check: Callable) -> Iterator[tuple]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as table:
        check(table.schema_arrow.names)
        num_read = 0
        for batch in table.iter_batches(batch_size=ROWS, columns=list(columns)):
            num_read += batch.num_rows
            yield batch, num_read / table.metadata.num_rows


def _arrow(file: BinaryIO, columns: Sequence[str], check: Callable) -> Iterator[tuple]:
    import pyarrow.ipc

    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    open_reader = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
    with open_reader(file) as reader:
        names = reader.schema.names
    check(names)
    file.seek(0)
    options = pyarrow.ipc.IpcReadOptions(included_fields=[names.index(name) for name in columns])
    with open_reader(file, options=options) as reader:
        if is_file:
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number), (number + 1) / reader.num_record_batches
        else:
            for batch in reader:
                yield batch, None
