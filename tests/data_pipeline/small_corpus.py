"""Small prepared corpora for tests, written with the shard writer alone, and the naive stream they stand for."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import numpy as np

from braid.data_pipeline.corpus import split_fingerprint, write_rows_file
from braid.data_pipeline.formats import shard_writer, write_index
from braid.data_pipeline.tokenizers import Tokenizer, load_tokenizer

LETTERS = list("abcdefghij klmno\nüßé→語🙂")


def texts(num: int, mean_characters: int, seed: int = 0) -> list[str]:
    """Documents of random length, at least one character each, with characters of one to four bytes."""
    rng = np.random.default_rng(seed)
    lengths = 1 + rng.poisson(rng.exponential(mean_characters, num))
    return ["".join(rng.choice(LETTERS, length)) for length in lengths]


def build(
    folder: Path,
    documents: list[str],
    *,
    block: int = 64,
    shard_bytes: int = 1 << 12,
    split: str = "train",
    tokenizer: Tokenizer | None = None,
    format: str = "mds",
) -> list[list[int]]:
    """Write `documents` as a split of the corpus `folder`; returns the token ids of each."""
    tokenizer = tokenizer or load_tokenizer("bytes")
    tokenizer.save(folder / "tokenizer")
    ids = [document.tolist() for document in tokenizer.encode_batch(documents)]
    stream, ends = np.array(list(chain(*ids)), tokenizer.dtype), np.cumsum([len(document) for document in ids])
    sizes = []
    with shard_writer(format, folder / split, tokenizer.dtype, shard_bytes=shard_bytes) as writer:
        for start in range(0, len(stream), block):
            tokens = stream[start : start + block]
            inside = ends[(ends > start) & (ends <= start + len(tokens))] - start
            writer.write({"tokens": tokens, "ends": inside.astype(np.int32)})
            sizes.append((len(tokens), len(inside)))
    write_index(format, folder / split, tokenizer.dtype, writer.finished_shards)
    write_rows_file(folder / split, np.array(sizes, np.int64))
    manifest_file = folder / "manifest.json"
    splits = json.loads(manifest_file.read_text())["splits"] if manifest_file.exists() else {}
    splits[split] = {
        "documents": len(ids),
        "tokens": len(stream),
        "bytes": len("".join(documents).encode()),
        "rows": len(sizes),
        "fingerprint": split_fingerprint(folder / split, tokenizer.hash),
    }
    manifest = {
        "version": 1,
        "tokenizer_hash": tokenizer.hash,
        "dtype": tokenizer.dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "format": format,
        "splits": splits,
    }
    manifest_file.write_text(json.dumps(manifest))
    return ids


def naive_stream(ids: list[list[int]], eos_id: int) -> list[int]:
    """document EOS document EOS ..."""
    return list(chain(*([*document, eos_id] for document in ids)))


def damage(shard: Path, how: str) -> None:
    """how: "truncated", "flipped" (one bit, the size stays) or "missing"."""
    content = shard.read_bytes()
    if how == "missing":
        shard.unlink()
    elif how == "truncated":
        shard.write_bytes(content[:-5])
    else:
        middle = len(content) // 2
        shard.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
