"""Text files to documents: .txt, .jsonl (both also .gz or .zst) and .parquet, streamed in constant memory.

(source, target) pairs come from two fields of .jsonl and .parquet files, as two documents each, one after the other.

What is wrong with a file is said with its name and line, and what to do. Nothing is skipped silently but blank
documents that are no part of a pair, which hold nothing to learn from. Order and ids depend on the names and contents
of the files alone.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import xxhash
import zstandard

from braid.kernels.errors import InputError

ENDINGS = (".txt", ".txt.gz", ".txt.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
BLOCK = 1 << 18
"""Bytes read at a time."""
ZST_BLOCK = 1 << 12
"""The same for .zst, where all that a block decompresses to comes at once."""
PIECE_BYTES = 1 << 20
"""A longer document comes in pieces of about this many bytes, cut at line ends, so that a file of any length can be
read, and one file tokenised by several processes."""


class Piece(NamedTuple):
    """A document, or a part of a long one. (file, index, part) increases; `last` is set on a document's last part."""

    file: int
    index: int
    part: int
    document: str  # name of the file, relative to what all files share, # and the document's number in it or its pair's
    group: str  # documents of one group belong together: all in training or all in validation
    text: str
    num_bytes: int  # of the text in UTF-8
    last: bool


class TextFiles:
    """The files that `inputs` (files, folders, glob patterns) stand for, in the order given, folders in sorted order.

    `files`: their paths; `names`: relative to the folder they share; `num_ignored`: files of other kinds met in
    folders. `total_bytes` on disk, of which `position` have been read by the last iterator that `pieces` returned.
    `pair_fields`: the fields of source and target where the files hold pairs. The two are one group.
    Raises InputError for a path that does not exist, an empty file, a kind of file that cannot be read.
    """

    def __init__(
        self,
        inputs: Sequence[str | Path],
        *,
        text_field: str = "text",
        separator: str | None = None,
        pair_fields: tuple[str, str] | None = None,
    ) -> None:
        if separator == "":
            raise InputError("the separator is empty", change="give the text that stands between two documents")
        self._fields = {"text": text_field}  # what is in a record and the field that holds it
        if pair_fields:
            self._fields = dict(zip(("source", "target"), pair_fields, strict=True))
        self.separator = separator
        self.files, self.num_ignored = _resolve(inputs)
        if self.has_pairs and (plain := [path for path in self.files if _is_text(path)]):
            raise InputError(f"{plain[0]} holds no pairs", change="pairs are read from .jsonl and .parquet files")
        common = os.path.commonpath([path.parent for path in self.files])
        self.names = [path.relative_to(common).as_posix() for path in self.files]
        self.sizes = [file_size(path) for path in self.files]
        self.total_bytes = sum(self.sizes)
        self.position = 0

    @property
    def has_pairs(self) -> bool:
        """Whether a record is a pair of documents."""
        return len(self._fields) == 2

    def describe(self) -> list[dict]:
        """Name, size and xxh3_64 of every file: what a prepared corpus was made from."""
        return [
            {"name": name, "bytes": size, "xxh3": file_hash(path)}
            for path, name, size in zip(self.files, self.names, self.sizes, strict=True)
        ]

    def pieces(self, first_file: int = 0) -> Iterator[Piece]:
        """Pieces of all documents from file number `first_file` on."""
        for number in range(first_file, len(self.files)):
            path, name = self.files[number], self.names[number]
            self.position = sum(self.sizes[:number])
            has_text = False
            for index, part, data, last in self._documents(path):
                if part == 0 and last and not data.strip() and not self.has_pairs:
                    continue
                has_text = True
                record, k = divmod(index, len(self._fields))
                group = document = f"{name}#{record}"
                if self.has_pairs:
                    document += f":{[*self._fields][k]}"
                yield Piece(number, index, part, document, group, data.decode("utf-8"), len(data), last)
            if not has_text:
                raise InputError(f"{path} holds no text", change="remove it from the inputs or fill it")
        self.position = self.total_bytes

    def _documents(self, path: Path) -> Iterator[tuple[int, int, bytes, bool]]:
        """(index of the document, part, valid UTF-8, last part?) for every piece of a file."""
        try:
            if path.name.lower().endswith(".parquet"):
                yield from self._parquet(path)
            else:
                with open(path, "rb") as file:
                    blocks = _without_mark(self._counted(_decompressed(path, file), file))
                    yield from self._text(path, blocks) if _is_text(path) else self._json_lines(path, blocks)
        except (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
            change = "it is cut off or damaged: copy or download it again"
            raise InputError(f"{path} cannot be decompressed to its end", found=str(error), change=change) from error
        except OSError as error:
            raise _unreadable(path, error) from error

    def _counted(self, blocks: Iterator[bytes], file: BinaryIO) -> Iterator[bytes]:
        before = self.position
        for block in blocks:
            self.position = before + file.tell()
            yield block

    def _text(self, path: Path, blocks: Iterator[bytes]) -> Iterator[tuple[int, int, bytes, bool]]:
        """A plain text file is one document, or several with `separator` (left out) between them."""
        separator = self.separator.encode("utf-8") if self.separator else None
        index = part = offset = line = 0
        for data, last in _cut_stream(blocks, separator):
            _check_utf8(path, data, offset, line)
            yield index, part, data, last
            ended = separator or b"" if last else b""
            offset += len(data) + len(ended)
            line += data.count(b"\n") + ended.count(b"\n")
            index, part = (index + 1, 0) if last else (index, part + 1)

    def _json_lines(self, path: Path, blocks: Iterator[bytes]) -> Iterator[tuple[int, int, bytes, bool]]:
        """One JSON object a line; blank lines are passed over. The index counts lines from 0."""
        for number, line in enumerate(_lines(blocks)):
            if line.strip():
                where = f"{path}, line {number + 1}"
                record = self._record(path, number + 1, line)
                yield from self._cut_fields(number, [record[field] for field in self._fields.values()], where)

    def _cut_fields(self, number: int, texts: Sequence[object], where: str) -> Iterator[tuple[int, int, bytes, bool]]:
        """The documents of line or row `number`: one, or two of a pair."""
        for k, ((what, field), text) in enumerate(zip(self._fields.items(), texts, strict=True)):
            encoded = _encoded(text, what, field, where)
            for part, (data, last) in enumerate(_cut_stream(iter([encoded]))):
                yield len(self._fields) * number + k, part, data, last

    def _record(self, path: Path, number: int, line: bytes) -> dict:
        where = f"{path}, line {number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error, number, f"{error.start} bytes into the line") from error
        except (ValueError, RecursionError) as error:
            change = "every line must be one complete JSON object; repair or remove this line"
            raise InputError(f"{where}: not valid JSON", found=str(error), change=change) from error
        if not isinstance(record, dict):
            example = ", ".join(f'"{field}": "..."' for field in self._fields.values())
            change = f"every line must be a JSON object like {{{example}}}"
            raise InputError(f"{where}: not a JSON object", found=type(record).__name__, change=change)
        self._check_fields("field", record, where)
        return record

    def _check_fields(self, kind: str, present: Iterable[str], where: str) -> None:
        for what, field in self._fields.items():
            if field not in present:
                change = f"name the {kind} that holds the {what}: --{what}-field {kind.upper()}"
                found = f"{kind}s: {', '.join(present) or 'none'}"
                raise InputError(f"{where}: there is no {kind} `{field}`", found=found, change=change)

    def _parquet(self, path: Path) -> Iterator[tuple[int, int, bytes, bool]]:
        """One document a row. The index counts rows from 0."""
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            change = "pip install 'braid-lm[parquet]'"
            raise InputError(f"{path}: reading parquet needs pyarrow", found=str(error), change=change) from error
        before, index = self.position, 0
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                self._check_fields("column", file.schema_arrow.names, str(path))
                columns = list(self._fields.values())
                for batch in file.iter_batches(batch_size=256, columns=columns):
                    for texts in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
                        yield from self._cut_fields(index, texts, f"{path}, row {index + 1}")
                        index += 1
                    self.position = before + path.stat().st_size * index // file.metadata.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            found = str(error).splitlines()[0]
            change = "it is cut off or damaged: copy or download it again"
            raise InputError(f"{path} is not a readable parquet file", found=found, change=change) from error


def documents(
    inputs: Sequence[str | Path], *, text_field: str = "text", separator: str | None = None
) -> Iterator[tuple[str, str]]:
    """(document id, text) of every document; see `TextFiles`. A whole document is held in memory."""
    parts: list[str] = []
    for piece in TextFiles(inputs, text_field=text_field, separator=separator).pieces():
        parts.append(piece.text)
        if piece.last:
            yield piece.document, "".join(parts)
            parts = []


def _encoded(text: object, what: str, field: str, where: str) -> bytes:
    if not isinstance(text, str):
        change = f"every {what} must be a string; repair or remove it, or name another field: --{what}-field"
        found = f"{type(text).__name__}: {str(text)[:60]}"
        raise InputError(f"{where}: field `{field}` is not text", found=found, change=change)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        change = "repair or remove this document"
        found = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise InputError(f"{where}: half of a surrogate pair in the text", found=found, change=change) from error


def _is_text(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").removesuffix(".zst").endswith(".txt")


def _resolve(inputs: Sequence[str | Path]) -> tuple[list[Path], int]:
    """Files for the inputs, each once, and the number of files in folders that are of no known kind."""
    if not inputs:
        raise InputError("there is no input", change="give files, folders or patterns: --input FILE|DIR|'*.jsonl' ...")
    found: dict[Path, None] = {}
    num_ignored = 0
    for given in inputs:
        matches = [str(given)]
        if not os.path.exists(given) and glob.has_magic(str(given)):
            matches = sorted(glob.glob(str(given), recursive=True))
        if not matches or not os.path.exists(matches[0]):
            what = "matches no file" if not matches else "does not exist"
            raise InputError(f"the input {given} {what}", found=f"looked from {os.getcwd()}", change="check the path")
        for match in matches:
            path = Path(os.path.abspath(match))
            if path.is_dir():
                inside, others = _walk(path)
                found.update(dict.fromkeys(inside))
                num_ignored += others
            elif _is_readable(path.name):
                found[path] = None
            else:
                found = f"the ending `{path.suffix}`" if path.suffix else "no ending"
                change = f"rename or convert it to one of {', '.join(ENDINGS)}"
                raise InputError(f"{path} is of a kind that is not read", found=found, change=change)
    return list(found), num_ignored


def _walk(folder: Path) -> tuple[list[Path], int]:
    """Readable files below a folder in sorted order, and how many others there are; hidden ones do not count."""
    files: list[Path] = []
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files += [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
    readable = [path for path in files if _is_readable(path.name)]
    if not readable:
        endings = sorted({path.suffix or path.name for path in files})
        raise InputError(
            f"the folder {folder} holds nothing readable",
            found=f"{len(files)} files" + (f" ({', '.join(endings[:8])})" if files else ""),
            change=f"it should hold files that end with one of {', '.join(ENDINGS)}",
        )
    return readable, len(files) - len(readable)


def _is_readable(name: str) -> bool:
    return name.lower().endswith(ENDINGS)


def file_hash(path: Path) -> str:
    """xxh3_64 of a file. Raises InputError where it cannot be read."""
    digest = xxhash.xxh3_64()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise _unreadable(path, error) from error
    return digest.hexdigest()


def file_size(path: Path) -> int:
    """Bytes of a file. Raises InputError where there are none."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from error
    if size == 0:
        raise InputError(f"{path} is empty", change="remove it from the inputs or fill it")
    return size


def _unreadable(path: Path, error: OSError) -> InputError:
    found = error.strerror or str(error)
    return InputError(f"{path} cannot be read", found=found, change="check the file and its permissions")


def _decompressed(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Blocks of the content. Raises EOFError when a compressed stream ends early."""
    ending = path.suffix.lower()
    if ending == ".zst":
        yield from _zst_blocks(file)
        return
    source = gzip.GzipFile(fileobj=file) if ending == ".gz" else file
    while block := source.read(BLOCK):
        yield block


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


def _without_mark(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Drop the byte order mark some programs put before UTF-8."""
    yield next(blocks, b"").removeprefix(b"\xef\xbb\xbf")
    yield from blocks


def _lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    pending: list[bytes] = []
    for block in blocks:
        first, *others = block.split(b"\n")
        pending.append(first)
        for line in others:
            yield b"".join(pending)
            pending = [line]
    yield b"".join(pending)


def _cut_stream(blocks: Iterator[bytes], separator: bytes | None = None) -> Iterator[tuple[bytes, bool]]:
    """Join blocks and cut them into (piece, is it the last of its document)."""
    buffer = b""
    # What is held back is longer than a separator, so none is cut in two.
    held = PIECE_BYTES + len(separator or b"")
    for block in blocks:
        buffer += block
        if separator:
            *complete, buffer = buffer.split(separator)
            yield from ((document, True) for document in complete)
        while len(buffer) > held:
            cut = _cut_position(buffer)
            yield buffer[:cut], False
            buffer = buffer[cut:]
    yield buffer, True


def _cut_position(data: bytes) -> int:
    """After the last line end, else before the last space, else between two characters, of the first PIECE_BYTES."""
    if (line_end := data.rfind(b"\n", 0, PIECE_BYTES)) >= 0:
        return line_end + 1
    if (space := data.rfind(b" ", 1, PIECE_BYTES)) > 0:
        return space
    cut = PIECE_BYTES
    while cut > PIECE_BYTES - 3 and data[cut] & 0xC0 == 0x80:  # a continuation byte of UTF-8
        cut -= 1
    return cut


def _check_utf8(path: Path, data: bytes, offset: int, line: int) -> None:
    """`data` stands at `offset` in the text, after `line` whole lines."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        number = line + data.count(b"\n", 0, error.start) + 1
        raise _not_utf8(path, error, number, f"{offset + error.start} bytes into the text") from error


def _not_utf8(path: Path, error: UnicodeDecodeError, line: int, where: str) -> InputError:
    utf16 = error.object[:2] in (b"\xff\xfe", b"\xfe\xff")
    return InputError(
        f"{path}, line {line}: not UTF-8",
        found=f"byte 0x{error.object[error.start]:02x}, {where}" + (" (looks like UTF-16)" if utf16 else ""),
        change=f"convert the file: iconv -f {'UTF-16' if utf16 else 'ENCODING'} -t UTF-8 FILE",
    )
