"""Text files to documents, streamed in constant memory: .txt, .jsonl and .json (also .gz, .zst, .bz2, .xz), .parquet,
.arrow and .feather. A .json file holds an array of records, or a record a line as .jsonl does.

(source, target) pairs come from two fields of the records, as two documents each, one after the other.

What is wrong with a file is said with its name and line, and what to do. Nothing is skipped silently but blank
documents that are no part of a pair, which hold nothing to learn from. Order and ids depend on the names and contents
of the files alone.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

from braid.data_pipeline import tables
from braid.data_pipeline.compression import COMPRESSIONS, Damaged, decompressed, without_compression
from braid.data_pipeline.inputs import InputFile, describe, find_both, names, unreadable
from braid.data_pipeline.json_array import array_records
from braid.kernels.errors import InputError

TEXT_KINDS, TABLE_KINDS = (".txt", ".jsonl", ".json"), (*tables.PARQUET, *tables.ARROW)
ENDINGS = f"{', '.join(TEXT_KINDS)} (each also with {', '.join(COMPRESSIONS)}), {', '.join(TABLE_KINDS)}"
BESIDE_TABLES = ("state.json", "dataset_info.json", "dataset_dict.json")
"""What Hugging Face datasets put into a folder beside its .arrow files; no texts."""
PIECE_BYTES = 1 << 20
"""A longer document comes in pieces of about this many bytes, cut at line ends, so that a file of any length can be
read, and one file tokenised by several processes."""
NAMES_SHOWN, LONGEST_NAME = 12, 40
"""How many names of fields an error shows, and how much of each."""


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
    """The files that `inputs` (files, folders, glob patterns, or URLs of these) stand for, in the order given, folders
    in sorted order.

    `files`: see `InputFile`; `names`: relative to the folder they share; `num_ignored`: files of other kinds met in
    folders. `total_bytes` on disk, of which `position` have been read by the last iterator that `pieces` returned.
    `pair_fields`: the fields of source and target where the files hold pairs. The two are one group.
    `validation`: inputs whose files are the validation split; they follow the others in `files`, from number
    `first_validation` on (None without any).
    Raises InputError for a path that does not exist, an empty file, a kind of file that cannot be read, a file that is
    both.
    """

    def __init__(
        self,
        inputs: Sequence[str | Path],
        *,
        validation: Sequence[str | Path] = (),
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
        self.files, self.num_ignored, self.first_validation = find_both(inputs, validation, _is_readable, ENDINGS)
        if self.has_pairs and (plain := [file for file in self.files if _is_text(file)]):
            change = f"pairs are read from {', '.join((*TEXT_KINDS[1:], *TABLE_KINDS))} files"
            raise InputError(f"{plain[0]} holds no pairs", change=change)
        self.names = names(self.files)
        self.sizes = [file.size for file in self.files]
        self.total_bytes = sum(self.sizes)
        self.position = 0

    @property
    def has_pairs(self) -> bool:
        """Whether a record is a pair of documents."""
        return len(self._fields) == 2

    def describe(self) -> list[dict]:
        """Name, size and xxh3_64 of every file: what a prepared corpus was made from."""
        return describe(self.files)

    def pieces(self, first_file: int = 0) -> Iterator[Piece]:
        """Pieces of all documents from file number `first_file` on."""
        for number in range(first_file, len(self.files)):
            file, name = self.files[number], self.names[number]
            self.position = sum(self.sizes[:number])
            has_text = False
            for index, part, data, last in self._documents(file):
                if part == 0 and last and not data.strip() and not self.has_pairs:
                    continue
                has_text = True
                record, k = divmod(index, len(self._fields))
                group = document = f"{name}#{record}"
                if self.has_pairs:
                    document += f":{[*self._fields][k]}"
                yield Piece(number, index, part, document, group, data.decode("utf-8"), len(data), last)
            if not has_text:
                raise InputError(f"{file} holds no text", change="remove it from the inputs or fill it")
        self.position = self.total_bytes

    def _documents(self, source: InputFile) -> Iterator[tuple[int, int, bytes, bool]]:
        """(index of the document, part, valid UTF-8, last part?) for every piece of a file."""
        location = source.location
        try:
            with source.open() as file:
                if _kind(source).endswith(TABLE_KINDS):
                    yield from self._table(source, file)
                    return
                blocks = _without_mark(self._counted(decompressed(source.name, file), file))
                if _is_text(source):
                    yield from self._text(location, blocks)
                    return
                is_array = False
                if _kind(source).endswith(".json"):
                    is_array, blocks = _begins_array(blocks)
                yield from self._json_array(location, blocks) if is_array else self._json_lines(location, blocks)
        except Damaged as error:
            change = "it is cut off or damaged: copy or download it again"
            raise InputError(f"{source} cannot be decompressed to its end", found=str(error), change=change) from error
        except OSError as error:
            raise unreadable(location, error) from error

    def _counted(self, blocks: Iterator[bytes], file: BinaryIO) -> Iterator[bytes]:
        before = self.position
        for block in blocks:
            self.position = before + file.tell()
            yield block

    def _text(self, location: str, blocks: Iterator[bytes]) -> Iterator[tuple[int, int, bytes, bool]]:
        """A plain text file is one document, or several with `separator` (left out) between them."""
        separator = self.separator.encode("utf-8") if self.separator else None
        index = part = offset = line = 0
        for data, last in _cut_stream(blocks, separator):
            _check_utf8(location, data, offset, line)
            yield index, part, data, last
            ended = separator or b"" if last else b""
            offset += len(data) + len(ended)
            line += data.count(b"\n") + ended.count(b"\n")
            index, part = (index + 1, 0) if last else (index, part + 1)

    def _json_lines(self, location: str, blocks: Iterator[bytes]) -> Iterator[tuple[int, int, bytes, bool]]:
        """One JSON object a line; blank lines are passed over. The index counts lines from 0."""
        for number, line in enumerate(_lines(blocks)):
            if line.strip():
                where = f"{location}, line {number + 1}"
                record = self._record(_parsed(location, number + 1, line), where, "every line")
                yield from self._cut_fields(number, [record[field] for field in self._fields.values()], where)

    def _cut_fields(self, number: int, texts: Sequence[object], where: str) -> Iterator[tuple[int, int, bytes, bool]]:
        """The documents of line or row `number`: one, or two of a pair."""
        for k, ((what, field), text) in enumerate(zip(self._fields.items(), texts, strict=True)):
            encoded = _encoded(text, what, field, where)
            for part, (data, last) in enumerate(_cut_stream(iter([encoded]))):
                yield len(self._fields) * number + k, part, data, last

    def _json_array(self, location: str, blocks: Iterator[bytes]) -> Iterator[tuple[int, int, bytes, bool]]:
        """One document a record of the array. The index counts records from 0."""
        number = -1
        try:
            for number, value in enumerate(array_records(blocks)):
                where = f"{location}, record {number + 1}"
                record = self._record(value, where, "every record")
                yield from self._cut_fields(number, [record[field] for field in self._fields.values()], where)
        except InputError:
            raise
        except (ValueError, RecursionError) as error:
            where, what = f"record {number + 2}", "not valid JSON"
            if isinstance(error, UnicodeDecodeError):  # which record it is in is not known yet
                where, what = f"after record {number + 1}", "not UTF-8"
            change = "the file must be one array of records, [{...}, {...}], in UTF-8; repair it from there on"
            raise InputError(f"{location}, {where}: {what}", found=str(error), change=change) from error

    def _record(self, value: object, where: str, each: str) -> dict:
        if not isinstance(value, dict):
            example = ", ".join(f'"{field}": "..."' for field in self._fields.values())
            change = f"{each} must be a JSON object like {{{example}}}"
            raise InputError(f"{where}: not a JSON object", found=type(value).__name__, change=change)
        self._check_fields("field", value, where)
        return value

    def _check_fields(self, kind: str, present: Collection[str], where: str) -> None:
        for what, field in self._fields.items():
            if field not in present:
                change = f"name the {kind} that holds the {what}: --{what}-field {kind.upper()}"
                found = f"{kind}s: {_some(present) or 'none'}"
                raise InputError(f"{where}: there is no {kind} `{field}`", found=found, change=change)

    def _table(self, source: InputFile, file: BinaryIO) -> Iterator[tuple[int, int, bytes, bool]]:
        """One document a row. The index counts rows from 0."""

        def check(columns: list[str]) -> None:
            self._check_fields("column", columns, source.location)

        before, index = self.position, 0
        for batch, share in tables.rows(source.location, file, list(self._fields.values()), check):
            for texts in batch:
                yield from self._cut_fields(index, texts, f"{source}, row {index + 1}")
                index += 1
            self.position = before + (file.tell() if share is None else int(source.size * share))


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


def _some(names: Collection[str]) -> str:
    """A few names as they are and how many more there are: a table of a vocabulary has one for each token."""
    shown = [name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..." for name in islice(names, NAMES_SHOWN)]
    return ", ".join(shown) + (f" and {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else "")


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


def _kind(file: InputFile) -> str:
    return without_compression(file.name)


def _is_text(file: InputFile) -> bool:
    return _kind(file).endswith(".txt")


def _is_readable(file: InputFile, in_folder: bool) -> bool:
    if in_folder and file.name in BESIDE_TABLES:
        return False
    return _kind(file).endswith(TEXT_KINDS) or file.name.lower().endswith(TABLE_KINDS)


def _begins_array(blocks: Iterator[bytes]) -> tuple[bool, Iterator[bytes]]:
    """Is the first character that is no space a `[`? And the blocks again."""
    seen = []
    for block in blocks:
        seen.append(block)
        if begin := block.lstrip()[:1]:
            return begin == b"[", chain(seen, blocks)
    return False, iter(seen)


def _parsed(location: str, number: int, line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(location, error, number, f"{error.start} bytes into the line") from error
    except (ValueError, RecursionError) as error:
        change = "every line must be one complete JSON object; repair or remove this line"
        raise InputError(f"{location}, line {number}: not valid JSON", found=str(error), change=change) from error


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


def _check_utf8(location: str, data: bytes, offset: int, line: int) -> None:
    """`data` stands at `offset` in the text, after `line` whole lines."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        number = line + data.count(b"\n", 0, error.start) + 1
        raise _not_utf8(location, error, number, f"{offset + error.start} bytes into the text") from error


def _not_utf8(location: str, error: UnicodeDecodeError, line: int, where: str) -> InputError:
    utf16 = error.object[:2] in (b"\xff\xfe", b"\xfe\xff")
    return InputError(
        f"{location}, line {line}: not UTF-8",
        found=f"byte 0x{error.object[error.start]:02x}, {where}" + (" (looks like UTF-16)" if utf16 else ""),
        change=f"convert the file: iconv -f {'UTF-16' if utf16 else 'ENCODING'} -t UTF-8 FILE",
    )
