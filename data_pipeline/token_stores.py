"""Corpora that others have tokenised already, as documents of token ids.

    Megatron      NAME.bin with NAME.idx (MMIDIDX, version 1): documents of one or more sequences
    datatrove     NAME.ds with NAME.ds.index, what nanotron trains on: u64 ends of documents, in tokens
    litdata       a folder with index.json and chunks, `optimize` with its TokensLoader: each item is a document
    datasets      a folder written by `Dataset.save_to_disk` of Hugging Face datasets: rows of an integer list column,
                  `input_ids` or the only one; needs pyarrow
    flat          any other .bin or .ds: ids of one dtype, one after the other; documents end at EOS

EOS ends a document wherever it stands and is left out, as is BOS at the begin of one: a corpus holds raw tokens. An id
that is not one of text (beyond the tokenizer's vocabulary, or special) is an error with its place.
"""

from __future__ import annotations

import glob
import json
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from braid.data_pipeline.inputs import both, file_hash, file_size
from braid.data_pipeline.remote import is_url
from braid.data_pipeline.tokenizers import Tokenizer
from braid.kernels.errors import InputError

ENDINGS = (".bin", ".ds")
PIECE_TOKENS = 1 << 18
"""Ids read at a time; a longer document comes in several pieces."""
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
LITDATA_DTYPES = {
    "no_header_tensor": {
        11: "u1",
        12: "i1",
        13: "<i2",
        14: "<i2",
        15: "<i4",
        16: "<i4",
        17: "<i8",
        18: "<i8",
        20: "<u2",
    },
    "no_header_numpy": {0: "i1", 1: "<i2", 2: "<i4", 3: "<i8", 4: "u1", 5: "<u2", 6: "<u4", 7: "<u8"},
}
"""Of its serializers, integers alone."""
LITDATA_INDEX = "index.json"
STATE_FILE = "state.json"
COPY = "it is cut off or damaged: copy it again"

Segment = tuple[np.ndarray, bool]
"""Ids, and whether the index of the store ends a document after them."""


class TokenPiece(NamedTuple):
    """A `readers.Piece` that holds ids instead of text; `num_bytes` are those of the text they stand for."""

    file: int
    index: int
    part: int
    document: str
    group: str
    ids: np.ndarray
    num_bytes: int
    last: bool


