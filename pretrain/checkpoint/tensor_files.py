"""Safetensors files: written as a stream, read a part at a time.

The format is the safetensors package's, which reads what is written here. A checkpoint needs more than the package
gives. Of writing: the hash of the bytes that were meant to be written, tensors fetched one at a time, and the operating
system's own error number when it fails. Of reading: a part of a tensor in no more memory than the part takes (the
package maps files, and a slice of columns then maps all of it).
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .files import CHUNK

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}

SHORT_RUN = 2**14
"""Bytes: where what is wanted lies in shorter runs, what is between them is read too."""


def safetensors_chunks(
    tensors: Mapping[str, Tensor], between: Callable[[], None], load: Callable[[str], Tensor] | None = None
) -> Iterator[bytes | memoryview]:
    """A safetensors file as a stream: 8-byte little-endian header length, JSON header padded to 8 bytes, raw data.

    Tensors lie in order of falling element size, so that each starts aligned, and else as they are given. Tensors that
    share memory are written as often as they are named.

    Args:
        between: called after each tensor.
        load: gives the values of each name, one after the other; `tensors` may then be on the device `meta`.
    """
    load = load or tensors.__getitem__
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in order:
        tensor = tensors[name]
        assert tensor.dtype in NAMES, f"{name}: no safetensors name for {tensor.dtype}"
        stop = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in order:
        raw = _bytes_of(load(name).detach().cpu().contiguous())
        for first in range(0, len(raw), CHUNK):
            yield raw[first : first + CHUNK]
        del raw  # before the next tensor is waited for
        between()


class TensorFile:
    """Reads parts of the tensors of a file. Open until it is closed; a context.

    Raises OSError, and ValueError where the file is not what it should be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        try:
            length = int.from_bytes(self._bytes(8, 0), "little")
            if length > os.fstat(self._descriptor).st_size:
                raise ValueError(f"{path} is no safetensors file")
            self._header = json.loads(self._bytes(length, 8))
            self._first = 8 + length
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._descriptor)

    def read(self, name: str, box: Sequence[tuple[int, int]], values: Tensor | None = None) -> Tensor:
        """Of a tensor, what lies between start and stop along each dimension: `values`, contiguous and on the CPU, or
        a new tensor."""
        entry = self._header[name]
        if values is None:
            values = torch.empty([stop - start for start, stop in box], dtype=DTYPES[entry["dtype"]])
        if values.numel():
            self._fill(values, self._first + entry["data_offsets"][0], entry["shape"], box)
        return values

    def _fill(self, values: Tensor, offset: int, shape: Sequence[int], box: Sequence[tuple[int, int]]) -> None:
        """`values` (contiguous) from the box in a tensor of this shape that starts at the byte `offset`."""
        if all((start, stop) == (0, length) for (start, stop), length in zip(box[1:], shape[1:], strict=True)):
            row = math.prod(shape[1:]) * values.element_size()
            self._read_into(_bytes_of(values), offset + (box[0][0] if box else 0) * row)
            return
        (first, last), row = box[0], math.prod(shape[1:]) * values.element_size()
        run = _run(shape[1:], box[1:]) * values.element_size()
        if run >= SHORT_RUN or row > CHUNK:
            for number in range(first, last):
                self._fill(values[number - first], offset + number * row, shape[1:], box[1:])
            return
        for start in range(first, last, CHUNK // row):
            stop = min(start + CHUNK // row, last)
            whole = torch.empty([stop - start, *shape[1:]], dtype=values.dtype)
            self._read_into(_bytes_of(whole), offset + start * row)
            values[start - first : stop - first] = whole[:, *(slice(*edges) for edges in box[1:])]

    def _read_into(self, memory: memoryview, offset: int) -> None:
        while len(memory):
            count = os.preadv(self._descriptor, [memory[:CHUNK]], offset)
            if not count:
                raise OSError(errno.EIO, "the file ends early", str(self.path))
            memory, offset = memory[count:], offset + count

    def _bytes(self, count: int, offset: int) -> bytes:
        memory = bytearray(count)
        self._read_into(memoryview(memory), offset)
        return bytes(memory)


def _run(shape: Sequence[int], box: Sequence[tuple[int, int]]) -> int:
    """How many elements of the box lie next to each other in a tensor of this shape."""
    run = 1
    for length, (start, stop) in zip(reversed(shape), reversed(box), strict=True):
        run *= stop - start
        if stop - start < length:
            break
    return run


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
