"""Rows made of documents against rows made by hand, and against an independent naive packing of random corpora."""

from __future__ import annotations

import json
import pickle
from collections import Counter

import numpy as np
import pytest
from small_corpus import build, damage, naive_stream, texts

from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.packing import Rows
from braid.data_pipeline.row_table import best_fit
from braid.data_pipeline.tokenizers import Tokenizer, load_tokenizer
from braid.kernels.errors import ConfigError, InputError

STYLES = ("document", "best_fit", "paragraph")
DEFINITION, SPECIAL = load_tokenizer("bytes").__reduce__()[1]
TOKENIZER = Tokenizer(DEFINITION, SPECIAL | {"bos": SPECIAL["mask"] - 3})  # an id of its own for each of them
SHOWN = {TOKENIZER.bos_id: "<", TOKENIZER.eos_id: ">", TOKENIZER.pad_id: "."}


def open_rows(folder, documents, length, packing, *, damaged=("stop",), **options):
    build(folder, documents, tokenizer=TOKENIZER, block=64, shard_bytes=1500)
    return Rows(TokenCorpus.open(folder, "train", *damaged), length, packing, **options)


def shown(rows):
    """Each row as text and, below, its segments."""
    tokens, segments = rows.load(range(len(rows)))
    return [
        ("".join(SHOWN.get(i, chr(i)) for i in row), "".join(map(str, numbers)))
        for row, numbers in zip(tokens.tolist(), segments.tolist(), strict=True)
    ]


def test_a_document_a_row(tmp_path):
    rows = open_rows(tmp_path, ["abc", "defgh", "ijklmno", "p"], 7, "document")
    assert shown(rows) == [
        ("<abc>..", "1111100"),
        ("<defgh>", "1111111"),
        ("<ijklmn", "1111111"),
        ("<o>....", "1110000"),
        ("<p>....", "1110000"),
    ]
    assert rows.num_oversized == 1
    assert [rows.num_real([i]) for i in range(5)] == [5, 7, 7, 3, 3] and rows.num_real(range(5)) == 25
    assert [rows.num_bytes(i) for i in range(5)] == [3, 5, 6, 1, 1]


def test_no_row_for_an_end_alone(tmp_path):
    rows = open_rows(tmp_path, ["abcdef", "g"], 7, "document")
    assert shown(rows) == [("<abcdef", "1111111"), ("<g>....", "1110000")]


def test_documents_that_do_not_fit(tmp_path):
    documents = ["abc", "defghijk", "p"]
    rows = open_rows(tmp_path, documents, 7, "document", oversized="skip")
    assert shown(rows) == [("<abc>..", "1111100"), ("<p>....", "1110000")] and rows.num_oversized == 1
    for packing in STYLES:
        with pytest.raises(ConfigError, match="1 of 3 (documents|paragraphs) .*\n?.*longest has 8 tokens"):
            Rows(rows.corpus, 7, packing, oversized="stop")
        assert Rows(rows.corpus, 10, packing, oversized="stop").num_oversized == 0
    with pytest.raises(ConfigError, match="oversized='truncate'"):
        Rows(rows.corpus, 7, "document", oversized="truncate")


def test_the_best_fit(tmp_path):
    rows = open_rows(tmp_path, ["ab", "abcdef", "cd", "efg", "ghij", "h"], 8, "best_fit")
    assert shown(rows) == [
        ("<ab><cd>", "11112222"),
        ("<abcdef>", "11111111"),
        ("<efg><h>", "11111222"),
        ("<ghij>..", "11111100"),
    ]
    assert rows.num_real(range(4)) == 30


def test_long_documents_are_packed_in_pieces(tmp_path):
    rows = open_rows(tmp_path, ["abcdefghi", "jk"], 8, "best_fit")
    assert shown(rows) == [("<abcdefg", "11111111"), ("<hi><jk>", "11112222")]


def test_paragraphs_fill_rows_across_documents(tmp_path):
    """The rows of the released data: no token between paragraphs or documents, one EOS where the next does not fit."""
    rows = open_rows(tmp_path, ["ab\n\ncd\n\n", "e", "fghi\n\nj", "klmnopqrstuv\n\nw"], 10, "paragraph")
    assert shown(rows) == [
        ("ab\n\ncd\n\ne>", "1111111111"),
        ("fghi\n\nj>..", "1111111100"),
        ("klmnopqrs>", "1111111111"),
        ("tuv\n\nw>...", "1111111000"),
    ]
    assert rows.num_oversized == 1
    assert [rows.num_bytes(i) for i in range(4)] == [9, 7, 9, 6]


def test_without_line_breaks_a_document_is_the_paragraph(tmp_path):
    rows = open_rows(tmp_path, ["abc", "de", "fghi", "j"], 6, "paragraph")
    assert shown(rows) == [("abcde>", "111111"), ("fghij>", "111111")]


def test_best_fit_decreasing():
    sizes = np.random.default_rng(0).integers(1, 101, 3000)
    for some in (sizes, sizes[:1], sizes[:0]):
        bins = best_fit(some, 100)
        filled = np.bincount(bins, some) if len(some) else np.zeros(0)
        assert (filled <= 100).all() and (filled > 0).all()
        first = [int(np.flatnonzero(bins == i)[0]) for i in range(len(filled))]
        assert first == sorted(first), "bins are numbered by their first item"
    naive: list[int] = []
    for size in sorted(sizes.tolist(), reverse=True):
        fitting = [i for i, used in enumerate(naive) if used + size <= 100]
        if fitting:
            naive[max(fitting, key=lambda i: naive[i])] += size
        else:
            naive.append(size)
    assert sorted(np.bincount(best_fit(sizes, 100), sizes).astype(int)) == sorted(naive)


