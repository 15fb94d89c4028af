"""Corpora of (source, target) pairs: what a row looks like, what of it is given and scored, that nothing is lost."""

from __future__ import annotations

import json
import pickle
import random
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_corpus import LETTERS, build, damage
from test_prepare import num_journal_lines, start, tree, wait_for

from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.loader import Batch, Loader, validation_batches
from braid.data_pipeline.order import ShuffledOrder
from braid.data_pipeline.packing import Rows
from braid.data_pipeline.prepare import prepare
from braid.data_pipeline.readers import TextFiles
from braid.data_pipeline.tokenizers import Tokenizer, load_tokenizer, train_bpe
from braid.kernels.errors import ConfigError, InputError

FIELDS = ("source", "target")
SMALL = {"pair_fields": FIELDS, "row_tokens": 50, "shard_bytes": 1200, "progress": False}
SPLITS = ("train", "validation")
LENGTH = 128
Pairs = list[tuple[str, str]]


def random_pairs(num: int, seed: int = 0) -> Pairs:
    """Different pairs with characters of one to four bytes; some sources are empty, and some targets."""
    rng = np.random.default_rng(seed)
    sources, targets = (
        ["".join(rng.choice(LETTERS, min(20, rng.poisson(rng.exponential(9))))) for _ in range(num)] for _ in FIELDS
    )
    return [
        (f"{i}{source}" if i % 9 else "", target)
        for i, (source, target) in enumerate(zip(sources, targets, strict=True))
    ]


def write_pairs(path: Path, pairs: Pairs, fields: tuple[str, str] = FIELDS) -> Path:
    path.write_text("".join(json.dumps(dict(zip(fields, pair, strict=True))) + "\n" for pair in pairs))
    return path


def prepared(folder: Path, pairs: Pairs, tokenizer: str | Path = "bytes", **options) -> Path:
    write_pairs(folder / "pairs.jsonl", pairs)
    prepare([folder / "pairs.jsonl"], tokenizer, folder / "corpus", **(SMALL | options))
    return folder / "corpus"


def open_rows(corpus: Path, split: str = "train", *, length: int = LENGTH, packing: str = "pairs", **options) -> Rows:
    damaged = {name: options.pop(name) for name in ("damaged", "ledger") if name in options}
    return Rows(TokenCorpus.open(corpus, split, **damaged), length, packing, **options)


def naive_row(tokenizer: Tokenizer, pair: tuple[str, str], length: int) -> list[int]:
    source, target = (ids.tolist() for ids in tokenizer.encode_batch(pair))
    row = [tokenizer.bos_id, *source, tokenizer.eos_id, *target, tokenizer.eos_id]
    return row + [tokenizer.eos_id] * (length - len(row))


def naive_rows(rows: Rows, pairs: Iterable[tuple[str, str]]) -> list[list[int]]:
    return [naive_row(rows.corpus.tokenizer, pair, rows.sequence_length) for pair in pairs]


def all_rows(rows: Rows) -> list[list[int]]:
    return [rows[i].tolist() for i in range(len(rows))]


def of_split(rows: Rows, pairs: Pairs) -> Pairs:
    """The pairs whose row is in the split, in the order they were written in."""
    there = set(map(tuple, all_rows(rows)))
    return [pair for pair, row in zip(pairs, naive_rows(rows, pairs), strict=True) if tuple(row) in there]


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return random_pairs(500)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, pairs) -> Path:
    """A corpus of many shards; tests that damage it make their own."""
    return prepared(tmp_path_factory.mktemp("pairs"), pairs, validation_fraction=0.2)


# --- rows ---


