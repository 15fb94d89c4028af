"""Rows against an independent naive packing, bytes of original text, ownership by shard, rows left out."""

from __future__ import annotations

import json
from itertools import chain

import numpy as np
import pytest
from small_corpus import build, damage, naive_stream, texts

from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.packing import Rows
from braid.data_pipeline.tokenizers import Tokenizer, load_tokenizer, train_bpe
from braid.kernels.errors import ConfigError, DataExhausted, InputError


def naive_rows(stream: list[int], length: int, packing: str, bos: int, eos: int) -> list[list[int]]:
    """Cut the stream piece by piece, the way the papers' preprocessing does it."""
    rows, rest = [], list(stream)
    take = length - 2 if packing == "wrap" else length
    while len(rest) >= take:
        piece, rest = rest[:take], rest[take:]
        rows.append([bos, *piece, eos] if packing == "wrap" else piece)
    return rows


@pytest.mark.parametrize("packing", ["wrap", "stream"])
@pytest.mark.parametrize("length", [3, 16, 128, 1024])
def test_rows_equal_the_naive_packing(tmp_path, packing, length):
    ids = build(tmp_path, texts(100, 60), block=100, shard_bytes=3000)
    corpus = TokenCorpus.open(tmp_path, "train")
    rows = Rows(corpus, length, packing)
    expected = naive_rows(naive_stream(ids, corpus.eos_id), length, packing, corpus.bos_id, corpus.eos_id)
    assert len(rows) == len(expected) > 5
    np.testing.assert_array_equal([rows[i] for i in range(len(rows))], expected)
    assert rows[0].dtype == np.int64 and rows[0].shape == (length,)
    some = np.random.default_rng(0).integers(0, len(rows), 20)
    np.testing.assert_array_equal(rows.read(some), np.array(expected)[some])
    for i in (-1, len(rows)):
        with pytest.raises(IndexError):
            rows[i]


def test_bos_and_eos_that_differ(tmp_path):
    definition, special = load_tokenizer("bytes").__reduce__()[1]
    ids = build(tmp_path, texts(20, 60), tokenizer=Tokenizer(definition, special | {"bos": special["pad"]}))
    corpus = TokenCorpus.open(tmp_path, "train")
    assert corpus.bos_id != corpus.eos_id
    rows = Rows(corpus, 20, "wrap")
    expected = naive_rows(naive_stream(ids, corpus.eos_id), 20, "wrap", special["pad"], special["eos"])
    np.testing.assert_array_equal([rows[i] for i in range(len(rows))], expected)


@pytest.mark.parametrize("packing", ["wrap", "stream"])
def test_bytes_of_rows_are_exact(tmp_path, packing):
    """With rows of one stream token, the bytes of all rows are the bytes of all documents."""
    documents = texts(60, 50)
    tokenizer = train_bpe(texts(300, 50, seed=1), 400)
    ids = build(tmp_path, documents, tokenizer=tokenizer)
    num_bytes = len("".join(documents).encode())
    assert sum(map(len, ids)) < 0.9 * num_bytes, "tokens should stand for several bytes here"
    corpus = TokenCorpus.open(tmp_path, "train")
    single = Rows(corpus, {"wrap": 3, "stream": 1}[packing], packing)
    assert single.bytes_are_exact
    assert sum(single.num_bytes(i) for i in range(len(single))) == num_bytes == corpus.num_bytes
    rows = Rows(corpus, 40, packing)
    per_token = [single.num_bytes(i) for i in range(len(single))]
    stride = 38 if packing == "wrap" else 40
    for i in (0, 7, len(rows) - 1):
        assert rows.num_bytes(i) == sum(per_token[i * stride : (i + 1) * stride]) > 0


