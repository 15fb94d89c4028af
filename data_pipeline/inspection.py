"""What a prepared corpus holds and whether it is whole: lengths of documents, damaged shards, rows as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, pairwise

import numpy as np

from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.tokenizers import ROLES, Tokenizer

MOST_SHARDS = 64
"""So many shards are read for the lengths of documents; of a larger split, as many evenly spread ones."""


def readable_shards(corpus: TokenCorpus, most: int = MOST_SHARDS) -> list[int]:
    """At most `most` of the split's shards, evenly spread and in order, without those that are damaged."""
    number = len(corpus.shard_names)
    chosen = np.unique(np.linspace(0, number - 1, min(most, number)).round().astype(int)).tolist()
    return [shard for shard in chosen if corpus.damage(shard) is None]


def document_lengths(corpus: TokenCorpus, shards: Iterable[int]) -> np.ndarray:
    """Tokens, without EOS, of the documents that end in some of the shards, in order: int64 [documents].

    shards: increasing. A document that begins in a shard which is not among them is left out: its length is not known.
    """
    lengths = [np.empty(0, np.int64)]
    begin: int | None = 0  # of the document that goes on into the shard
    for before, shard in pairwise([-1, *shards]):
        ends = corpus.document_ends(shard)
        if shard != before + 1:
            begin = None
        if begin is None and len(ends):
            begin, ends = int(ends[0]), ends[1:]
        if len(ends):
            lengths.append(np.diff(ends, prepend=begin))
            begin = int(ends[-1])
    return np.concatenate(lengths)


def damaged_shards(corpus: TokenCorpus, workers: int = 1) -> Iterator[tuple[str, str | None]]:
    """Name of every shard of the split, in order, and why it cannot be read: None for one that is whole. Size and hash
    of each are compared with the index, by `workers` threads."""
    with ThreadPoolExecutor(workers) as pool:
        yield from zip(corpus.shard_names, pool.map(corpus.damage, range(len(corpus.shard_names))), strict=True)


def spelt(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """Text of ids [n] with the special ones by their names: `<bos>`, `<eos>`, and `<eos> x 7` for several in a row."""
    roles: dict[int, list[str]] = {}
    for role in ROLES:
        roles.setdefault(getattr(tokenizer, f"{role}_id"), []).append(role)
    parts = []
    for special, run in groupby(np.asarray(ids).tolist(), key=lambda i: i if i in roles else None):
        if special is None:
            parts.append(tokenizer.decode(run))
        else:
            number = len(list(run))
            parts.append(f"<{'/'.join(roles[special])}>" + (f" x {number} " if number > 1 else ""))
    return "".join(parts)
