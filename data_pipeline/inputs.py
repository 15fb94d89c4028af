"""Which files an input stands for: a file, a folder or a pattern, by path or by URL.

Files of a URL (s3://, gs://, hf://, http(s)://, whatever fsspec knows) are listed, named and hashed as local ones are,
so the same files give the same corpus wherever they lie.
"""

from __future__ import annotations

import glob
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, BinaryIO

import xxhash

from braid.kernels.capabilities import require
from braid.kernels.errors import BraidError, InputError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

REMOTE_BLOCK = 8 << 20
"""Bytes asked of a store at a time."""
HASHING_THREADS = 8
BACKENDS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
BACKENDS |= {"http": "aiohttp", "https": "aiohttp"}
"""The capability that reads the URLs of a scheme; fsspec itself reads some more."""


@dataclass(frozen=True)
class InputFile:
    """One file. `location`: its absolute path or its URL, which is what it is called in messages."""

    location: str
    filesystem: AbstractFileSystem | None = None  # of a URL
    path: str = ""  # in the file system

    def __str__(self) -> str:
        return self.location

    @property
    def name(self) -> str:
        """Its name, without the query that some web addresses end with."""
        location = self.location
        if location.startswith(("http://", "https://")):
            location = location.partition("?")[0]
        return location.rpartition("/")[2]

    @cached_property
    def size(self) -> int:
        """Bytes of the file. Raises InputError where there are none or nobody says how many."""
        if self.filesystem is None:
            return file_size(Path(self.location))
        with _store_errors(self.location):
            size = self.filesystem.info(self.path)["size"]
        if size is None:
            change = "download it and give the path of the copy"
            raise InputError(f"{self.location}: the server does not say how large it is", change=change)
        return _not_empty(self.location, size)

    def open(self) -> BinaryIO:
        """The file from its begin. Raises OSError or, for a URL, InputError."""
        return open(self.location, "rb") if self.filesystem is None else _RemoteFile(self)

    def hash(self) -> str:
        """xxh3_64 of the content. Raises InputError where it cannot be read."""
        digest = xxhash.xxh3_64()
        try:
            with self.open() as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        except OSError as error:
            raise unreadable(self.location, error) from error
        return digest.hexdigest()


class _RemoteFile(io.RawIOBase):
    """A file of a store for those who read: whatever the store's library raises becomes an InputError."""

    def __init__(self, source: InputFile) -> None:
        self._location, self._num_read = source.location, 0
        with _store_errors(self._location):
            self._file = source.filesystem.open(source.path, "rb", block_size=REMOTE_BLOCK)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def read(self, size: int = -1) -> bytes:
        with _store_errors(self._location):
            data = self._file.read(size)
        self._num_read += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        with _store_errors(self._location):
            self._num_read = self._file.seek(offset, whence)
        return self._num_read

    def tell(self) -> int:
        return self._num_read  # what cannot seek may not know either

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def find_files(
    inputs: Sequence[str | Path], is_readable: Callable[[InputFile, bool], bool], endings: str
) -> tuple[list[InputFile], int]:
    """The files of `inputs`, each once, in the order given, folders in sorted order; and the number of files in folders
    that are of other kinds than those that are read.

    `is_readable` is asked with a file and whether it was met in a folder; `endings` says what can be read.
    Raises InputError for an input that does not exist, and a kind of file that cannot be read.
    """
    if not inputs:
        raise InputError("there is no input", change="give files, folders or patterns: --input FILE|DIR|'*.jsonl' ...")
    found: dict[str, InputFile] = {}
    num_ignored = 0
    for given in map(str, inputs):
        for match, inside in _remote(given) if "://" in given else _local(given):
            if inside is None:
                if not is_readable(match, False):
                    ending = os.path.splitext(match.name)[1]
                    kind = f"the ending `{ending}`" if ending else "no ending"
                    change = f"rename or convert it to one of {endings}"
                    raise InputError(f"{match} is of a kind that is not read", found=kind, change=change)
                found[match.location] = match
                continue
            readable = [file for file in inside if is_readable(file, True)]
            if not readable:
                raise _nothing_readable(match, inside, endings)
            num_ignored += len(inside) - len(readable)
            found.update((file.location, file) for file in readable)
    return list(found.values()), num_ignored


def find_both(
    inputs: Sequence[str | Path],
    validation: Sequence[str | Path],
    is_readable: Callable[[InputFile, bool], bool],
    endings: str,
) -> tuple[list[InputFile], int, int | None]:
    """`find_files` of inputs and of those for validation, which follow; and the number of the first of these, None
    where there are none. Raises InputError for a file that is both."""
    files, num_ignored = find_files(inputs, is_readable, endings)
    if not validation:
        return files, num_ignored, None
    more, more_ignored = find_files(validation, is_readable, endings)
    if twice := sorted({file.location for file in files} & {file.location for file in more}):
        raise both(twice)
    return [*files, *more], num_ignored + more_ignored, len(files)


def both(twice: Sequence[str]) -> InputError:
    """The error of files that are given for training and for validation."""
    found = f"{twice[0]}{f' and {len(twice) - 1} more' if len(twice) > 1 else ''}"
    change = "take it out of one of the two"
    return InputError("a file is given for training and for validation", found=found, change=change)


def names(files: Sequence[InputFile]) -> list[str]:
    """The files' locations relative to the folder they share."""
    parts = [file.location.split("/") for file in files]
    shared = len(os.path.commonprefix([folder[:-1] for folder in parts]))
    return ["/".join(folder[shared:]) for folder in parts]


