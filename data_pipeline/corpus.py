"""A prepared corpus: what its files are called and hold, and random access to the tokens of a split.

    manifest.json             version, tokenizer_hash, dtype, vocab_size, format, pairs, splits: {name: documents,
                              tokens, bytes, rows, fingerprint}
    tokenizer/                written by `Tokenizer.save`
    train/, validation/       index.json and shards in one of `formats.FORMATS`, rows.npy, and pairs.npy where the
                              corpus consists of pairs

A split is stored as one long sequence of raw tokens without special ones, cut into blocks (stored rows), with the ends
of documents beside it. Sequence length and packing are applied when reading, on the virtual stream

    document EOS document EOS ...

whose positions are found by arithmetic: nothing of it is ever written or held in memory. A (source, target) pair is
two documents, either of which may be empty; pairs.npy says where in the stream each pair begins.
"""

from __future__ import annotations

import fcntl
import json
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from braid.data_pipeline.formats import FORMATS, shard_reader
from braid.data_pipeline.remote import Fetching, is_url
from braid.data_pipeline.shards import INDEX_FILE, ShardReader, atomic_file
from braid.data_pipeline.tokenizers import load_tokenizer
from braid.kernels.errors import ConfigError, InputError

if TYPE_CHECKING:
    from braid.data_pipeline.cache import FetchingAhead
    from braid.data_pipeline.remote import Store

MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 1
TOKENIZER_FOLDER = "tokenizer"
ROWS_FILE = "rows.npy"
PAIRS_FILE = "pairs.npy"
ORIGIN_FILE = "origin.json"
"""In a folder of the cache: the store its shards come from (`remote_corpus`)."""
BLOCK_BYTES = 64 << 10
"""Bytes of tokens in a stored row; the last row of a split may be shorter."""

MANY_ENDS = 10  # documents in a row, from which on it is filled at once instead of document by document
COUNT = np.arange(1 << 12)
MAX_TABLES = 64  # shards whose block positions are kept; one table is some 16 KiB


def write_rows_file(folder: Path, rows: np.ndarray) -> None:
    """Atomically write `rows.npy`: int64 [rows, 2], the tokens and the document ends of each stored row."""
    assert rows.dtype == np.int64 and rows.ndim == 2 and rows.shape[1] == 2, f"{rows.dtype} {rows.shape}"
    with atomic_file(Path(folder) / ROWS_FILE) as file:
        np.save(file, rows)


def write_pairs_file(folder: Path, reader: ShardReader) -> None:
    """Atomically write `pairs.npy` of a split whose shards and index are complete: int64 [pairs + 1], the stream
    position at which each pair begins, closed by the length of the stream."""
    starts = [np.zeros(1, np.int64)]
    num_tokens = num_documents = 0
    for i in range(reader.num_rows):
        block = reader.row(i)
        numbers = num_documents + np.arange(len(block["ends"]))
        after = num_tokens + block["ends"] + numbers + 1  # behind the EOS of this document and of those before it
        starts.append(after[numbers % 2 == 1])
        num_tokens += len(block["tokens"])
        num_documents += len(numbers)
    assert num_documents % 2 == 0, f"{num_documents} documents are no pairs"
    with atomic_file(Path(folder) / PAIRS_FILE) as file:
        np.save(file, np.concatenate(starts))


