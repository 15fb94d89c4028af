"""BLEU, ROUGE and exact match by hand and by the libraries' own calls; answers are drawn from the sources and cut."""

import json
import math

import numpy as np
import pytest
import torch

from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.packing import Rows
from braid.data_pipeline.prepare import prepare
from braid.kernels.errors import ConfigError
from braid.pretrain.config.schema import SamplingConfig
from braid.pretrain.evaluation import conditional
from braid.pretrain.evaluation.conditional import (
    Answers,
    answer_rows,
    bleu,
    exact_match,
    measure_answers,
    rouge,
    share_and_error,
    token_matches,
)
from braid.pretrain.sampling.sampler import Samples

from .models import byte_model

ANSWERS = ["The cat sat on the mat .", "a completely different thing", "", "Dogs were running"]
REFERENCES = ["the cat is on the mat .", "nothing in common here", "words", "the dog runs"]


def test_bleu_by_hand():
    """7 words against 7: 6, 4, 2, 1 n-grams of 7, 6, 5, 4 are found; geometric mean, no brevity penalty."""
    answer, reference = ["the cat is on a mat now"], ["the cat is on the mat now"]
    precisions = (6 / 7, 4 / 6, 2 / 5, 1 / 4)
    expected = 100 * math.exp(sum(map(math.log, precisions)) / 4)
    assert bleu(answer, reference, lowercase=True)[0] == pytest.approx(expected)
    short = bleu(["the cat is on"], reference, lowercase=True)[0]
    assert short == pytest.approx(100 * math.exp(1 - 7 / 4)), "all found, but 4 words for 7"
    two = bleu(["a b"], ["a b"], lowercase=True)[0]
    assert two == pytest.approx(100), "effective order: a text of two words has no 3-grams to miss"


def test_bleu_is_the_librarys():
    sacrebleu = pytest.importorskip("sacrebleu")
    for lowercase in (True, False):
        score, signature = bleu(ANSWERS, REFERENCES, lowercase=lowercase)
        own = sacrebleu.corpus_bleu(ANSWERS, [REFERENCES], lowercase=lowercase, use_effective_order=True)
        assert score == own.score > 0
        assert f"case:{'lc' if lowercase else 'mixed'}" in signature and "eff:yes" in signature
    assert bleu(ANSWERS, REFERENCES, lowercase=True)[0] > bleu(ANSWERS, REFERENCES, lowercase=False)[0]


def test_rouge_by_hand_and_by_the_library():
    """ "dogs were running" and "the dog runs" share two stems: P = R = 2/3, no bigram, "dog run" in order."""
    scores = rouge(ANSWERS, REFERENCES)
    assert scores["rouge_1"][3] == pytest.approx(100 * 2 / 3)
    assert scores["rouge_2"][3] == 0 and scores["rouge_l"][3] == pytest.approx(100 * 2 / 3)
    assert scores["rouge_1"][1:3].tolist() == [0, 0]
    # the cat sat on the mat / the cat is on the mat: 5 of 6 words, 3 of 5 bigrams, "the cat on the mat" in order
    assert [scores[name][0] for name in ("rouge_1", "rouge_2", "rouge_l")] == pytest.approx([500 / 6, 60, 500 / 6])
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    own = [scorer.score(reference, answer) for answer, reference in zip(ANSWERS, REFERENCES, strict=True)]
    assert scores["rouge_1"].tolist() == [100 * each["rouge1"].fmeasure for each in own]
    assert scores["rouge_l"].tolist() == [100 * each["rougeL"].fmeasure for each in own]


def test_exact_match_and_token_matches():
    answers = [[1, 2, 3], [1, 2], [1, 2, 3, 4], [], [3, 2, 1]]
    references = [[1, 2, 3]] * 5
    assert exact_match(answers, references).tolist() == [True, False, False, False, False]
    assert token_matches(answers, references).tolist() == [3, 2, 3, 0, 1]


def test_the_error_of_a_share():
    """Texts of one length: that of the mean. Of several: the residuals' about one share, over the mean length."""
    share, error = share_and_error([3, 1, 2, 4], [4, 4, 4, 4])
    assert share == pytest.approx(62.5) and error == pytest.approx(100 * np.std([3, 1, 2, 4], ddof=1) / 4 / 2)
    share, error = share_and_error([1, 6], [2, 8])
    assert share == pytest.approx(70) and error == pytest.approx(100 * np.std([1 - 1.4, 6 - 5.6], ddof=1) / 5 / 2**0.5)
    assert share_and_error([1], [2]) == (50, None) and share_and_error([], [])[0] == 0


