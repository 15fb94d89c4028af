"""A table of token representations built from the training corpus alone: PPMI of co-occurrence, truncated SVD.

The continuous strand for people without a pretrained encoder. Positive pointwise mutual information with smoothed
contexts, factorised as U sqrt(S): Levy, Goldberg and Dagan, "Improving distributional similarity with lessons learned
from word embeddings", TACL 2015. Built once per corpus and settings on the CPU, kept beside the data. No torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4
from zipfile import BadZipFile

import numpy as np
import xxhash
from scipy import sparse
from scipy.sparse.linalg import svds

from braid.data_pipeline.corpus import TokenCorpus
from braid.kernels.errors import ConfigError, InputError

FORMAT_VERSION = 1
MAX_TOKENS = 8_000_000
CHUNK_TOKENS = 1 << 20
CONTEXT_SMOOTHING = 0.75


@dataclass(frozen=True)
class TableSettings:
    """Everything the table is a function of."""

    latent_dim: int
    window: int
    vocab_size: int
    corpus_fingerprint: str
    max_tokens: int = MAX_TOKENS
    version: int = FORMAT_VERSION

    def as_json(self) -> str:
        """The settings as one line with sorted keys."""
        return json.dumps(vars(self), sort_keys=True)

    def file_name(self) -> str:
        """`encoder_table_<hash>.npz`."""
        return f"encoder_table_{xxhash.xxh3_64_hexdigest(self.as_json().encode())}.npz"


def cooccurrence(chunks: Iterable[np.ndarray], *, vocab_size: int, window: int, eos_id: int) -> sparse.csr_matrix:
    """Symmetric counts [V, V] of tokens at most `window` apart in the same document; `chunks` are consecutive pieces
    of one stream in which `eos_id` ends a document. How the stream is cut into pieces does not matter."""
    counts = sparse.csr_matrix((vocab_size, vocab_size), dtype=np.float64)
    tail = np.empty(0, dtype=np.int64)
    for chunk in chunks:
        tokens = np.concatenate([tail, chunk])
        document = np.cumsum(tokens == eos_id) - (tokens == eos_id)
        rows, columns = [], []
        for distance in range(1, window + 1):
            # Pairs whose later token is in this chunk: the others were counted with the chunk before.
            first = max(len(tail) - distance, 0)
            left, right = slice(first, max(len(tokens) - distance, first)), slice(first + distance, None)
            same = document[left] == document[right]
            rows.append(tokens[left][same])
            columns.append(tokens[right][same])
        pairs = np.concatenate(rows), np.concatenate(columns)
        counts += sparse.coo_matrix((np.ones(len(pairs[0])), pairs), shape=counts.shape).tocsr()
        tail = tokens[-window:]
    return (counts + counts.T).tocsr()


def positive_pmi(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """max(0, log p(i, j) / (p(i) p_s(j))) where p_s is the token frequency to the power CONTEXT_SMOOTHING, normalised:
    without it rare pairs get the largest values."""
    ppmi = counts.tocoo()
    frequency = np.asarray(counts.sum(axis=1)).ravel()
    context = frequency**CONTEXT_SMOOTHING
    ratio = ppmi.data / frequency[ppmi.row] * (context.sum() / context[ppmi.col])
    ppmi.data = np.maximum(np.log(ratio), 0)
    ppmi = ppmi.tocsr()
    ppmi.eliminate_zeros()
    return ppmi


def factorise(matrix: sparse.csr_matrix, latent_dim: int) -> np.ndarray:
    """U sqrt(S) [V, latent_dim] of the truncated SVD, by falling singular value; deterministic: ARPACK starts from a
    fixed vector, and the entry of largest magnitude in each column is made positive."""
    start = np.ones(min(matrix.shape)) / np.sqrt(min(matrix.shape))
    left, singular, _ = svds(matrix, k=latent_dim, v0=start, solver="arpack")
    order = np.argsort(-singular)
    left, singular = left[:, order], singular[order]
    singular[singular < 1e-10 * singular[0]] = 0  # directions the counts do not determine
    left *= np.sign(left[np.abs(left).argmax(axis=0), np.arange(latent_dim)])
    table = (left * np.sqrt(singular)).astype(np.float32)
    length = np.linalg.norm(table, axis=1)
    table[length < 1e-6 * length.max()] = 0  # rounding noise of rows that are zero, or orthogonal to what was kept
    return table


def build_table(chunks: Iterable[np.ndarray], settings: TableSettings, eos_id: int) -> np.ndarray:
    """The table [V, latent_dim], float32, not yet standardised; rows of tokens it knows nothing about are zero."""
    if settings.latent_dim >= settings.vocab_size:
        raise ConfigError(
            "The table encoder cannot have as many dimensions as there are tokens",
            found=f"encoder.latent_dim={settings.latent_dim}, vocabulary {settings.vocab_size}",
            change="objective.encoder.latent_dim",
        )
    counts = cooccurrence(chunks, vocab_size=settings.vocab_size, window=settings.window, eos_id=eos_id)
    if counts.nnz == 0:
        raise InputError("The training corpus has no two tokens in one document", change="prepare a larger corpus")
    return factorise(positive_pmi(counts), settings.latent_dim)


def stream_chunks(corpus: TokenCorpus, max_tokens: int = MAX_TOKENS) -> Iterator[np.ndarray]:
    """The first `max_tokens` tokens of the corpus's stream, in pieces."""
    end = min(corpus.num_stream_tokens, max_tokens)
    for start in range(0, end, CHUNK_TOKENS):
        yield np.asarray(corpus.read(start, min(start + CHUNK_TOKENS, end)), dtype=np.int64)