@pytest.mark.parametrize("same_id", [True, False])
def test_layout(tmp_path, same_id):
    """Rows, and what of them is given and scored, written by hand; with one id for BOS and EOS, and with two."""
    definition, special = load_tokenizer("bytes").__reduce__()[1]
    tokenizer = Tokenizer(definition, special if same_id else special | {"bos": special["pad"]})
    tokenizer.save(tmp_path / "tokenizer")
    b, e = tokenizer.bos_id, tokenizer.eos_id
    assert (b == e) == same_id
    a, c, d, x, y, z = (ord(letter) for letter in "acdxyz")
    expected = {  # pair: row, tokens given
        ("ac", "d"): ([b, a, c, e, d, e, e, e, e], 4),
        ("", "xyz"): ([b, e, x, y, z, e, e, e, e], 2),
        ("é", ""): ([b, 0xC3, 0xA9, e, e, e, e, e, e], 4),
        ("", ""): ([b, e, e, e, e, e, e, e, e], 2),
        ("xyz", "acd"): ([b, x, y, z, e, a, c, d, e], 5),
        ("  ", " x"): ([b, 32, 32, e, 32, x, e, e, e], 4),
    }
    folder = prepared(tmp_path, list(expected), tmp_path / "tokenizer")
    batches: list[Batch] = []
    for split in SPLITS:
        rows = open_rows(folder, split, length=9)
        batches += validation_batches(rows, len(rows), 2, 0, 1)
    seen = []
    for batch in batches:
        for tokens, loss_mask, condition in zip(batch.tokens, batch.loss_mask, batch.condition, strict=True):
            [(pair, num_given)] = [(pair, n) for pair, (row, n) in expected.items() if row == tokens.tolist()]
            assert condition.tolist() == [True] * num_given + [False] * (9 - num_given), pair
            assert loss_mask.tolist() == [False] * num_given + [True] * (9 - num_given), pair
            seen.append(pair)
    assert sorted(seen) == sorted(expected)


def test_every_pair_is_a_row_of_one_split(corpus, pairs):
    train, validation = (open_rows(corpus, split) for split in SPLITS)
    assert len(train) + len(validation) == len(pairs) and 0.1 < len(validation) / len(pairs) < 0.3
    for rows in (train, validation):
        assert all_rows(rows) == naive_rows(rows, of_split(rows, pairs)), "in the order of the input"
        assert len(rows.corpus.shard_names) > 5 and rows.num_oversized == 0
    assert sorted(of_split(train, pairs) + of_split(validation, pairs)) == sorted(pairs)


def test_rows_of_several_lengths_at_random(corpus, pairs):
    for length in (90, 91, 200):
        rows = open_rows(corpus, length=length)
        expected = np.array(naive_rows(rows, of_split(rows, pairs)))
        some = np.random.default_rng(length).integers(0, len(rows), 50)
        np.testing.assert_array_equal(rows.read(some), expected[some])
        assert rows[3].dtype == np.int64 and rows.read([3]).dtype == rows.corpus.dtype
    for i in (-1, len(rows)):
        with pytest.raises(IndexError):
            rows[i]


def test_a_text_that_quotes_the_end_does_not_end_the_source(tmp_path):
    quoted = [(f"{i} <|endoftext|> a", f"<|endoftext|>{i}<|mask|>") for i in range(30)]
    folder = prepared(tmp_path, quoted, "train:300")
    found = []
    for split in SPLITS:
        rows = open_rows(folder, split)
        for i in range(len(rows)):
            row = rows.read([i])
            given = rows.condition(row)
            found.append(tuple(rows.corpus.tokenizer.decode(row[part]) for part in (given, ~given)))
    assert sorted(found) == sorted(quoted)


def test_a_row_belongs_to_the_shard_of_its_first_stream_token(corpus, pairs):
    rows = open_rows(corpus)
    owners, position = [], 0
    for source, target in of_split(rows, pairs):
        owners.append(sum(start <= position for start in rows.corpus.shard_starts) - 1)
        position += len(source.encode()) + len(target.encode()) + 2
    assert position == rows.corpus.num_stream_tokens
    assert rows.rows_per_shard.tolist() == [owners.count(shard) for shard in range(len(rows.corpus.shard_names))]


def test_the_stream_of_pairs_is_text_like_any_other(corpus, pairs):
    rows = open_rows(corpus, length=40, packing="wrap")
    b, e = rows.corpus.bos_id, rows.corpus.eos_id
    documents = [text.encode() for pair in of_split(open_rows(corpus), pairs) for text in pair]
    stream = [token for document in documents for token in (*document, e)]
    expected = [[b, *stream[i : i + 38], e] for i in range(0, len(stream) - 37, 38)]
    assert all_rows(rows) == expected and not rows.condition(rows.read([0, 1])).any()


def test_documents_are_no_pairs(tmp_path):
    build(tmp_path, ["some text", "more of it"])
    with pytest.raises(ConfigError, match="does not consist of pairs"):
        open_rows(tmp_path)


# --- bytes ---