class TokenFiles:
    """The stores that `inputs` (files, folders, glob patterns) stand for, as a source of `TokenPiece`s.

    documents: `index`, documents end where the store's index (or rows) says and at EOS; `eos`, at EOS alone, for stores
    whose rows are cut from one long text. token_dtype: of flat files without an index. validation and first_validation:
    see `readers.TextFiles`.
    Raises InputError for what cannot be read, is cut off, or does not fit the tokenizer.
    """

    has_pairs = False
    num_ignored = 0

    def __init__(
        self,
        inputs: Sequence[str | Path],
        tokenizer: Tokenizer,
        *,
        validation: Sequence[str | Path] = (),
        documents: str = "index",
        token_dtype: str | None = None,
    ) -> None:
        if documents not in ("index", "eos"):
            raise InputError("where documents end is not known", found=documents, change="use `index` or `eos`")
        self.tokenizer, self._at_index = tokenizer, documents == "index"
        paths, more = _resolve(inputs), _resolve(validation) if validation else []
        if twice := sorted(str(path) for path in {*paths} & {*more}):
            raise both(twice)
        self.first_validation = len(paths) if more else None
        paths += more
        self.stores = [_open_store(path, token_dtype) for path in paths]
        common = os.path.commonpath([path.parent for path in paths])
        self.names = [path.relative_to(common).as_posix() for path in paths]
        self._sizes = [sum(map(file_size, store.paths)) for store in self.stores]
        self.total_bytes, self.position = sum(self._sizes), 0
        self._common = Path(common)

    def describe(self) -> list[dict]:
        """Name, size and xxh3_64 of every file: what a prepared corpus was made from."""
        paths = [path for store in self.stores for path in store.paths]
        names = [path.relative_to(self._common).as_posix() for path in paths]
        return [
            {"name": name, "bytes": file_size(path), "xxh3": file_hash(path)}
            for path, name in zip(paths, names, strict=True)
        ]

    def pieces(self, first_file: int = 0) -> Iterator[TokenPiece]:
        """Pieces of all documents from store number `first_file` on."""
        for number in range(first_file, len(self.stores)):
            self.position = sum(self._sizes[:number])
            has_tokens = False
            for index, part, ids, last in self._documents(number):
                has_tokens = True
                document = f"{self.names[number]}#{index}"
                yield TokenPiece(number, index, part, document, document, ids, self._num_bytes(ids), last)
            if not has_tokens:
                raise InputError(f"{self.stores[number].path} holds no text", change="remove it from the inputs")
        self.position = self.total_bytes

    def _documents(self, number: int) -> Iterator[tuple[int, int, np.ndarray, bool]]:
        """(index of the document, part, ids of text, last part?) for every piece of a store; documents without a token
        are left out."""
        index = part = place = 0
        for segment, ended in self._chunks(number):
            edges = (np.flatnonzero(segment == self.tokenizer.eos_id) + 1).tolist()
            if edges[-1:] != [len(segment)]:
                edges.append(len(segment))
            start = 0
            for stop in edges:
                at_eos = stop > start and segment[stop - 1] == self.tokenizer.eos_id
                ids = segment[start : stop - at_eos]
                if part == 0 and len(ids) and ids[0] == self.tokenizer.bos_id:
                    ids = ids[1:]
                last = bool(at_eos or (ended and stop == len(segment)))
                if len(ids) or (part and last):
                    yield index, part, self._checked(ids, number, place + stop - at_eos - len(ids)), last
                    part += 1
                if last:
                    index, part = index + 1, 0
                start = stop
            place += len(segment)
        if part:
            yield index, part, np.empty(0, self.tokenizer.dtype), True

    def _chunks(self, number: int) -> Iterator[Segment]:
        """The segments of a store in chunks of at most PIECE_TOKENS."""
        store, before = self.stores[number], self.position
        for ids, ended in store.segments():
            for start in range(0, max(len(ids), 1), PIECE_TOKENS):  # an empty one may still end a document
                chunk = ids[start : start + PIECE_TOKENS]
                yield chunk, ended and self._at_index and start + len(chunk) == len(ids)
                self.position = min(self.position + chunk.nbytes, before + self._sizes[number])

    def _checked(self, ids: np.ndarray, number: int, place: int) -> np.ndarray:
        """The ids in the tokenizer's dtype, when all of them stand for text."""
        special = self.tokenizer.is_special
        outside = (ids < 0) | (ids >= len(special))
        wrong = outside if outside.any() else special[ids]
        if wrong.any():
            k = int(wrong.argmax())
            vocabulary = f"the tokenizer has ids 0 to {len(special) - 1}"
            found = f"id {ids[k]}, " + (vocabulary if outside.any() else "which the tokenizer keeps for special tokens")
            raise InputError(
                f"{self.stores[number].path}, token {place + k}: not an id of text",
                found=found,
                change="give the tokenizer that made these ids; for a flat file, check --token-dtype",
            )
        return ids.astype(self.tokenizer.dtype)

    def _num_bytes(self, ids: np.ndarray) -> int:
        sizes = self.tokenizer.token_bytes
        return len(self.tokenizer.decode(ids).encode()) if sizes is None else int(sizes[ids].sum())


class MegatronStore:
    """NAME.bin and NAME.idx of Megatron-core's IndexedDataset. Little endian: magic, u64 version 1, u8 dtype, u64
    sequences n, u64 entries d of the document index | i32 lengths[n] | i64 offsets[n] in bytes | i64 documents[d],
    the first sequence of each document and their number | (i8 modes[n])."""

    def __init__(self, path: Path) -> None:
        self.path, index = path, path.with_suffix(".idx")
        self.paths = [path, index]
        content = np.memmap(index, np.uint8, mode="r") if file_size(index) else np.empty(0, np.uint8)
        header = content[:34].tobytes()
        if len(header) < 34 or not header.startswith(MEGATRON_MAGIC):
            raise InputError(f"{index} is not an index of Megatron", change=COPY)
        version, code, num_sequences, num_entries = struct.unpack("<QBQQ", header[len(MEGATRON_MAGIC) :])
        if version != 1 or code not in MEGATRON_DTYPES:
            found = f"version {version}, dtype code {code}"
            raise InputError(f"{index} is of a kind that is not read", found=found, change="write it with integer ids")
        size = 34 + 12 * num_sequences + 8 * num_entries
        if len(content) not in (size, size + num_sequences):
            raise InputError(f"{index} is incomplete", found=f"{len(content)} bytes instead of {size}", change=COPY)

        def part(start: int, dtype: str, count: int) -> np.ndarray:
            return np.asarray(content[start : start + count * np.dtype(dtype).itemsize]).view(dtype)

        dtype = np.dtype(MEGATRON_DTYPES[code])
        self._lengths = part(34, "<i4", num_sequences)
        offsets = part(34 + 4 * num_sequences, "<i8", num_sequences)
        self._documents = part(34 + 12 * num_sequences, "<i8", num_entries)
        self._tokens = _mapped(path, dtype)
        self._starts, rest = np.divmod(offsets, dtype.itemsize)
        ordered = num_entries > 0 and self._documents[0] == 0 and self._documents[-1] == num_sequences
        ordered = ordered and (np.diff(self._documents) >= 0).all() and (self._lengths >= 0).all()
        if not ordered or rest.any() or (self._starts < 0).any():
            raise InputError(f"{index} contradicts itself", change=COPY)
        last = int((self._starts + self._lengths).max(initial=0))
        if last > len(self._tokens):
            raise InputError(f"{path} is cut off", found=f"{len(self._tokens)} of {last} tokens", change=COPY)

    def segments(self) -> Iterator[Segment]:
        ends = set(self._documents[1:].tolist())
        for k, (start, length) in enumerate(zip(self._starts.tolist(), self._lengths.tolist(), strict=True)):
            yield self._tokens[start : start + length], k + 1 in ends


