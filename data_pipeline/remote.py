"""Objects of a store (s3://, gs://, hf://, http://, https://, file://), copied into files: with retries, checked, and
within a time limit.

fsspec knows the stores. Each attempt runs in a thread of its own, which is left to itself when it falls silent: no
library's way of waiting can make a caller of this one hang.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import xxhash

from braid.data_pipeline.inputs import BACKENDS
from braid.kernels.capabilities import require
from braid.kernels.errors import ConfigError, InputError, StoreFailed

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 30.0
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (401, 403)
"""HTTP's answers to a client that may not, which asking again does not change."""


@dataclass(frozen=True)
class Fetching:
    """How files come from a store.

    cache: the folder they are kept in; empty is `default_cache()`. cache_gb: gigabytes (10^9 bytes) of shards kept
    there; 0 keeps all. retries: attempts after the first. timeout_s: seconds for one file, all attempts together; an
    attempt is given up when nothing has come for its share of them, timeout_s / (retries + 1).
    """

    cache: str = ""
    cache_gb: float = 100.0
    retries: int = 5
    timeout_s: float = 300.0

    @property
    def folder(self) -> Path:
        return Path(self.cache) if self.cache else default_cache()

    @property
    def limit_bytes(self) -> int:
        return int(self.cache_gb * 1e9)


def default_cache() -> Path:
    """$XDG_CACHE_HOME/braid/corpora, else ~/.cache/braid/corpora."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "braid" / "corpora"


def is_url(path: str | Path) -> bool:
    return "://" in str(path)


class Store:
    """What lies below a URL. Fetching is safe from several threads and after a fork; a store can be pickled.

    Raises ConfigError for a kind of URL that is not known, BraidError naming a package that is needed and missing.
    """

    def __init__(self, url: str, fetching: Fetching) -> None:
        self.url, self.fetching = url.rstrip("/"), fetching
        kind = url.partition("://")[0]
        if kind in BACKENDS:
            require(BACKENDS[kind])
        elif kind != "file":
            known = ", ".join(f"{known}://" for known in (*BACKENDS, "file"))
            raise ConfigError("this kind of URL is not known", found=url, change=f"use one of {known}")
        self._opened: tuple[int, Any] | None = None

    def fetch(self, name: str, into: Path, problem_of: Callable[[Path], str | None]) -> Path:
        """Copy the object `name` into a new temporary file beside `into`, which the caller renames.

        problem_of: says what is wrong with the copy, if anything is. What is wrong twice in the same way is so in the
        store.

        Raises InputError when the object is missing, damaged or refused, StoreFailed when it did not come in time or
        there is no space for it.
        """
        begun, retries = time.monotonic(), self.fetching.retries
        give_up, failure, problems = begun + self.fetching.timeout_s, "", set()
        attempt = 0
        while attempt <= retries and (attempt == 0 or time.monotonic() < give_up):
            if attempt:
                self._pause(attempt, give_up)
            attempt += 1
            temporary = into.with_name(f"{into.name}.{uuid4().hex}.tmp")
            try:
                self._attempt(name, temporary, give_up)
                failure = problem_of(temporary)
            except Exception as error:  # each library has exceptions of its own for a network that fails
                temporary.unlink(missing_ok=True)
                self._opened = None  # the next attempt makes a connection of its own
                self._raise_if_final(name, into, error)
                failure = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
                continue
            if failure is None:
                return temporary
            temporary.unlink()
            if failure in problems:
                raise self._damaged(name, f"{failure} (it was fetched twice)")
            problems.add(failure)
        settings = f"data.retries={retries}, data.timeout_s={self.fetching.timeout_s:g}"
        raise StoreFailed(
            f"{name} could not be fetched from {self.url}",
            found=f"attempts: {attempt}, in {time.monotonic() - begun:.1f} s ({settings}); the last: {failure}",
            change="see whether the store can be reached from here and answers; a slow one needs a larger "
            "data.timeout_s, one that fails often more data.retries",
        )

    def _attempt(self, name: str, temporary: Path, give_up: float) -> None:
        """Copy once. Raises what the library raised, or TimeoutError."""
        copy = _Copy(self._filesystem, name, temporary)
        copy.start()
        patience = self.fetching.timeout_s / (self.fetching.retries + 1)
        heard, num_bytes = time.monotonic(), 0
        while not copy.done.wait(min(0.2, patience / 4)):
            now, before, num_bytes = time.monotonic(), num_bytes, copy.num_bytes
            heard = now if num_bytes != before else heard
            if now > give_up or now - heard > patience:
                copy.leave()
                raise TimeoutError(f"{num_bytes} bytes had come, the last {now - heard:.1f} s ago")
        if copy.error is not None:
            raise copy.error

    def _filesystem(self) -> tuple[Any, str]:
        """fsspec's file system and the path in it: of this process, for none survives a fork."""
        opened = self._opened
        if opened is None or opened[0] != os.getpid():
            from fsspec.core import url_to_fs  # only where there is a URL: it takes a while

            options: dict[str, Any] = {"skip_instance_cache": True}
            if self.url.startswith("http"):  # aiohttp's own limit of five minutes would cut off a large shard
                options["client_kwargs"] = {"timeout": require("aiohttp").ClientTimeout(total=None)}
            opened = self._opened = os.getpid(), url_to_fs(self.url, **options)
        return opened[1]

    def _pause(self, attempt: int, give_up: float) -> None:
        """Twice as long each time, and a random part of it: those who failed together should not return together."""
        longest = min(FIRST_PAUSE_S * 2 ** (attempt - 1), LONGEST_PAUSE_S, max(give_up - time.monotonic(), 0))
        time.sleep(longest * random.uniform(0.5, 1))

    def _raise_if_final(self, name: str, into: Path, error: Exception) -> None:
        """Turn an error that another attempt would meet again into one the user can act on."""
        if isinstance(error, FileNotFoundError):
            raise self._damaged(name, "the store has no such object") from error
        if getattr(error, "errno", None) in NO_SPACE:
            raise StoreFailed(
                f"there is no space for {name}",
                found=f"{into.parent}: {error.strerror}",
                change="free some, lower data.cache_gb, or let data.cache name a folder on a larger disk",
            ) from error
        without_credentials = type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError")
        if isinstance(error, PermissionError) or without_credentials or getattr(error, "status", None) in REFUSED:
            raise InputError(
                f"{self.url} may not be read",
                found=f"{name}: {type(error).__name__}: {error}"[:300],
                change="give this machine credentials for the store, or its user the right to read there",
            ) from error

    def _damaged(self, name: str, found: str) -> InputError:
        return InputError(
            f"{self.url}/{name} is missing or damaged",
            found=found,
            change="copy it into the store again from its source, prepare the corpus again, or leave the rows of "
            "damaged shards out (data.damaged=skip)",
        )

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": None}


