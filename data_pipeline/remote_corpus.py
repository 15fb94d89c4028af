"""A corpus in a store, as a folder of the cache: its small files are there when it is opened, its shards when they are
read (`cache`).

    CACHE/KEY/    manifest.json, tokenizer/, train/, ... as in the store; KEY is the hash of manifest.json
              origin.json    the URL and how files are fetched from it

The manifest is fetched at every opening, so that a corpus which was prepared anew is another one. All other small files
are checked against it.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import xxhash

from braid.data_pipeline import corpus
from braid.data_pipeline.cache import locked, remove_copies, remove_half_files
from braid.data_pipeline.formats import TABLE_FILES, shard_reader
from braid.data_pipeline.remote import Fetching, Store
from braid.data_pipeline.shards import INDEX_FILE, atomic_file
from braid.data_pipeline.tokenizers import OWN_FILE, load_tokenizer
from braid.kernels.errors import InputError, StoreFailed


def cached_corpus(url: str, split: str, fetching: Fetching) -> tuple[Path, Store]:
    """The folder in the cache of the corpus at `url`, with all that is needed to read `split` but its shards; and the
    store they come from.

    Raises InputError when there is no corpus, or one whose files do not belong together; StoreFailed when the store or
    the cache cannot be used."""
    store = Store(url, fetching)
    try:
        for _ in range(2):  # something may have changed on the way, the manifest too
            content = _manifest(store)
            folder = fetching.folder / xxhash.xxh3_64_hexdigest(content)
            problem = _fill(folder, split, content, store)
            if problem is None:
                return folder, store
    except BlockingIOError as error:
        raise StoreFailed(
            f"{url} could not be opened: another process is fetching its files",
            found=f"a lock in {folder} is held for more than data.timeout_s={fetching.timeout_s:g}",
            change="see what that process waits for, or raise data.timeout_s",
        ) from error
    except OSError as error:
        raise StoreFailed(
            f"the cache of {url} cannot be used",
            found=f"{fetching.folder}: {error}",
            change="let data.cache name a folder on a local disk that this user may write to and that has space",
        ) from error
    raise InputError(
        f"{url} does not hold the corpus that its manifest describes",
        found=problem,
        change="copy the whole corpus into the store again, or prepare it again",
    )


def origin(folder: Path) -> Store:
    """The store that a folder of the cache is filled from, as whoever opened it last by its URL has said."""
    described = json.loads((folder / corpus.ORIGIN_FILE).read_bytes())
    return Store(described.pop("url"), Fetching(**described))


def _manifest(store: Store) -> bytes:
    def problem_of(file: Path) -> str | None:
        try:
            return None if isinstance(json.loads(file.read_bytes()), dict) else "no JSON object"
        except ValueError as error:
            return f"no JSON: {error}"

    store.fetching.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as elsewhere:  # under which name it is kept follows from its content
        return store.fetch(corpus.MANIFEST_FILE, Path(elsewhere) / corpus.MANIFEST_FILE, problem_of).read_bytes()


def _fill(folder: Path, split: str, content: bytes, store: Store) -> str | None:
    """Fetch the small files that are missing or damaged. Says what is wrong with them then, if anything is."""
    manifest = json.loads(content)
    (folder / split).mkdir(parents=True, exist_ok=True)
    remove_half_files(folder / split)
    with locked(folder / ".lock", store.fetching.timeout_s):
        if _problem(folder, split, manifest):
            for name in _small_files(manifest, split):
                _fetch(store, name, folder / name)
        if problem := _problem(folder, split, manifest):
            return problem
        _write(folder / corpus.MANIFEST_FILE, content)
        _write(folder / corpus.ORIGIN_FILE, json.dumps({"url": store.url, **asdict(store.fetching)}).encode())
    return None


def _small_files(manifest: dict, split: str) -> list[str]:
    files = [f"{corpus.TOKENIZER_FOLDER}/{name}" for name in ("tokenizer.json", OWN_FILE)]
    if split not in manifest.get("splits", {}):  # whoever opens the folder says so
        return files
    of_split = [INDEX_FILE, corpus.ROWS_FILE]
    of_split += [corpus.PAIRS_FILE] if manifest.get("pairs") else []
    of_split += TABLE_FILES.get(manifest.get("format", "mds"), [])
    return files + [f"{split}/{name}" for name in of_split]


def _fetch(store: Store, name: str, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    remove_copies(path)
    os.replace(store.fetch(name, path, lambda _: None), path)


def _problem(folder: Path, split: str, manifest: dict) -> str | None:
    """What keeps the small files of the folder from being those of the manifest."""
    try:
        tokenizer_hash = load_tokenizer(folder / corpus.TOKENIZER_FOLDER).hash
        if tokenizer_hash != manifest.get("tokenizer_hash"):
            return f"its tokenizer has the hash {tokenizer_hash}, the manifest says {manifest.get('tokenizer_hash')}"
        described = manifest.get("splits", {}).get(split)
        if described is None:
            return None
        found = corpus.split_fingerprint(folder / split, tokenizer_hash, pairs=bool(manifest.get("pairs")))
        if found != described["fingerprint"]:
            return f"{split} has the fingerprint {found}, the manifest says {described['fingerprint']}"
        return shard_reader(manifest.get("format", "mds"), folder / split).table_problem()
    except InputError as error:
        return f"{error.what}: {error.found}"
    except OSError as error:
        return str(error)


def _write(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:
        with atomic_file(path) as file:
            file.write(content)