def test_all_measures_of_some_answers():
    """Two of three right, one token of five in the wrong one; JSON-able."""
    found = Answers([[65, 66], [67], [68, 0, 0, 0, 72, 9]], [[65, 66], [67], [68, 69, 70, 71, 99]], 12.5)
    result = measure_answers(found, lambda ids: " ".join(map(str, ids)))
    assert result["exact_match"] == pytest.approx(200 / 3)
    assert result["exact_match_standard_error"] == pytest.approx(100 * np.std([1, 1, 0], ddof=1) / math.sqrt(3))
    assert result["token_accuracy"] == pytest.approx(100 * 4 / 8)
    assert result["num"] == 3 and result["network_calls"] == 12.5
    assert result["rouge_1"] == pytest.approx((100 + 100 + 100 * 2 / 11) / 3)
    single = measure_answers(Answers([[65]], [[65]], 1.0), lambda ids: "a")
    assert single["exact_match"] == 100 and single["exact_match_standard_error"] is None


PAIRS = [
    ("two", "2"),
    ("seventeen", "17"),
    ("one", "1"),
    ("nothing", ""),
    ("twelve", "12"),
    ("a third", "0.33333333333"),
]


def rows_of_pairs(folder, length):
    """Rows of PAIRS, of which a third is too long for its row; and the pairs in the order of the rows."""
    lines = [json.dumps({"source": source, "target": target}) for source, target in PAIRS]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    fields = ("source", "target")
    prepare(
        [folder / "pairs.jsonl"],
        "bytes",
        folder / "corpus",
        pair_fields=fields,
        validation_fraction=0.1,
        progress=False,
    )
    rows = Rows(TokenCorpus.open(folder / "corpus", "train"), length, "pairs", oversized="cut")
    sources = [rows.corpus.tokenizer.decode(row[given]) for row, given in zip(*tokens_and_given(rows), strict=True)]
    return rows, [(source, target) for source in sources for known, target in PAIRS if known == source]


def tokens_and_given(rows):
    tokens = rows.read(range(len(rows))).astype(np.int64)
    return tokens, rows.condition(tokens)


def test_answers_are_what_follows_the_source_up_to_its_end(monkeypatch, tmp_path):
    """A model that answers every source with "12", EOS and rubbish."""
    model = byte_model("mdlm", packing="pairs", length=20)
    rows, pairs = rows_of_pairs(tmp_path, 20)
    expected, given = (torch.from_numpy(array) for array in tokens_and_given(rows))
    assert len(pairs) == len(rows) and rows.num_oversized == 1

    def answer(asked, settings, prompt, *, key, precision, progress):
        assert asked is model.objective and settings.steps == 7 and key == 3 and precision == "fp32"
        assert torch.equal(prompt.tokens[prompt.known], expected[given]) and torch.equal(prompt.known, given)
        tokens = torch.where(prompt.known, prompt.tokens, ord("r"))
        for row, begin in enumerate(prompt.known.sum(1).tolist()):
            tokens[row, begin : begin + 3] = torch.tensor([ord("1"), ord("2"), model.tokenizer.eos_id])
        return Samples(tokens, [7] * (len(rows) - 1) + [6])

    monkeypatch.setattr(conditional, "draw_in_batches", answer)
    found = answer_rows(model, SamplingConfig(steps=7), rows, len(rows), seed=3)
    decode, targets = model.tokenizer.decode, [target for _, target in pairs]
    assert [decode(ids) for ids in found.references] == targets and "0.33333333333" in targets  # whole, though cut
    assert [decode(ids) for ids in found.answers] == ["12"] * len(rows)
    assert found.network_calls == 7 - 1 / len(rows)
    result = measure_answers(found, decode)
    assert result["exact_match"] == pytest.approx(100 * targets.count("12") / len(rows))
    right = sum(a == b for target in targets for a, b in zip("12", target, strict=False))
    assert result["token_accuracy"] == pytest.approx(100 * right / len("".join(targets)))

    rows.packing = "wrap"
    with pytest.raises(ConfigError, match="pairs"):
        answer_rows(model, SamplingConfig(steps=7), rows, 5, seed=3)