def test_bytes_are_those_of_the_targets(tmp_path, pairs):
    tokenizer = train_bpe([text for pair in random_pairs(300, seed=1) for text in pair], 330)
    tokenizer.save(tmp_path / "tokenizer")
    rows = open_rows(prepared(tmp_path, pairs, tmp_path / "tokenizer"))
    assert rows.bytes_are_exact and rows.corpus.num_tokens < 0.95 * rows.corpus.num_bytes
    expected = [len(target.encode()) for _, target in of_split(rows, pairs)]
    assert [rows.num_bytes(i) for i in range(len(rows))] == expected and 0 in expected
    assert sum(expected) < 0.7 * rows.corpus.num_bytes


def test_bytes_by_the_mean_where_tokens_do_not_say(tmp_path, pairs):
    definition, special = load_tokenizer("bytes").__reduce__()[1]
    lowercasing = Tokenizer({**definition, "normalizer": {"type": "Lowercase"}}, special)
    lowercasing.save(tmp_path / "tokenizer")
    rows = open_rows(prepared(tmp_path, pairs, tmp_path / "tokenizer"))
    assert not rows.bytes_are_exact
    targets = [len(ids) for ids in lowercasing.encode_batch([target for _, target in of_split(rows, pairs)])]
    mean = rows.corpus.num_bytes / rows.corpus.num_tokens
    assert [rows.num_bytes(i) for i in range(len(rows))] == pytest.approx([n * mean for n in targets])


# --- batches ---


def loader(rows: Rows, rank: int = 0, size: int = 1, *, micro: int = 2, **options) -> Loader:
    order = ShuffledOrder(rows.rows_per_shard, 3, 2)
    return Loader(rows, order, global_batch_size=8, micro_batch_size=micro, data_rank=rank, data_size=size, **options)


def together(loaders: list[Loader], num_steps: int) -> list[Batch]:
    """The global batches that the ranks get together."""
    iterators = [iter(one) for one in loaders]
    steps = [[batch for iterator in iterators for batch in next(iterator)] for _ in range(num_steps)]
    names = ("tokens", "loss_mask", "ordinals", "condition")
    return [Batch(*(torch.cat([getattr(batch, name) for batch in step]) for name in names)) for step in steps]


def same(found: list[Batch], expected: list[Batch]) -> bool:
    return len(found) == len(expected) and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(found, expected, strict=True)
        for name in ("tokens", "loss_mask", "ordinals", "condition")
    )


def test_batches_follow_the_order_and_hold_each_pair_once_an_epoch(corpus):
    rows = open_rows(corpus)
    num_steps = 2 * len(rows) // 8 - 1
    batches = together([loader(rows)], num_steps)
    order = ShuffledOrder(rows.rows_per_shard, 3, 2)
    tokens = torch.cat([batch.tokens for batch in batches]).tolist()
    assert tokens == [rows[order[k]].tolist() for k in range(8 * num_steps)]
    assert sorted(tokens[: len(rows)]) == sorted(all_rows(rows))
    assert torch.cat([batch.ordinals for batch in batches]).tolist() == list(range(8 * num_steps))
    for batch in batches:
        assert torch.equal(batch.loss_mask, ~batch.condition) and batch.loss_mask.any(1).all()
        np.testing.assert_array_equal(batch.condition.numpy(), rows.condition(batch.tokens.numpy()))


@pytest.mark.parametrize(("size", "micro", "workers"), [(1, 8, 0), (2, 2, 0), (4, 1, 0), (2, 4, 1), (1, 4, 2)])
def test_batches_are_the_same_whatever_the_layout(corpus, size, micro, workers):
    rows = open_rows(corpus)
    found = together([loader(rows, rank, size, micro=micro, workers=workers) for rank in range(size)], 6)
    assert same(found, together([loader(rows)], 6))


def test_resuming_at_another_layout(corpus):
    rows = open_rows(corpus)
    first = [loader(rows, rank, 2) for rank in range(2)]
    pieces = together(first, 3)
    again = loader(open_rows(corpus))
    again.load_state_dict(json.loads(json.dumps(first[1].state_dict())))
    assert same(pieces + together([again], 4), together([loader(rows)], 7))


