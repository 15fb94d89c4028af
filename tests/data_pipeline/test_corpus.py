"""The virtual stream of a corpus against the naive one, what opening refuses, damage, memory."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import pytest
from small_corpus import build, damage, naive_stream, texts

from braid.data_pipeline import corpus as corpus_module
from braid.data_pipeline.corpus import TokenCorpus, split_fingerprint, write_rows_file
from braid.data_pipeline.formats import COLUMNS
from braid.data_pipeline.mds import MDSReader
from braid.data_pipeline.tokenizers import load_tokenizer, train_bpe
from braid.kernels.errors import ConfigError, InputError

DOCUMENTS = {
    "mixed": texts(60, 40),
    "one long": ["x" * 3000],
    "one character each": list("abcdefgh" * 40),
    "as long as blocks": ["y" * 64] * 20 + ["z" * 128] * 5,
    "long and short": ["a" * 500, "b", "c", "d" * 300, "e"] * 4,
}


@pytest.mark.parametrize("block", [3, 64, 10_000])
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_stream_equals_the_naive_one(tmp_path, documents, block):
    ids = build(tmp_path, documents, block=block, shard_bytes=2000)
    corpus = TokenCorpus.open(tmp_path, "train")
    stream = np.array(naive_stream(ids, corpus.eos_id))
    raw = np.array(list(chain(*ids)))
    assert corpus.num_stream_tokens == len(stream) and corpus.num_tokens == len(raw)
    np.testing.assert_array_equal(corpus.read(0, len(stream)), stream)
    np.testing.assert_array_equal(corpus.stored_tokens(0, len(raw)), raw)
    rng = np.random.default_rng(0)
    for _ in range(60):
        start, stop = sorted(rng.integers(0, len(stream) + 1, 2).tolist())
        np.testing.assert_array_equal(corpus.read(start, stop), stream[start:stop])
        start, stop = sorted(rng.integers(0, len(raw) + 1, 2).tolist())
        np.testing.assert_array_equal(corpus.stored_tokens(start, stop), raw[start:stop])
    for k in range(0, len(stream), 11):
        assert corpus.read(k, k + 1).tolist() == [stream[k]] and corpus.read(k, k).size == 0


def test_reads_outside_are_refused(tmp_path):
    build(tmp_path, ["abc"])
    corpus = TokenCorpus.open(tmp_path, "train")
    for start, stop in ((-1, 2), (0, 5), (3, 2)):
        with pytest.raises((IndexError, ValueError)):
            corpus.read(start, stop)


def test_what_a_corpus_says_of_itself(tmp_path):
    documents = texts(30, 50, seed=3)
    tokenizer = train_bpe(texts(300, 50, seed=4), 400)
    assert tokenizer.vocab_size > 300
    ids = build(tmp_path, documents, tokenizer=tokenizer)
    build(tmp_path, documents[:5], tokenizer=tokenizer, split="validation")
    corpus = TokenCorpus.open(tmp_path, "train")
    assert corpus.num_documents == 30 and corpus.num_tokens == sum(map(len, ids))
    assert corpus.num_bytes == sum(len(text.encode()) for text in documents)
    assert corpus.vocab_size == tokenizer.vocab_size and corpus.tokenizer.hash == tokenizer.hash
    assert corpus.read(0, 1).dtype == corpus.dtype == np.uint16
    assert corpus.manifest["splits"]["train"]["fingerprint"] == corpus.fingerprint
    assert corpus.tokenizer.decode(corpus.read(0, corpus.num_stream_tokens)) == "".join(documents)
    validation = TokenCorpus.open(tmp_path, "validation")
    assert validation.num_documents == 5 and validation.fingerprint != corpus.fingerprint


def test_large_vocabularies_are_stored_in_32_bits(tmp_path):
    wide = load_tokenizer("bytes")
    definition, special = wide.__reduce__()[1]
    wide = type(wide)(definition, special | {"mask": 70_000})
    ids = build(tmp_path, ["one", "two"], tokenizer=wide)
    corpus = TokenCorpus.open(tmp_path, "train")
    assert COLUMNS(corpus.dtype)["tokens"] == "ndarray:uint32" and corpus.vocab_size == 70_001
    assert corpus.read(0, 8).dtype == np.uint32 and corpus.read(0, 8).tolist() == naive_stream(ids, corpus.eos_id)


def test_fingerprint_follows_content_and_tokenizer(tmp_path):
    for name, documents in (("a", ["one", "two"]), ("b", ["one", "two"]), ("c", ["one", "twp"]), ("d", ["onet", "wo"])):
        build(tmp_path / name, documents)
    a, b, c, d = (TokenCorpus.open(tmp_path / name, "train").fingerprint for name in "abcd")
    assert a == b and len({a, c, d}) == 3 and len(a) == 16 and int(a, 16) > 0
    assert split_fingerprint(tmp_path / "a" / "train", "other") != a


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"] |= {key: changes.pop(key) for key in ("tokens", "documents") if key in changes}
    path.write_text(json.dumps(manifest | changes))


def reverse_rows(folder):
    write_rows_file(folder / "train", np.load(folder / "train" / "rows.npy")[::-1].copy())


BROKEN = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "not a prepared corpus"),
    "manifest is not JSON": (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is damaged"),
    "manifest lacks a key": (lambda f: edit_manifest(f, splits={"train": {}}), "manifest.json is damaged"),
    "manifest of another version": (lambda f: edit_manifest(f, version=99), "version 99"),
    "another tokenizer": (lambda f: train_bpe(["aa ab aa ab"] * 9, 260).save(f / "tokenizer"), "tokenizer mismatch"),
    "another hash": (lambda f: edit_manifest(f, tokenizer_hash="00ff"), "tokenizer mismatch.*\n.*00ff"),
    "no tokens": (lambda f: edit_manifest(f, tokens=0), "holds no tokens"),
    "fewer tokens than promised": (lambda f: edit_manifest(f, tokens=5), "5 and 40 in the manifest"),
    "fewer documents than promised": (lambda f: edit_manifest(f, documents=39), "39 in the manifest"),
    "no rows.npy": (lambda f: (f / "train/rows.npy").unlink(), "rows.npy"),
    "empty rows.npy": (lambda f: (f / "train/rows.npy").write_bytes(b""), "rows.npy"),
    "rows.npy is cut": (lambda f: (f / "train/rows.npy").write_bytes((f / "train/rows.npy").read_bytes()[:-8]), "rows"),
    "rows.npy is another": (reverse_rows, "fingerprint"),
    "no index.json": (lambda f: (f / "train/index.json").unlink(), "index.json"),
    "index.json is another": (lambda f: (f / "train/index.json").open("a").write(" "), "fingerprint"),
}


@pytest.mark.parametrize(("breakage", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_opening_refuses_what_is_broken(tmp_path, breakage, message):
    build(tmp_path, texts(40, 40))
    TokenCorpus.open(tmp_path, "train")
    breakage(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        TokenCorpus.open(tmp_path, "train")
    assert caught.value.change


def test_opening_refuses_wrong_arguments(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        TokenCorpus.open(tmp_path / "nowhere", "train")
    build(tmp_path, ["text"])
    with pytest.raises(InputError, match="no split validation"):
        TokenCorpus.open(tmp_path, "validation")
    with pytest.raises(ConfigError, match="ignore"):
        TokenCorpus.open(tmp_path, "train", damaged="ignore")
    with pytest.raises(ConfigError, match="ledger"):
        TokenCorpus.open(tmp_path, "train", damaged="skip")


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
@pytest.mark.parametrize("damaged", ["stop", "skip"])
def test_a_damaged_region_is_refused_and_the_rest_is_read(tmp_path, how, damaged):
    ids = build(tmp_path, texts(80, 60))
    damage(tmp_path / "train" / "shard.00001.mds", how)
    corpus = TokenCorpus.open(tmp_path, "train", damaged, tmp_path / "ledger.jsonl")
    stream = naive_stream(ids, corpus.eos_id)
    start, stop = corpus.shard_starts[1:3]
    assert 0 < start < stop < len(stream)
    assert corpus.read(0, start).tolist() == stream[:start]
    assert corpus.read(stop, len(stream)).tolist() == stream[stop:]
    for a, b in ((start - 1, start + 1), (start, start + 1), (stop - 1, stop + 1), (0, len(stream))):
        with pytest.raises(InputError, match="shard.00001.mds"):
            corpus.read(a, b)
    assert [corpus.damage(k) is None for k in range(3)] == [True, False, True]


def test_the_ledger_repeats_nothing(tmp_path):
    build(tmp_path, ["text"])
    ledger = tmp_path / "logs" / "ledger.jsonl"
    for _ in range(2):
        corpus = TokenCorpus.open(tmp_path, "train", "skip", ledger)
        corpus.write_to_ledger(shard="a", rows=[0, 1])
        corpus.write_to_ledger(shard="b", rows=[1, 2])
    assert [json.loads(line) for line in ledger.read_text().splitlines()] == [
        {"split": "train", "shard": "a", "rows": [0, 1]},
        {"split": "train", "shard": "b", "rows": [1, 2]},
    ]


def test_memory_does_not_grow_with_what_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "MAX_TABLES", 4)
    build(tmp_path, ["a" * 999] * 3000, block=2048, shard_bytes=50_000)
    corpus = TokenCorpus.open(tmp_path, "train")
    assert len(corpus.shard_names) > 100 and corpus.num_stream_tokens == 3_000_000
    tracemalloc.start()
    total = sum(int(corpus.read(k, k + 1000).sum()) for k in range(0, 3_000_000, 1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 3000 * (999 * ord("a") + corpus.eos_id)
    assert peak < 500_000 and len(corpus._tables) <= 4


def test_threads_and_copies_read_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "MAX_TABLES", 2)
    ids = build(tmp_path, texts(200, 60))
    corpus = TokenCorpus.open(tmp_path, "train")
    stream = np.array(naive_stream(ids, corpus.eos_id))
    copy = pickle.loads(pickle.dumps(corpus))
    assert len(pickle.dumps(corpus)) < 60_000

    def check(seed: int) -> bool:
        source = (corpus, copy)[seed % 2]
        for start in np.random.default_rng(seed).integers(0, len(stream) - 100, 300).tolist():
            np.testing.assert_array_equal(source.read(start, start + 100), stream[start : start + 100])
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(check, range(4)))


def test_opening_reads_no_shard(tmp_path, monkeypatch):
    build(tmp_path, texts(40, 40))
    monkeypatch.setattr(MDSReader, "verify_shard", lambda *_: pytest.fail("a shard was read"))
    TokenCorpus.open(tmp_path, "train")