@pytest.mark.parametrize("packing", STYLES)
@pytest.mark.parametrize("length", [12, 100, 5000])
def test_every_token_of_every_document_is_in_one_row(tmp_path, packing, length):
    documents = [document.replace(" ", "\n") for document in texts(300, 60)]
    rows = open_rows(tmp_path, documents, length, packing)
    corpus = rows.corpus
    assert len(corpus.shard_names) > 10 and rows.rows_per_shard.sum() == len(rows)
    tokens, segments = rows.load(range(len(rows)))
    special = [TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id]
    assert Counter(tokens[~np.isin(tokens, special)].tolist()) == Counter("".join(documents).encode())
    assert ((tokens == TOKENIZER.pad_id) == (segments == 0)).all()
    spans = [rows._cuts.spans(i) for i in range(len(rows))]
    # Row by row in the order of the stream, each in the shard where it begins, and nothing twice.
    starts = [row[0][0] for row in spans]
    owner = np.searchsorted(corpus.shard_starts, starts, "right") - 1
    assert np.bincount(owner, minlength=len(corpus.shard_names)).tolist() == rows.rows_per_shard.tolist()
    assert (np.diff(owner) >= 0).all() and (packing == "best_fit" or starts == sorted(starts))
    taken = np.concatenate([np.arange(*span) for row in spans for span in row])
    assert len(np.unique(taken)) == len(taken)
    stream = np.array(naive_stream([TOKENIZER.encode_batch([d])[0].tolist() for d in documents], TOKENIZER.eos_id))
    rest = np.delete(stream, taken)
    assert (rest == TOKENIZER.eos_id).all()
    some = np.random.default_rng(0).integers(0, len(rows), 20)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(rows)).read(some), tokens[some])


@pytest.mark.parametrize("packing", ["document", "best_fit"])
def test_pieces_are_documents(tmp_path, packing):
    documents = texts(200, 40)
    rows = open_rows(tmp_path, documents, 400, packing)
    tokens, segments = rows.load(range(len(rows)))
    found = [
        bytes(row[numbers == n].tolist()[1:-1] if max(row[numbers == n][1:-1]) < 256 else [])
        for row, numbers in zip(tokens, segments, strict=True)
        for n in range(1, numbers.max() + 1)
    ]
    assert Counter(found) == Counter(document.encode() for document in documents)
    if packing == "best_fit":
        assert len(rows) < 60 and rows.num_real(range(len(rows))) > 0.5 * tokens.size


@pytest.mark.parametrize("packing", STYLES)
def test_rows_of_damaged_shards_are_left_out(tmp_path, packing):
    whole = open_rows(tmp_path, texts(300, 60), 100, packing, damaged=("skip", tmp_path / "ledger"))
    names, starts = whole.corpus.shard_names, whole.corpus.shard_starts
    damage(tmp_path / "train" / names[2], "flipped")
    rows = Rows(TokenCorpus.open(tmp_path, "train", "skip", tmp_path / "ledger"), 100, packing)
    assert rows.table_hash == whole.table_hash, "a table that is there stays"
    spans = [rows._cuts.spans(i) for i in range(len(rows))]
    touching = [i for i, row in enumerate(spans) if any(a < starts[3] and b > starts[2] for a, b in row)]
    assert [i for i in range(len(rows)) if rows.is_left_out(i)] == touching and len(touching) > 3
    (line,) = map(json.loads, (tmp_path / "ledger").read_text().splitlines())
    named = line.get("earlier_rows", []) + list(range(*line["rows"]))
    assert named == touching and line["shard"] == names[2]


@pytest.mark.parametrize("packing", STYLES)
def test_rows_are_made_of_what_can_be_read(tmp_path, packing):
    documents = texts(300, 60)
    build(tmp_path, documents, tokenizer=TOKENIZER, block=64, shard_bytes=1500)
    names = TokenCorpus.open(tmp_path, "train").shard_names
    damage(tmp_path / "train" / names[2], "flipped")
    with pytest.raises(InputError, match=names[2]):
        Rows(TokenCorpus.open(tmp_path, "train"), 100, packing)
    assert not list((tmp_path / "train").glob("rows-*.bin*")), "nothing half made is left"
    corpus = TokenCorpus.open(tmp_path, "train", "skip", tmp_path / "ledger")
    rows = Rows(corpus, 100, packing)
    assert not any(rows.is_left_out(i) for i in range(len(rows)))
    assert rows.rows_per_shard[2] == 0 or packing == "paragraph"
    stream = naive_stream([TOKENIZER.encode_batch([d])[0].tolist() for d in documents], TOKENIZER.eos_id)
    ends = np.flatnonzero(np.array(stream) == TOKENIZER.eos_id)
    a, b = corpus.shard_starts[2:4]
    first_lost = ends[ends < a][-1] + 1
    kept_from = ends[ends >= b][0] + 1
    lost = {*range(first_lost, kept_from)}
    held = {p for i in range(len(rows)) for span in rows._cuts.spans(i) for p in range(*span)}
    assert not held & (lost if packing != "paragraph" else {*range(a, kept_from)})
    assert all(stream[p] == TOKENIZER.eos_id for p in {*range(len(stream))} - lost - held)
    assert f'"shard": "{names[2]}"' in (tmp_path / "ledger").read_text()
    assert Rows(corpus, 100, packing).table_hash == rows.table_hash