def test_pairs_in_damaged_shards_are_left_out(tmp_path, pairs):
    folder = prepared(tmp_path, pairs)
    whole = all_rows(open_rows(folder, length=60, oversized="skip"))
    names = TokenCorpus.open(folder, "train").shard_names
    damage(folder / "train" / names[3], "flipped")
    rows = open_rows(folder, length=60, oversized="skip", damaged="skip", ledger=tmp_path / "ledger")
    left_out = [i for i in range(len(rows)) if rows.is_left_out(i)]
    lost = range(*rows.corpus.shard_starts[3:5])
    starts = rows.corpus.pair_starts[:].tolist()
    spans = [(a, b) for a, b in zip(starts, starts[1:], strict=False) if b - a <= 59]
    assert left_out == [i for i, span in enumerate(spans) if set(range(*span)) & set(lost)] and len(left_out) > 5
    assert rows.num_oversized == len(starts) - 1 - len(spans) > 0
    [entry] = [json.loads(line) for line in (tmp_path / "ledger").read_text().splitlines()]
    assert list(range(*entry["rows"])) == left_out and entry["packing"] == "pairs"
    for position in range(starts[-1] + 1):
        assert rows._cuts.begun(position) == sum(start < position for start, _ in spans)
        assert rows._cuts.ended(position) == sum(stop <= position for _, stop in spans)
    for i in set(range(len(rows))) - set(left_out):
        assert rows[i].tolist() == whole[i]
    order = ShuffledOrder(rows.rows_per_shard, 3, 2)
    kept = [row for row in (order[k] for k in range(100)) if row not in left_out]
    tokens = torch.cat([batch.tokens for batch in together([loader(rows, r, 2) for r in range(2)], 5)]).tolist()
    assert tokens == [whole[row] for row in kept[:40]]


# --- files ---


def test_manifest_and_table_of_pairs(corpus, pairs):
    manifest = json.loads((corpus / "manifest.json").read_bytes())
    assert manifest["pairs"] is True and manifest["settings"]["pair_fields"] == list(FIELDS)
    assert sum(manifest["splits"][split]["documents"] for split in SPLITS) == 2 * len(pairs)
    num_bytes = sum(len(text.encode()) for pair in pairs for text in pair)
    assert sum(manifest["splits"][split]["bytes"] for split in SPLITS) == num_bytes
    for split in SPLITS:
        table = np.load(corpus / split / "pairs.npy")
        assert table.dtype == np.int64 and len(table) == manifest["splits"][split]["documents"] // 2 + 1


def test_a_changed_table_is_noticed(tmp_path, pairs):
    folder = prepared(tmp_path, pairs)
    path = folder / "train" / "pairs.npy"
    table = np.load(path)
    table[5] += 1
    np.save(path, table)
    with pytest.raises(InputError, match="pairs.npy is not the one"):
        TokenCorpus.open(folder, "train")
    path.unlink()
    with pytest.raises(InputError, match="pairs.npy"):
        TokenCorpus.open(folder, "train")


def test_pickled_rows_read_the_same(corpus):
    rows = open_rows(corpus, length=30, oversized="skip")
    pickled = pickle.dumps(rows)
    assert rows.corpus.pair_starts[:9].tobytes() not in pickled, "the map of a file is opened again, not copied"
    assert all_rows(pickle.loads(pickled)) == all_rows(rows)


@pytest.mark.parametrize(("workers", "kills"), [(1, 4), (2, 1)])
def test_killed_at_random_moments_and_continued(tmp_path, workers, kills):
    written = random_pairs(4000, seed=5)
    write_pairs(tmp_path / "pairs.jsonl", written)
    options = {"row_tokens": 700, "shard_bytes": 6000, "pair_fields": FIELDS}
    prepare([tmp_path / "pairs.jsonl"], "bytes", tmp_path / "once", progress=False, **options)
    output = tmp_path / "killed"
    inputs = [str(tmp_path / "pairs.jsonl")]
    arguments = {"inputs": inputs, "tokenizer": "bytes", "output": str(output), "workers": workers, **options}
    randomly = random.Random(workers)
    finished = 0
    for number in range(kills):
        child = start(tmp_path, **arguments)
        wanted = finished + randomly.randrange(2, 5) if number else 3
        wait_for(lambda: num_journal_lines(output) >= wanted or child.poll() is not None)  # noqa: B023
        time.sleep(randomly.uniform(0, 0.01))
        child.kill()
        child.communicate(timeout=60)
        assert child.returncode != 0 and not (output / "manifest.json").exists(), "it was finished before"
        finished = num_journal_lines(output)
    out, err = start(tmp_path, **arguments).communicate(timeout=60)
    assert out == "finished\n" and "going on after" in err, err
    assert tree(output) == tree(tmp_path / "once")
    found = [row for split in SPLITS for row in all_rows(open_rows(output, split))]
    assert sorted(found) == sorted(naive_rows(open_rows(output), written))


