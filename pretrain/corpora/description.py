"""The facts of a prepared corpus, for people, for scripts and for its page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.inspection import document_lengths, readable_shards
from braid.pretrain.checkpoint.store import format_bytes

QUANTILES = {"shortest": 0.0, "1 %": 0.01, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}
BINS_PER_OCTAVE = 4


def describe(folder: str) -> dict[str, Any]:
    """Keys are stable: scripts read them. Raises InputError for what is no corpus."""
    splits = {split: TokenCorpus.open(folder, split) for split in ("train", "validation")}
    manifest = splits["train"].manifest
    tokenizer = {"entries": manifest["vocab_size"], "hash": manifest["tokenizer_hash"], "dtype": manifest["dtype"]}
    sources = manifest.get("sources", [])
    return {
        "path": str(folder),
        "format": manifest["format"],
        "pairs": manifest["pairs"],
        "written_by": manifest.get("versions", {}),
        "settings": manifest.get("settings", {}),
        "inputs": {"files": len(sources), "bytes": sum(source.get("bytes", 0) for source in sources)},
        "tokenizer": tokenizer,
        "splits": {name: _describe_split(corpus) for name, corpus in splits.items()},
    }


def _describe_split(corpus: TokenCorpus) -> dict[str, Any]:
    shards = readable_shards(corpus)
    lengths = document_lengths(corpus, shards)
    return {
        "fingerprint": corpus.fingerprint,
        "documents": corpus.num_documents,
        "tokens": corpus.num_tokens,
        "text_bytes": corpus.num_bytes,
        "shards": len(corpus.shard_names),
        "stored_bytes": corpus.stored_bytes,
        "lengths": {
            "shards_read": len(shards),
            "documents": len(lengths),
            "mean": float(lengths.mean()) if len(lengths) else None,
            "quantiles": {name: int(np.quantile(lengths, q, method="lower")) for name, q in QUANTILES.items()}
            if len(lengths)
            else {},
            "histogram": _histogram(lengths),
        },
    }


def _histogram(lengths: np.ndarray) -> dict[str, list]:
    """Documents and tokens of documents of `edges[i]` to `edges[i + 1] - 1` tokens."""
    octaves = int(lengths.max(initial=1)).bit_length()
    edges = np.unique(np.ceil(2.0 ** (np.arange(octaves * BINS_PER_OCTAVE + 1) / BINS_PER_OCTAVE)).astype(np.int64))
    edges = np.concatenate([[0], edges])
    documents, _ = np.histogram(lengths, edges)
    tokens, _ = np.histogram(lengths, edges, weights=lengths)
    return {"edges": edges.tolist(), "documents": documents.tolist(), "tokens": tokens.astype(np.int64).tolist()}


def lines(facts: dict[str, Any]) -> Iterator[str]:
    """What `braid data inspect` prints."""
    tokenizer, inputs = facts["tokenizer"], facts["inputs"]
    kind = "pairs" if facts["pairs"] else "documents"
    yield f"{facts['path']}: {kind} in {facts['format']} shards"
    yield f"  tokenizer    {tokenizer['entries']:,} ids of {tokenizer['dtype']}, hash {tokenizer['hash']}"
    if inputs["files"]:
        yield f"  made from    {inputs['files']:,} files, {format_bytes(inputs['bytes'])}"
    for name, split in facts["splits"].items():
        lengths = split["lengths"]
        yield f"{name}, fingerprint {split['fingerprint']}"
        yield f"  documents    {split['documents']:,}"
        yield f"  tokens       {split['tokens']:,}, {split['text_bytes'] / split['tokens']:.2f} bytes of text each"
        yield f"  stored       {split['shards']:,} shards, {format_bytes(split['stored_bytes'])}"
        if not lengths["documents"]:
            yield "  lengths      no document ends in the shards that can be read"
            continue
        yield f"  lengths      {about(split)}: mean {lengths['mean']:,.1f} tokens"
        yield "               " + ", ".join(f"{label} {value:,}" for label, value in lengths["quantiles"].items())


def about(split: dict[str, Any]) -> str:
    """Which documents the lengths are of."""
    lengths, number = split["lengths"], split["shards"]
    if lengths["documents"] == split["documents"]:
        return "of all documents"
    read = lengths["shards_read"]
    return f"of {lengths['documents']:,} documents in {read:,} of {number:,} shards"