class IndexedStore:
    """NAME and NAME.index: ids, and the ends of documents in tokens (u64). The width of an id follows from both."""

    def __init__(self, path: Path) -> None:
        self.path, index = path, path.with_name(path.name + ".index")
        self.paths = [path, index]
        self._ends = _mapped(index, np.dtype("<u8")).astype(np.int64)
        if (np.diff(self._ends, prepend=0) < 0).any() or self._ends[-1] == 0:
            raise InputError(f"{index} contradicts itself", found="ends do not increase", change=COPY)
        width, rest = divmod(file_size(path), int(self._ends[-1]))
        if rest or width not in (2, 4):
            found = f"{file_size(path)} bytes for {self._ends[-1]} tokens, {width} each and {rest} more"
            raise InputError(f"{path} and its index do not fit each other", found=found, change=COPY)
        self._tokens = _mapped(path, np.dtype(f"<u{width}"))

    def segments(self) -> Iterator[Segment]:
        start = 0
        for end in self._ends.tolist():
            yield self._tokens[start:end], True
            start = end


class FlatStore:
    """Ids of one dtype and nothing else."""

    def __init__(self, path: Path, dtype: str | None) -> None:
        self.path, self.paths = path, [path]
        if dtype is None:
            change = "give --token-dtype uint16 or uint32, or put its index (.idx, .ds.index) beside it"
            raise InputError(f"{path} does not say how wide its ids are", change=change)
        self._tokens = _mapped(path, np.dtype(dtype).newbyteorder("<"))

    def segments(self) -> Iterator[Segment]:
        yield self._tokens, False