def split_fingerprint(folder: Path, tokenizer_hash: str, *, pairs: bool = False) -> str:
    """16 hex digits that name the content of a split: xxh3_64 of index.json, rows.npy, pairs.npy if there are `pairs`,
    and the tokenizer's hash."""
    digest = xxhash.xxh3_64()
    for name in (INDEX_FILE, ROWS_FILE, *([PAIRS_FILE] if pairs else [])):
        with open(Path(folder) / name, "rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    digest.update(tokenizer_hash.encode())
    return digest.hexdigest()


class TokenCorpus:
    """One split of a prepared corpus, opened with `TokenCorpus.open`.

    source: what it was opened by, a folder or a URL. folder: where its files are; of a URL, in the cache.
    manifest: dict. split, fingerprint (16 hex digits), dtype of stored tokens, vocab_size (mask included), tokenizer.
    num_tokens, num_documents and num_bytes (original UTF-8 bytes) of the split; num_stream_tokens counts one EOS per
    document more. shard_starts: stream position at which each shard begins, closed by num_stream_tokens. pair_starts:
    the content of pairs.npy, a map of the file; None where the corpus does not consist of pairs.

    Opening reads no shard: each is checked when it is first read. Memory does not grow with the corpus but for a few
    numbers per shard. Reading is safe from several threads and after a fork; a corpus can be pickled.
    """

    @classmethod
    def open(
        cls,
        folder: str | Path,
        split: str,
        damaged: str = "stop",
        ledger: Path | None = None,
        fetching: Fetching | None = None,
    ) -> TokenCorpus:
        """Open `split` ("train" or "validation") of a folder written by `braid prepare`, or of a copy of one in a
        store, whose URL `folder` is then (a str: a Path would shorten it). `fetching` says how files come from there.

        damaged: what a missing or damaged shard means to the readers built on top: `stop` (InputError with its name)
        or `skip` (its rows are left out and written to `ledger`, a file of JSON lines). Either way a read that touches
        the shard is refused.

        Raises InputError when the folder is missing, incomplete, changed, empty or does not fit its tokenizer,
        StoreFailed when it does not come from its store.
        """
        if damaged not in ("stop", "skip"):
            raise ConfigError(
                "what to do about damaged shards is not known",
                found=f"damaged={damaged!r}",
                change="use `stop` or `skip`",
            )
        if damaged == "skip" and ledger is None:
            raise ConfigError(
                "rows of damaged shards cannot be skipped without a ledger to name them",
                change="give the ledger's path, or use `stop`",
            )
        source, store, folder = str(folder), None, Path(folder)
        if is_url(source):
            from braid.data_pipeline.remote_corpus import cached_corpus

            folder, store = cached_corpus(source, split, fetching or Fetching())
        elif (folder / ORIGIN_FILE).exists():
            from braid.data_pipeline.remote_corpus import origin

            store = origin(folder)
        return cls(folder, split, _read_manifest(folder), damaged, ledger, source, store)

    def __init__(
        self,
        folder: Path,
        split: str,
        manifest: dict,
        damaged: str,
        ledger: Path | None,
        source: str,
        store: Store | None,
    ) -> None:
        self.folder, self.split, self.manifest, self.damaged, self.ledger = folder, split, manifest, damaged, ledger
        self.source = source
        if split not in manifest["splits"]:
            raise InputError(
                f"the corpus {folder} has no split {split}",
                found=f"splits {', '.join(sorted(manifest['splits']))}",
                change="choose one of them or prepare the corpus again",
            )
        described = manifest["splits"][split]
        self.num_tokens, self.num_documents = described["tokens"], described["documents"]
        self.num_bytes, self.fingerprint = described["bytes"], described["fingerprint"]
        if self.num_tokens == 0:
            raise InputError(
                f"the {split} split of {folder} holds no tokens",
                change="prepare it from more text or with another --validation-fraction",
            )
        self.tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
        self._check_tokenizer()
        self.vocab_size, self.dtype = self.tokenizer.vocab_size, np.dtype(manifest["dtype"])
        self.bos_id, self.eos_id = self.tokenizer.bos_id, self.tokenizer.eos_id
        self._reader = shard_reader(manifest["format"], folder / split)
        if store is not None:
            from braid.data_pipeline.cache import CachedShards

            self._reader.remote = CachedShards(store, split, folder / split)
        self._open_tables()
        self._check_fingerprint()

        self._first_blocks = np.concatenate([[0], np.cumsum(self._reader.shard_rows)])
        if self._first_blocks[-1] != len(self._rows):
            raise self._changed(f"{self._first_blocks[-1]} rows in index.json, {len(self._rows)} in rows.npy")
        per_shard = np.add.reduceat(self._rows, self._first_blocks[:-1], axis=0)
        self._shard_tokens = [0, *np.cumsum(per_shard[:, 0]).tolist()]
        self.shard_starts = [0, *np.cumsum(per_shard.sum(axis=1)).tolist()]
        self.num_stream_tokens = self.num_tokens + self.num_documents
        if (self._shard_tokens[-1], self.shard_starts[-1]) != (self.num_tokens, self.num_stream_tokens):
            found = f"{self._shard_tokens[-1]} tokens, {self.shard_starts[-1] - self._shard_tokens[-1]} documents"
            raise self._changed(f"{found} in rows.npy, {self.num_tokens} and {self.num_documents} in the manifest")
        self._tables: dict[tuple[int, bool], list[int]] = {}
        self._damage: dict[int, str | None] = {}

    @property
    def shard_names(self) -> list[str]:
        """File names of the shards, in the order of the stream."""
        return self._reader.shard_names

    @property
    def stored_bytes(self) -> int:
        """Bytes of the split's files; of shards that are still in a store too."""
        files = [path for path in (self.folder / self.split).iterdir() if not path.name.startswith("shard.")]
        shards = (self._reader.stored(k)["bytes"] for k in range(len(self.shard_names)))
        return sum(path.stat().st_size for path in files) + sum(shards)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Positions [start, stop) of the virtual stream "document EOS document EOS ...": 1-D array of `dtype`."""
        out = np.empty(stop - start, self.dtype)
        self.read_into(start, out)
        return out

    def read_into(self, start: int, out: np.ndarray) -> None:
        """`read(start, start + len(out))` into an existing array."""
        self._check_span(start, start + len(out), self.num_stream_tokens)
        filled = 0
        while filled < len(out):
            block, offset, num = self._block(self.shard_starts, True, start + filled)
            _fill(out[filled : filled + num], block["tokens"], block["ends"], offset, self.eos_id)
            filled += num

    def stored_tokens(self, start: int, stop: int) -> np.ndarray:
        """Raw tokens [start, stop) of the split, without any special token: 1-D array of `dtype`."""
        self._check_span(start, stop, self.num_tokens)
        parts = [np.empty(0, self.dtype)]
        while start < stop:
            block, offset, num = self._block(self._shard_tokens, False, start)
            parts.append(block["tokens"][offset : offset + min(num, stop - start)])
            start += num
        return np.concatenate(parts)

    def document_ends(self, shard: int) -> np.ndarray:
        """How many raw tokens of the split lie before the end of each document that ends in a shard: int64."""
        first, block = self._shard_tokens[shard], self._first_blocks[shard]
        parts = [np.empty(0, np.int64)]
        for k in range(self._first_blocks[shard + 1] - block):
            parts.append(first + self._reader.shard_row(shard, k)["ends"])
            first += int(self._rows[block + k, 0])
        return np.concatenate(parts)

    def blocks(self, shard: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """The stored rows of a shard, in order: the stream position at which one begins, its raw tokens, and at which
        offsets among them documents end."""
        for k, first in enumerate(self._table(shard, True)[:-1]):
            block = self._reader.shard_row(shard, k)
            yield first, block["tokens"], block["ends"]

    def damage(self, shard: int) -> str | None:
        """Why a shard cannot be read, None when it is whole; found out at the first call, then remembered."""
        if shard not in self._damage:
            try:
                self._reader.touch(shard)
                self._damage[shard] = None
            except InputError as error:
                self._damage[shard] = error.found
        return self._damage[shard]

    def fetching_ahead(self, window: int) -> FetchingAhead | None:
        """Threads that fetch shards before they are read, for an order with that window; None where all are here."""
        remote = self._reader.remote
        if remote is None:
            return None
        from braid.data_pipeline.cache import FetchingAhead

        entries = [self._reader.stored(shard) for shard in range(len(self.shard_names))]
        return FetchingAhead(remote, entries, 4 * window)

    def write_to_ledger(self, **entry: object) -> None:
        """Append a JSON line to the ledger unless it is there already: other ranks and earlier starts of a run find the
        same damage."""
        line = json.dumps({"split": self.split, **entry}) + "\n"
        self.ledger.parent.mkdir(parents=True, exist_ok=True)
        with open(self.ledger, "a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            if line not in file.readlines():
                file.write(line)

    def _check_span(self, start: int, stop: int, length: int) -> None:
        if not 0 <= start <= stop <= length:
            raise IndexError(f"[{start}, {stop}) of {length} positions")

    def _block(self, shard_starts: list[int], in_stream: bool, position: int) -> tuple[dict[str, np.ndarray], int, int]:
        """The block that holds a position, the offset of the position in it, and how many positions follow there."""
        shard = bisect_right(shard_starts, position) - 1
        table = self._tables.get((shard, in_stream)) or self._table(shard, in_stream)
        k = bisect_right(table, position) - 1
        return self._reader.shard_row(shard, k), position - table[k], table[k + 1] - position

    def _table(self, shard: int, in_stream: bool) -> list[int]:
        """Positions (in the stream, or in the raw tokens) at which the blocks of a shard begin, and where it ends."""
        rows = self._rows[self._first_blocks[shard] : self._first_blocks[shard + 1]]
        sizes = rows.sum(axis=1) if in_stream else rows[:, 0]
        first = self.shard_starts[shard] if in_stream else self._shard_tokens[shard]
        table = [first, *(first + np.cumsum(sizes)).tolist()]
        if len(self._tables) >= MAX_TABLES:
            self._tables.pop(list(self._tables)[0], None)
        self._tables[shard, in_stream] = table
        return table

    def _open_tables(self) -> None:
        self._rows = self._table_file(ROWS_FILE)
        self.pair_starts = self._table_file(PAIRS_FILE) if self.manifest["pairs"] else None

    def _table_file(self, name: str) -> np.ndarray:
        path = self.folder / self.split / name
        try:
            return np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise self._changed(f"{path}: {error}") from error

    def _check_tokenizer(self) -> None:
        stored, expected = self.tokenizer.hash, self.manifest["tokenizer_hash"]
        if stored != expected:
            raise InputError(
                f"tokenizer mismatch: {self.folder / TOKENIZER_FOLDER} did not make this corpus",
                found=f"hash {stored}, the manifest says {expected}",
                change="put the original tokenizer back or prepare the corpus again",
            )

    def _check_fingerprint(self) -> None:
        found = split_fingerprint(self.folder / self.split, self.tokenizer.hash, pairs=self.manifest["pairs"])
        if found != self.fingerprint:
            raise self._changed(f"fingerprint {found}, the manifest says {self.fingerprint}")

    def _changed(self, found: str) -> InputError:
        return InputError(
            f"{self.folder / self.split}: index.json, rows.npy or pairs.npy is not the one the manifest describes",
            found=found,
            change="copy the folder again or prepare the corpus again",
        )

    def __getstate__(self) -> dict:
        # The maps of files would be copied whole.
        return {name: value for name, value in self.__dict__.items() if name not in ("_rows", "pair_starts")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open_tables()


def _fill(out: np.ndarray, tokens: np.ndarray, ends: np.ndarray, start: int, eos_id: int) -> None:
    """Positions [start, start + len(out)) of one block's stream: its tokens with an EOS at each document end."""
    positions = ends + (
        COUNT[: len(ends)] if len(ends) <= len(COUNT) else np.arange(len(ends))
    )  # of EOS, in the stream
    before = int(positions.searchsorted(start))
    begin, filled = start - before, 0
    following = ends[before : before + MANY_ENDS].tolist()
    if len(following) == MANY_ENDS and following[-1] - begin + MANY_ENDS <= len(out):
        until = int(positions.searchsorted(start + len(out)))
        is_text = np.ones(len(out), bool)
        is_text[positions[before:until] - start] = False
        out[is_text] = tokens[begin : start + len(out) - until]
        out[~is_text] = eos_id
        return
    for end in following:
        length = end - begin
        if filled + length >= len(out):
            break
        out[filled : filled + length] = tokens[begin:end]
        out[filled + length] = eos_id
        filled += length + 1
        begin = end
    out[filled:] = tokens[begin : begin + len(out) - filled]


def _read_manifest(folder: Path) -> dict:
    path = folder / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_bytes())
        for key in ("tokenizer_hash", "dtype", "vocab_size"):
            manifest[key]
        for split in manifest["splits"].values():
            for key in ("documents", "tokens", "bytes", "rows", "fingerprint"):
                split[key]
        manifest["pairs"] = bool(manifest.get("pairs", False))  # corpora prepared before there were pairs do not say,
        manifest.setdefault("format", "mds")  # nor those prepared before there were other formats
        if manifest["format"] not in FORMATS:
            raise ValueError(f"format {manifest['format']}")
        version = manifest["version"]
    except OSError as error:
        raise InputError(
            f"{folder} is not a prepared corpus",
            found=f"{path}: {error.strerror}",
            change="give a folder that `braid prepare` has finished writing",
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is damaged",
            found=f"{type(error).__name__}: {error}",
            change="copy it again or prepare the corpus again",
        ) from error
    if version != MANIFEST_VERSION:
        raise InputError(
            f"{path} was written by another version of Braid",
            change="prepare the corpus again",
            found=f"version {version}, this one reads {MANIFEST_VERSION}",
        )
    return manifest
