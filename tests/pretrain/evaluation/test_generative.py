"""Where a text begins and ends, what a file of samples may hold, and that no number comes from another text."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.packing import Rows
from braid.data_pipeline.tokenizers import load_tokenizer
from braid.kernels.errors import ConfigError, InputError
from braid.pretrain.evaluation import divergence as divergence_module
from braid.pretrain.evaluation.divergence import divergence
from braid.pretrain.evaluation.generative import Reference, corpus_texts, measure, read_samples, texts_of_rows
from braid.pretrain.evaluation.judge import Judged

from .test_bound import FixedRows

sys.path.append(str(Path(__file__).parents[2] / "data_pipeline"))

from small_corpus import build as build_corpus  # noqa: E402

TOKENIZER = load_tokenizer("bytes")
END = TOKENIZER.eos_id


def row(*parts):
    return np.array([i for part in parts for i in (part.encode() if isinstance(part, str) else [part])])


def test_a_text_is_cut_at_the_first_eos():
    rows = [
        row(END, "one", END, "two", END),
        row("one", END, "two", END),
        row("whole row"),
        row(END, END, "rest"),
        row(END, "framed row", END),
    ]
    texts = texts_of_rows(rows, TOKENIZER, wrapped=False)
    assert texts.texts == ["one", "one", "whole row", "", "framed row"]
    assert texts.ended == [True, True, False, True, True]
    assert [list(a) for a in texts.tokens] == [list(a) for a in rows], "the whole rows, for the model's own measures"
    wrapped = texts_of_rows(rows, TOKENIZER, wrapped=True)
    assert wrapped.texts == texts.texts
    assert wrapped.ended == [True, True, False, True, False], "the last EOS of a wrapped row closes the row, not a text"


def test_corpus_texts_share_no_row():
    rows = FixedRows(11)
    rows.tokens = np.array([list(f"{n:02d}".encode()) for n in range(11)])
    rows.packing = "stream"
    reference, control, counts = corpus_texts(rows, 3, TOKENIZER)
    assert reference.texts == ["00", "03", "07"] and control.texts == ["01", "05", "09"]
    left = np.bincount(np.delete(rows.tokens, [1, 5, 9], 0).ravel(), minlength=TOKENIZER.vocab_size)
    assert counts.tolist() == left.tolist()
    few = corpus_texts(rows, 100, TOKENIZER)
    assert len(few[0].texts) == 6 and len(few[1].texts) == 5 and not set(few[0].texts) & set(few[1].texts)
    rows.tokens = rows.tokens[:1]
    rows.sequence_length = 2
    with pytest.raises(ConfigError, match="at least two rows"):
        corpus_texts(rows, 3, TOKENIZER)


def test_texts_of_padded_rows(tmp_path):
    """Padding is no part of a row, nor of what is counted."""
    documents = [f"text {n}" * (1 + n % 3) for n in range(12)]
    build_corpus(tmp_path, documents)
    rows = Rows(TokenCorpus.open(tmp_path, "train"), 30, "document")
    reference, control, counts = corpus_texts(rows, 6, TOKENIZER)
    assert reference.texts == documents[0::2] and control.texts == documents[1::2]
    assert reference.ended == [True] * 6 and [len(row) for row in control.tokens] == [
        len(text) + 2 for text in documents[1::2]
    ]
    wanted = np.bincount(np.concatenate(reference.tokens), minlength=TOKENIZER.vocab_size)
    assert counts.tolist() == wanted.tolist()


def test_samples_of_a_file(tmp_path):
    file = tmp_path / "samples.jsonl"
    drawn = {"text": "onetwo", "tokens": [*b"one", END, *b"two"], "network_calls": 8, "sampler": {"steps": 9}}
    bare = {"text": "only text"}
    file.write_text("\n".join(map(json.dumps, [drawn, bare])) + "\n\n")
    texts = read_samples(file, TOKENIZER, wrapped=False)
    assert texts.texts == ["one", "only text"] and texts.ended == [True, False]
    assert texts.tokens[0].tolist() == drawn["tokens"] and texts.tokens[1].tolist() == list(b"only text")
    assert texts.network_calls is None and texts.sampler is None, "not known of all"
    file.write_text("\n".join(map(json.dumps, [drawn, {**drawn, "network_calls": 5}])))
    texts = read_samples(file, TOKENIZER, wrapped=False)
    assert texts.network_calls == 6.5 and texts.sampler == {"steps": 9}
    file.write_text("\n".join(map(json.dumps, [drawn, {**drawn, "sampler": {"steps": 9, "guidance": 2}}])))
    assert read_samples(file, TOKENIZER, wrapped=False).sampler is None, "made in two ways"


@pytest.mark.parametrize(
    "content, says",
    [
        ('{"text": "a"}\nnot json', "line 2: not a JSON object with a text"),
        ('["text"]', "line 1"),
        ('{"text": 5}', "line 1"),
        ('{"text": "ab", "tokens": [97, 99]}', "are not those of the text"),
        ('{"text": "a", "tokens": [97, 100000]}', "are not those of the text"),
        ('{"text": "", "tokens": []}', "are not those of the text"),
        ('{"text": "a", "tokens": ["a"]}', "are not those of the text"),
        ("\n", "no samples"),
    ],
)
def test_files_that_are_no_samples(tmp_path, content, says):
    (tmp_path / "samples.jsonl").write_text(content)
    with pytest.raises(InputError, match=says):
        read_samples(tmp_path / "samples.jsonl", TOKENIZER, wrapped=False)
    with pytest.raises(InputError, match="cannot read"):
        read_samples(tmp_path / "none.jsonl", TOKENIZER, wrapped=False)


def test_every_measure_is_of_the_text_it_says(monkeypatch):
    monkeypatch.setattr(divergence_module, "MIN_TEXTS", 1)
    texts = texts_of_rows([row("aab", END, "c"), row("abcd"), row(END, END)], TOKENIZER, wrapped=False,
                          network_calls=3.5, sampler={"steps": 4, "guidance": 2.0})  # fmt: skip
    generator = np.random.default_rng(0)
    features = generator.normal(size=(2, 3)).astype(np.float32)
    judged = Judged(
        np.array([8.0, 13.0, 0.0]), np.array([4, 3, 0]), [[1, 1, 2], [1, 2, 3, 1, 2, 3, 1], []], features, 1
    )
    reference = Reference(generator.normal(size=(4, 3)), np.arange(TOKENIZER.vocab_size))
    result = measure(texts, judged, reference)
    assert result["num"] == 3 and result["num_empty"] == 1 and result["num_truncated"] == 1
    assert result["steps"] == 4 and result["sampler"] == texts.sampler and result["network_calls"] == 3.5
    assert result["num_tokens"] == 7 and result["nats_per_token"] == pytest.approx(3)
    assert result["perplexity"] == pytest.approx(math.exp(21 / 7)), "of the sums, not a mean of the texts' own"
    assert result["standard_error"] == pytest.approx(math.sqrt(2 * (4**2 + 4**2)) / 7)
    # whole rows, specials included: {a 2, b, END, c}, {a, b, c, d}, {END 2}
    own = [-(0.4 * math.log(0.4) + 0.6 * math.log(0.2)), math.log(4), 0.0]
    assert result["entropy"] == pytest.approx(np.mean(own))
    assert result["entropy_standard_error"] == pytest.approx(np.std(own, ddof=1) / math.sqrt(3))
    judges = [
        -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)),
        -(3 / 7 * math.log(3 / 7) + 4 / 7 * math.log(2 / 7)),
    ]
    assert result["judge_entropy"] == pytest.approx(np.mean(judges)), "the empty text has none"
    assert result["distinct_1"] == pytest.approx(3 / 10) and result["distinct_2"] == pytest.approx(4 / 8)
    assert result["repetition_4"] == pytest.approx(1 / 4)
    counts = np.bincount(np.concatenate(texts.tokens), minlength=TOKENIZER.vocab_size)
    p, q = ((c + 0.5) / (c + 0.5).sum() for c in (reference.token_counts, counts))
    assert result["frequency_kl"] == pytest.approx((p * np.log(p / q)).sum())
    assert result["divergence"] == divergence(reference.features, features)
    json.dumps(result)


def test_nothing_but_empty_texts():
    texts = texts_of_rows([row(END), row(END, END)], TOKENIZER, wrapped=False)
    judged = Judged(np.zeros(2), np.zeros(2, int), [[], []], np.zeros((0, 0), np.float32), 0)
    result = measure(texts, judged, Reference(np.ones((4, 3)), np.ones(TOKENIZER.vocab_size, int)))
    assert result["num_empty"] == 2
    missing = ["perplexity", "nats_per_token", "judge_entropy", "distinct_1", "repetition_4", "divergence"]
    assert [result[name] for name in missing] == [None] * 6
    json.dumps(result, allow_nan=False)