def load_or_build_table(corpus_folder: Path, *, latent_dim: int, window: int, vocab_size: int, path: str) -> np.ndarray:
    """The table of the training split below `corpus_folder`, from its file or built and written there.

    The file is `path`, or `encoder_table_<hash of the settings>.npz` in the folder `path` (`corpus_folder` when it is
    empty), where it is built if it is missing. A `path` that does not exist is an InputError, and so is a file made
    with other settings or from another corpus. Several processes may build it at once: each builds the same table and
    the file is replaced in one piece.
    """
    corpus = TokenCorpus.open(corpus_folder, "train")
    settings = TableSettings(latent_dim, window, vocab_size, corpus.fingerprint)
    file = Path(path) if path else corpus_folder
    if not file.exists():
        change = "correct objective.encoder.path, or make the folder that tables are to be kept in"
        raise InputError("There is no encoder table", found=f"no {file}", change=change)
    file = file / settings.file_name() if file.is_dir() else file
    if not file.exists():
        _write(file, build_table(stream_chunks(corpus), settings, corpus.tokenizer.eos_id), settings)
    return _read(file, settings)


def _write(file: Path, table: np.ndarray, settings: TableSettings) -> None:
    """Write under a name of this process's own, then rename: no reader and no other builder sees half a file."""
    temporary = file.with_name(f".{file.name}.{uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as out:
            np.savez(out, table=table, settings=settings.as_json())
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise InputError(
            "The encoder table cannot be written",
            found=f"{file}: {error.strerror}",
            change="make the folder writable, or set objective.encoder.path to a folder elsewhere",
        ) from error


def _read(file: Path, settings: TableSettings) -> np.ndarray:
    try:
        with np.load(file, allow_pickle=False) as content:
            table, found = content["table"], str(content["settings"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        change = "delete it to build it anew"
        raise InputError("This is no encoder table", found=f"{file}: {error}", change=change) from error
    if found != settings.as_json():
        raise InputError(
            "The encoder table belongs to another corpus or other settings",
            found=f"{file} has {found}; this run needs {settings.as_json()}",
            change="objective.encoder.path (empty builds the right one)",
        )
    return table
