"""Lengths of documents, damaged shards and rows as text, beside the documents that were stored."""

from __future__ import annotations

import numpy as np
import pytest
from small_corpus import build, damage, texts

from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.inspection import damaged_shards, document_lengths, readable_shards, spelt
from braid.data_pipeline.tokenizers import load_tokenizer


@pytest.fixture(scope="module", params=["mds", "wds", "flat"])
def stored(request, tmp_path_factory):
    """A corpus whose documents cross blocks and shards, and their lengths."""
    folder = tmp_path_factory.mktemp(request.param)
    documents = build(folder, texts(300, 60), format=request.param)
    return TokenCorpus.open(folder, "train"), np.array([len(document) for document in documents])


def test_lengths_of_all_documents(stored):
    corpus, lengths = stored
    assert len(corpus.shard_names) > 8
    shards = readable_shards(corpus, 1000)
    assert shards == list(range(len(corpus.shard_names)))
    np.testing.assert_array_equal(document_lengths(corpus, shards), lengths)


def test_lengths_in_some_shards(stored):
    """Those of documents that end there and do not begin in a shard that was not asked for."""
    corpus, lengths = stored
    ends = np.cumsum(lengths)
    starts = ends - lengths
    begins = np.array(corpus._shard_tokens)
    for shards in ([0], [3], [2, 3, 4, 7], [0, 1, 5], [1, 8]):
        in_shard = np.searchsorted(begins, ends, "left") - 1  # of the last token
        begun_in = np.searchsorted(begins, starts, "right") - 1
        kept = [
            all(shard in shards for shard in range(a, b + 1)) and b in shards
            for a, b in zip(begun_in, in_shard, strict=True)
        ]
        found = document_lengths(corpus, shards)
        # Where a document ends with its shard, the next one's beginning is known only by that shard.
        wanted = lengths[[k and (s == begins[b]) <= (b == 0 or b - 1 in shards) for k, s, b in
                          zip(kept, starts, begun_in, strict=True)]]  # fmt: skip
        np.testing.assert_array_equal(found, wanted)


def test_chosen_shards_are_spread(stored):
    corpus, _ = stored
    number = len(corpus.shard_names)
    assert readable_shards(corpus, 3) == [0, round((number - 1) / 2), number - 1]


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
@pytest.mark.parametrize("workers", [1, 3])
def test_damaged_shards_are_named(tmp_path, how, workers):
    build(tmp_path, texts(60, 60))
    corpus = TokenCorpus.open(tmp_path, "train")
    damage(tmp_path / "train" / corpus.shard_names[2], how)
    found = list(damaged_shards(corpus, workers))
    assert [name for name, _ in found] == corpus.shard_names
    assert [i for i, (_, reason) in enumerate(found) if reason] == [2]
    assert 2 not in readable_shards(corpus, 1000)


def test_special_tokens_are_named_and_counted():
    tokenizer = load_tokenizer("bytes")
    text = tokenizer.encode_batch(["söm"])[0].tolist()
    ids = [tokenizer.bos_id, *text, *[tokenizer.mask_id] * 2, tokenizer.eos_id]
    shown = spelt(tokenizer, np.array(ids))
    assert "söm<mask> x 2 <" in shown and shown.startswith("<bos") and shown.endswith(">")