def test_bytes_of_rows_by_the_mean_where_tokens_do_not_say(tmp_path):
    definition, special = train_bpe(texts(300, 50, seed=1), 400).__reduce__()[1]
    lowercasing = Tokenizer({**definition, "normalizer": {"type": "Lowercase"}}, special)
    build(tmp_path, texts(60, 50), tokenizer=lowercasing)
    corpus = TokenCorpus.open(tmp_path, "train")
    rows = Rows(corpus, 1, "stream")
    assert not rows.bytes_are_exact
    sizes = [rows.num_bytes(i) for i in range(len(rows))]
    assert sum(sizes) == pytest.approx(corpus.num_bytes)
    assert set(sizes) == {0.0, corpus.num_bytes / corpus.num_tokens}  # EOS, text
    wrapped = Rows(corpus, 20, "wrap")
    assert wrapped.num_bytes(0) == pytest.approx(sum(sizes[:18]))


@pytest.mark.parametrize("packing", ["wrap", "stream"])
@pytest.mark.parametrize("length", [3, 50, 700])
def test_a_row_belongs_to_the_shard_of_its_first_stream_token(tmp_path, packing, length):
    build(tmp_path, texts(100, 60), block=100, shard_bytes=1200)
    corpus = TokenCorpus.open(tmp_path, "train")
    rows = Rows(corpus, length, packing)
    stride = length - 2 if packing == "wrap" else length
    owner = [sum(start <= i * stride for start in corpus.shard_starts) - 1 for i in range(len(rows))]
    assert len(corpus.shard_names) > 10
    assert rows.rows_per_shard.tolist() == [owner.count(shard) for shard in range(len(corpus.shard_names))]


def test_wrong_arguments_are_refused(tmp_path):
    build(tmp_path, ["a" * 30])
    corpus = TokenCorpus.open(tmp_path, "train")
    with pytest.raises(ConfigError, match="pad"):
        Rows(corpus, 16, "pad")
    for length, packing in ((2, "wrap"), (0, "stream")):
        with pytest.raises(ConfigError, match=f"sequence_length={length}"):
            Rows(corpus, length, packing)
    assert len(Rows(corpus, 33, "wrap")) == len(Rows(corpus, 31, "stream")) == 1
    with pytest.raises(DataExhausted, match="31 tokens, a row takes 32"):
        Rows(corpus, 34, "wrap")


def test_rows_left_out_are_those_that_touch_a_damaged_shard(tmp_path):
    build(tmp_path, texts(100, 60), block=100, shard_bytes=1500)
    ledger = tmp_path / "ledger.jsonl"
    names = TokenCorpus.open(tmp_path, "train").shard_names
    damage(tmp_path / "train" / names[2], "flipped")
    damage(tmp_path / "train" / names[5], "missing")
    corpus = TokenCorpus.open(tmp_path, "train", "skip", ledger)
    rows = Rows(corpus, 50, "wrap")
    left_out = [i for i in range(len(rows)) if rows.is_left_out(i)]
    lost = set(chain(*(range(*corpus.shard_starts[shard : shard + 2]) for shard in (2, 5))))
    assert left_out == [i for i in range(len(rows)) if lost & set(range(i * 48, i * 48 + 48))]
    for i in range(len(rows)):
        if i not in left_out:
            rows[i]
    for i in left_out:
        with pytest.raises(InputError, match="shard.0000[25].mds"):
            rows[i]
    entries = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert [entry["shard"] for entry in entries] == [names[2], names[5]]
    assert list(chain(*(range(*entry["rows"]) for entry in entries))) == left_out
    assert "hash" in entries[0]["reason"] and "No such file" in entries[1]["reason"]
    assert all(
        entry["split"] == "train" and entry["sequence_length"] == 50 and entry["packing"] == "wrap" for entry in entries
    )


def test_nothing_is_left_out_when_damage_stops_the_run(tmp_path):
    build(tmp_path, texts(100, 60), block=100, shard_bytes=1500)
    damage(tmp_path / "train" / "shard.00002.mds", "missing")
    rows = Rows(TokenCorpus.open(tmp_path, "train"), 50, "wrap")
    assert not any(rows.is_left_out(i) for i in range(len(rows)))
