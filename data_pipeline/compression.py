"""Compressed files as blocks of their content: .gz, .zst, .bz2 and .xz, in constant memory, to their very end."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import zstandard

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
BLOCK = 1 << 18
"""Bytes read at a time."""
ZST_BLOCK = 1 << 12
"""The same for .zst, where all that a block decompresses to comes at once."""
OPENED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


class Damaged(Exception):
    """A compressed stream that is cut off or altered."""


def without_compression(name: str) -> str:
    """A file's name in lower case, without the ending of a compression."""
    name = name.lower()
    return next((name.removesuffix(ending) for ending in COMPRESSIONS if name.endswith(ending)), name)


def decompressed(name: str, file: BinaryIO) -> Iterator[bytes]:
    """Blocks of what `file`, compressed as the ending of its name says, holds. Raises Damaged."""
    ending = os.path.splitext(name.lower())[1]
    try:
        if ending == ".zst":
            yield from _zst_blocks(file)
            return
        content = OPENED[ending](file) if ending in OPENED else file
        while block := content.read(BLOCK):
            yield block
    except (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise Damaged(str(error)) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise Damaged(str(error)) from error  # bz2 has no error of its own


def _zst_blocks(file: BinaryIO) -> Iterator[bytes]:
    """Frame by frame: the library's stream reader takes the end of a cut-off file for the end of the content."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = None
    while chunk := file.read(ZST_BLOCK):
        while chunk:
            frame = frame or decompressor.decompressobj()
            if data := frame.decompress(chunk):
                yield data
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last zstd frame is incomplete")