def describe(files: Sequence[InputFile]) -> list[dict]:
    """Name, size and xxh3_64 of every file: what a prepared corpus was made from."""
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        hashes = threads.map(InputFile.hash, files)
        return [
            {"name": name, "bytes": file.size, "xxh3": digest}
            for name, file, digest in zip(names(files), files, hashes, strict=True)
        ]


def required(capability: str, location: str) -> ModuleType:
    """The package that reads `location`. Raises InputError saying how to install it."""
    try:
        return require(capability)
    except BraidError as error:
        what = f"{location} cannot be read: {error.what}"
        raise InputError(what, found=error.found, change=error.change) from error


def unreadable(location: str | Path, error: OSError) -> InputError:
    """The error of a file that the system does not let read."""
    found = error.strerror or str(error)
    return InputError(f"{location} cannot be read", found=found, change="check the file and its permissions")


def _in_order(path: str) -> tuple[tuple[bool, str], ...]:
    """Sorts the files of a folder before those in its sub-folders."""
    *folders, name = path.split("/")
    return (*((True, folder) for folder in folders), (False, name))


def _nothing_readable(folder: InputFile, files: list[InputFile], endings: str) -> InputError:
    kinds = sorted({os.path.splitext(file.name)[1] or file.name for file in files})
    return InputError(
        f"the folder {folder} holds nothing readable",
        found=f"{len(files)} files" + (f" ({', '.join(kinds[:8])})" if files else ""),
        change=f"it should hold files that end with one of {endings}",
    )


def _missing(given: str, pattern: bool, found: str) -> InputError:
    what = "matches no file" if pattern else "does not exist"
    return InputError(f"the input {given} {what}", found=found, change="check the path")


# Both give (what matches, the files in it where it is a folder), hidden ones left out.


def _local(given: str) -> Iterator[tuple[InputFile, list[InputFile] | None]]:
    pattern = not os.path.exists(given) and glob.has_magic(given)
    matches = sorted(glob.glob(given, recursive=True)) if pattern else [given]
    if not matches or not os.path.exists(matches[0]):
        raise _missing(given, pattern, f"looked from {os.getcwd()}")
    for match in map(os.path.abspath, matches):
        if not os.path.isdir(match):
            yield InputFile(match), None
            continue
        paths = []
        for parent, folders, inside in os.walk(match):
            folders[:] = [name for name in folders if not name.startswith(".")]
            paths += [os.path.join(parent, name) for name in inside if not name.startswith(".")]
        yield InputFile(match), [InputFile(path) for path in sorted(paths, key=_in_order)]


def _remote(url: str) -> Iterator[tuple[InputFile, list[InputFile] | None]]:
    def file(path: str) -> InputFile:
        return InputFile(filesystem.unstrip_protocol(path), filesystem, path)

    with _store_errors(url):
        filesystem, path = _filesystem(url)
        try:
            entries = {path: filesystem.info(path)}
        except FileNotFoundError as error:
            pattern = glob.has_magic(path)
            fixed = path[: re.search(r"[*?[]|$", path).start()]
            found = filesystem.glob(path, detail=True) if pattern else {}
            entries = {match: entry for match, entry in found.items() if not _is_hidden(match, len(fixed))}
            if not entries:
                raise _missing(url, pattern, str(error.__cause__ or error)) from error
    for match, entry in sorted(entries.items()):
        if entry["type"] != "directory":
            yield file(match), None
            continue
        with _store_errors(url):
            below = filesystem.find(match)
        shown = [inside for inside in below if not _is_hidden(inside, len(match))]
        yield file(match), [file(inside) for inside in sorted(shown, key=_in_order)]


def _is_hidden(path: str, start: int) -> bool:
    """Does a name in the path begin with a dot, from `start` on?"""
    return "/." in path[max(start - 1, 0) :]


def _filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """What reads the URL, and its path in there."""
    import fsspec  # only where there is a URL: it takes a while

    scheme = url.partition("://")[0]
    if scheme in BACKENDS:
        required(BACKENDS[scheme], url)
    elif scheme not in fsspec.available_protocols():
        change = f"use one of {', '.join(BACKENDS)}, or a local path"
        raise InputError(f"{url}: URLs of this kind are not read", found=f"{scheme}://", change=change)
    return fsspec.core.url_to_fs(url)


@contextmanager
def _store_errors(location: str) -> Iterator[None]:
    """Say what a store's library raises. Each has exceptions of its own, without a class that they share."""
    try:
        yield
    except BraidError:
        raise
    except Exception as error:
        raise InputError(
            f"{location} cannot be read",
            found=" ".join(f"{type(error).__name__}: {error}".split())[:300],
            change="check the address, the credentials and the network; the same command then goes on where it stopped",
        ) from error


def file_hash(path: Path) -> str:
    """xxh3_64 of a local file. Raises InputError where it cannot be read."""
    return InputFile(str(path)).hash()


def file_size(path: Path) -> int:
    """Bytes of a local file. Raises InputError where there are none."""
    try:
        return _not_empty(path, path.stat().st_size)
    except OSError as error:
        raise unreadable(path, error) from error


def _not_empty(location: str | Path, size: int) -> int:
    if size == 0:
        raise InputError(f"{location} is empty", change="remove it from the inputs or fill it")
    return size