class LitdataStore:
    """A folder of litdata: index.json names the chunks and the dtype. A chunk, little endian: u32 items n | u32 ends
    [n + 1] in bytes, of the header and of each item | ids."""

    def __init__(self, path: Path) -> None:
        self.path, index = path, path / LITDATA_INDEX
        try:
            content = json.loads(index.read_bytes())
            config = content["config"]
            (layout,) = config["data_format"]
            files = [(path / chunk["filename"], chunk["chunk_bytes"]) for chunk in content["chunks"]]
            kind, _, code = layout.partition(":")
            packed = [str(config[key]) for key in ("compression", "encryption") if config.get(key)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            found = f"{type(error).__name__}: {error}"
            raise InputError(f"{index} is no index of litdata, or damaged", found=found, change=COPY) from error
        dtype = LITDATA_DTYPES.get(kind, {}).get(int(code) if code.isdecimal() else -1)
        if dtype is None or packed:
            found = f"data_format {layout}" + "".join(f", {how}" for how in packed)
            change = "write it by `litdata.optimize` with `item_loader=TokensLoader()`, of integer ids, not compressed"
            raise InputError(f"{path} does not hold plain token ids", found=found, change=change)
        self.paths, self._dtype = [file for file, _ in files] + [index], np.dtype(dtype)
        for file, size in files:
            if file_size(file) != size:
                raise InputError(f"{file} is cut off", found=f"{file_size(file)} bytes instead of {size}", change=COPY)

    def segments(self) -> Iterator[Segment]:
        for path in self.paths[:-1]:
            content = np.asarray(np.memmap(path, np.uint8, mode="r"))
            number = int.from_bytes(content[:4].tobytes(), "little")
            first = 8 + 4 * number
            ends = content[4:first].view("<u4").astype(np.int64) if first <= len(content) else np.zeros(1, np.int64)
            fits = ends[0] == first and ends[-1] == len(content) and (np.diff(ends) >= 0).all()
            if not fits or ((ends - first) % self._dtype.itemsize).any():
                raise InputError(f"{path} contradicts itself", change=COPY)
            for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
                yield content[start:stop].view(self._dtype), True


class DatasetStore:
    """A folder written by `Dataset.save_to_disk`: state.json names the Arrow files, in which each row is a segment."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            state = json.loads((path / STATE_FILE).read_bytes())
            files = [path / entry["filename"] for entry in state["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            found = f"{type(error).__name__}: {error}"
            raise InputError(f"{path / STATE_FILE} cannot be read", found=found, change=COPY) from error
        if state.get("_indices_data_files"):
            change = "save it again after `dataset.flatten_indices()`"
            raise InputError(f"{path} holds a selection of the rows in its files", change=change)
        self.paths = [*files, path / STATE_FILE]

    def segments(self) -> Iterator[Segment]:
        try:
            import pyarrow
        except ImportError as error:
            change = "pip install 'braid-lm[parquet]'"
            raise InputError(f"{self.path}: reading it needs pyarrow", found=str(error), change=change) from error
        for path in self.paths[:-1]:
            try:
                with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as reader:
                    name = self._column(reader.schema)
                    for batch in reader:
                        yield from self._rows(batch.column(name), path)
            except (pyarrow.ArrowException, OSError) as error:
                found = str(error).splitlines()[0]
                raise InputError(f"{path} cannot be read to its end", found=found, change=COPY) from error

    def _rows(self, column, path: Path) -> Iterator[Segment]:
        """The rows of a pyarrow list array."""
        values = column.flatten()
        if column.null_count or values.null_count:
            raise InputError(f"{path}: a row or an id is missing (null)", change="remove such rows")
        start, ids = 0, values.to_numpy(zero_copy_only=False)
        for length in column.value_lengths().to_pylist():
            yield ids[start : start + length], True
            start += length

    def _column(self, schema) -> str:
        import pyarrow.types as types

        lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
        found = [
            field.name
            for field in schema
            if any(is_kind(field.type) for is_kind in lists) and types.is_integer(field.type.value_type)
        ]
        if "input_ids" in found or len(found) == 1:
            return "input_ids" if "input_ids" in found else found[0]
        raise InputError(
            f"{self.path}: which column holds the ids?",
            found=f"columns {', '.join(schema.names)}; with lists of integers: {', '.join(found) or 'none'}",
            change="call it input_ids",
        )


Store = MegatronStore | IndexedStore | FlatStore | LitdataStore | DatasetStore


def _open_store(path: Path, token_dtype: str | None) -> Store:
    if path.is_dir():
        return DatasetStore(path) if (path / STATE_FILE).is_file() else LitdataStore(path)
    if path.suffix == ".bin" and path.with_suffix(".idx").exists():
        return MegatronStore(path)
    if path.with_name(path.name + ".index").exists():
        return IndexedStore(path)
    return FlatStore(path, token_dtype)


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    size = file_size(path)
    if size % dtype.itemsize:
        found = f"{size} bytes, {dtype.itemsize} for each number"
        raise InputError(f"{path} is cut off, or of another dtype", found=found, change=COPY)
    return np.asarray(np.memmap(path, dtype, mode="r"))


def _resolve(inputs: Sequence[str | Path]) -> list[Path]:
    """The stores for the inputs, each once: data files, and folders of datasets."""
    found: dict[Path, None] = {}
    for given in inputs:
        if is_url(given):
            change = "download it first: these files are mapped into memory, which a store does not do"
            raise InputError("--tokens reads files that lie here", found=str(given), change=change)
        matches = [str(given)]
        if not os.path.exists(given) and glob.has_magic(str(given)):
            matches = sorted(glob.glob(str(given), recursive=True))
        if not matches or not os.path.exists(matches[0]):
            what = "matches no file" if not matches else "does not exist"
            raise InputError(f"the input {given} {what}", found=f"looked from {os.getcwd()}", change="check the path")
        for match in matches:
            path = Path(os.path.abspath(match))
            found.update(dict.fromkeys(_stores_at(path)))
    return list(found)


def _stores_at(path: Path) -> list[Path]:
    if path.is_dir():
        if (path / STATE_FILE).is_file() or (path / LITDATA_INDEX).is_file():
            return [path]
        if (path / "dataset_dict.json").is_file():
            splits = sorted(state.parent.name for state in path.glob(f"*/{STATE_FILE}"))
            found = f"splits {', '.join(splits)}"
            raise InputError(f"{path} holds several splits", found=found, change=f"give {path}/SPLIT")
        if stores := sorted(inside for inside in path.rglob("*") if inside.suffix in ENDINGS):
            return stores
        raise InputError(f"the folder {path} holds no token store", change=f"files should end with {ENDINGS}")
    if path.suffix == ".idx":
        path = path.with_suffix(".bin")
    if path.name.endswith(".ds.index"):
        path = path.with_suffix("")
    if path.suffix not in ENDINGS:
        change = f"give files that end with one of {', '.join(ENDINGS)}, or folders of datasets"
        raise InputError(f"{path} is no token store", change=change)
    return [path]