# --- inputs ---


def documents_of(path: Path, fields: tuple[str, str] = FIELDS) -> list[tuple[str, str, str]]:
    return [(piece.document, piece.group, piece.text) for piece in TextFiles([path], pair_fields=fields).pieces()]


def test_json_lines_and_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    written = [("a", "b"), ("", " "), ("\n", "")]
    parquet.write_table(
        pyarrow.table({"en": [s for s, _ in written], "de": [t for _, t in written]}), tmp_path / "p.parquet"
    )
    write_pairs(tmp_path / "p.jsonl", written, ("en", "de"))
    for name in ("p.jsonl", "p.parquet"):
        expected = [
            (f"{name}#{i}:{side}", f"{name}#{i}", text)
            for i, pair in enumerate(written)
            for side, text in zip(FIELDS, pair, strict=True)
        ]
        assert documents_of(tmp_path / name, ("en", "de")) == expected, "empty and blank ones as well"


def test_what_is_wrong_with_a_file_is_said(tmp_path):
    path = tmp_path / "a.jsonl"

    def message(line: str, fields: tuple[str, str] = FIELDS) -> str:
        path.write_text('{"source": "s", "target": "t"}\n' + line + "\n")
        with pytest.raises(InputError) as caught:
            documents_of(path, fields)
        return str(caught.value)

    missing = message('{"source": "s", "answer": "t"}')
    assert "line 2: there is no field `target`" in missing and "--target-field FIELD" in missing
    assert "fields: source, answer" in missing
    assert "--source-field" in message('{"target": "t"}')
    null = message('{"source": null, "target": "t"}')
    assert "field `source` is not text" in null and "every source must be a string" in null
    assert '{"source": "...", "target": "..."}' in message("[]")
    (tmp_path / "b.txt").write_text("s\tt\n")
    with pytest.raises(InputError, match=r"b.txt holds no pairs(.|\n)*\.jsonl"):
        TextFiles([path, tmp_path / "b.txt"], pair_fields=FIELDS)


def test_one_pair_cannot_be_split(tmp_path):
    with pytest.raises(InputError, match="none can be set apart for validation"):
        prepared(tmp_path, [("a", "b")])


# --- the command ---


def test_command(tmp_path, run_braid):
    write_pairs(tmp_path / "puzzles.jsonl", [(f"{i:03d}", f"{999 - i}") for i in range(200)], ("puzzle", "solution"))
    words = ("prepare", "--pairs", "--input", "puzzles.jsonl", "--tokenizer", "bytes", "--output", "out")
    done = run_braid(*words, "--source-field", "puzzle", "--target-field", "solution")
    assert done.returncode == 0, done.stderr
    rows = open_rows(tmp_path / "out", length=9)
    assert f"{len(rows)} pairs" in done.stdout and "data.path=out data.packing=pairs" in done.stdout
    digits = bytes(rows[0][1:4].tolist()).decode()
    assert digits.isdecimal() and bytes(rows[0][5:8].tolist()).decode() == str(999 - int(digits)), "a digit is a token"
    again = run_braid(*words)
    assert again.returncode == 2 and "pair_fields was ['puzzle', 'solution'], now ['source', 'target']" in again.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--source-field", "s"), "go with --pairs"),
        (("--pairs", "--text-field", "t"), "--pairs has neither text field nor separator"),
        (("--pairs", "--separator", "x"), "--pairs has neither text field nor separator"),
        (("--pairs", "--embedded"), "nor pairs"),
    ],
)
def test_command_says_what_is_wrong(tmp_path, words, said, monkeypatch, capsys):
    from braid.launch.cli import main

    monkeypatch.chdir(tmp_path)
    inputs = () if "--embedded" in words else ("--input", "a.jsonl", "--tokenizer", "bytes")
    assert main(["prepare", "--output", "out", *inputs, *words]) == 2
    assert said in capsys.readouterr().err