class _Copy(threading.Thread):
    """One attempt. When it was left alone and comes to an end after all, it removes what it wrote."""

    def __init__(self, filesystem: Callable[[], tuple[Any, str]], name: str, file: Path) -> None:
        super().__init__(name=f"fetching {name}", daemon=True)
        self._filesystem, self._object, self._file = filesystem, name, file
        self._ending, self._left = threading.Lock(), False
        self.done, self.error = threading.Event(), None
        self._counted: Any = None

    @property
    def num_bytes(self) -> int:
        """What has come: not every library counts, and none writes each byte at once."""
        written = self._file.stat().st_size if self._file.exists() else 0
        return max(written, self._counted.value if self._counted else 0)

    def run(self) -> None:
        try:
            from fsspec.callbacks import Callback

            filesystem, root = self._filesystem()
            self._counted = Callback()
            filesystem.get_file(f"{root}/{self._object}", str(self._file), callback=self._counted)
        except Exception as error:  # raised again where the attempt is awaited
            self.error = error
        with self._ending:
            self.done.set()
            if self._left:
                self._file.unlink(missing_ok=True)

    def leave(self) -> None:
        with self._ending:
            self._left = True


def content_problem(file: Path, num_bytes: int, expected_hash: str) -> str | None:
    """How a file differs from what an index says of it: bytes and xxh3_64."""
    found = file.stat().st_size
    if found != num_bytes:
        return f"it has {found} bytes, index.json says {num_bytes}"
    digest = xxhash.xxh3_64()
    with open(file, "rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != expected_hash:
        return f"its xxh3_64 hash is {digest.hexdigest()}, index.json says {expected_hash}"
    return None
