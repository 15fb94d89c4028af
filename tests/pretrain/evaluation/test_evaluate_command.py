"""`braid evaluate` on small trained models: what it writes and prints, what it refuses, and that its parts agree."""

import argparse
import json
import os
import subprocess
import sys

import pytest
import torch

from braid.kernels.errors import BraidError
from braid.pretrain.evaluation import command, divergence

TEXT = "\n".join(
    f"The {colour} {animal} number {n} says hello to {n + 1} friends of the {animal}."
    for n, (colour, animal) in enumerate((c, a) for c in ("red", "blue", "green") for a in ("fox", "owl", "old cat"))
)
ENTRY = {
    "name", "steps", "sampler", "network_calls", "num", "num_empty", "num_truncated", "num_tokens", "nats_per_token",
    "standard_error", "perplexity", "entropy", "entropy_standard_error", "judge_entropy",
    "judge_entropy_standard_error", "distinct_1", "distinct_2", "distinct_3", "repetition_4", "frequency_kl",
    "divergence",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two corpora of one tokenizer and one of another; an AR, a masked and a pairs model of two steps each."""
    folder = tmp_path_factory.mktemp("evaluate")

    def braid(*words):
        done = subprocess.run(
            [sys.executable, "-m", "braid.launch.cli", *map(str, words)],
            cwd=folder, env=os.environ, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr + done.stdout

    (folder / "text.txt").write_text(TEXT * 20)
    (folder / "other.txt").write_text("A quite different text with numbers 1 2 3 4 5 6 7 8 9.\n" * 30)
    pairs = [{"source": f"{n} + {n + 1} =", "target": str(2 * n + 1)} for n in range(60)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    braid("prepare", "--input", "text.txt", "--tokenizer", "train:300", "--output", "corpus",
          "--validation-fraction", 0.4)  # fmt: skip
    braid("prepare", "--input", "other.txt", "--tokenizer", "corpus/tokenizer", "--output", "other")
    braid("prepare", "--input", "pairs.jsonl", "--tokenizer", "bytes", "--pairs", "--output", "pairs")
    common = ("training.steps=2", "training.ema_decay=0", "optimizer.warmup_steps=0")
    for name, corpus, packing in (("ar", "corpus", "wrap"), ("mdlm", "corpus", "wrap"), ("pairs", "pairs", "pairs")):
        recipe = "tiny_mdlm" if name == "pairs" else f"tiny_{name}"
        braid("pretrain", recipe, f"data.path={corpus}", f"data.packing={packing}", f"run.dir={name}", *common)
    return folder


@pytest.fixture
def evaluate(folder, monkeypatch, capsys):
    """`evaluate("mdlm", "--metrics", "bound")` in this process; returns the written JSON and what was printed."""
    monkeypatch.chdir(folder)
    deterministic = torch.are_deterministic_algorithms_enabled()

    def run(*words):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        result = folder / "result.json"
        args = parser.parse_args([*map(str, words), "--device", "cpu", "--json", str(result)])
        assert command.main(args) == 0
        return json.loads(result.read_text()), capsys.readouterr().out

    yield run
    torch.use_deterministic_algorithms(deterministic)


def test_generative_perplexity_never_comes_alone(evaluate, monkeypatch):
    monkeypatch.setattr(divergence, "MIN_TEXTS", 5)
    metrics = ("--metrics", "bound,entropy,generative", "--judge", "ar", "--sample-steps", "2,4")
    result, printed = evaluate("mdlm", *metrics, "--samples", 7, "--sequences", 5, "--batch-size", 3)
    assert result["judge"] == {"path": "ar", "kind": "braid", "precision": "fp32", "max_length": 32}
    data, two, four = result["generative"]
    assert [entry["name"] for entry in (data, two, four)] == ["data", "samples, 2 steps", "samples, 4 steps"]
    for entry in (data, two, four):
        assert entry.keys() == ENTRY
        assert entry["num"] == 7 and entry["perplexity"] > 1 and entry["entropy"] > 0 and entry["judge_entropy"] > 0
        assert 0 < entry["distinct_1"] <= entry["distinct_2"] <= entry["distinct_3"] <= 1
        assert 0 < entry["divergence"] <= 1 and entry["frequency_kl"] > 0 and 0 <= entry["repetition_4"] < 1
        for shown in ("entropy", "judge_entropy", "distinct_2", "repetition_4", "frequency_kl", "divergence"):
            assert f"{entry[shown]:.3f}" in printed, shown
        assert f" {entry['perplexity']:.2f}+-" in printed
    assert data["steps"] is None and data["network_calls"] is None
    assert two["steps"] == 2 and 1 < two["network_calls"] <= 2 and four["steps"] == 4 and 2 < four["network_calls"] <= 4
    made = {"sampler": "ancestral", "temperature": 1.0, "top_p": 1.0, "greedy_final": False, "precision": "fp32"}
    assert data["sampler"] is None and two["sampler"] == made | {"steps": 2} and four["sampler"] == made | {"steps": 4}
    assert result["samples"]["sampler"] == two["sampler"]
    way = "sampler ancestral, temperature 1.0, top_p 1.0, greedy_final False, precision fp32"
    assert f"samples, 2 steps; samples, 4 steps: {way}" in printed
    assert data["frequency_kl"] < two["frequency_kl"], "an untrained model's tokens are not the corpus's"
    assert result["samples"]["num"] == 7 and result["samples"]["entropy"] == pytest.approx(two["entropy"])
    assert result["samples"]["network_calls"] == two["network_calls"]
    assert len(result["figures"]) == 2 and result["num_tokens"] == 5 * 32


def test_samples_of_a_file_are_judged_like_those_drawn(evaluate, folder):
    """And the batch size changes nothing."""
    from braid.pretrain.sampling import command as sampling

    parser = argparse.ArgumentParser()
    sampling.add_arguments(parser)
    sampling.main(
        parser.parse_args(["mdlm", "--num", "7", "--steps", "3", "--output", "drawn.jsonl", "--device", "cpu"])
    )
    common = ("mdlm", "--metrics", "generative", "--judge", "ar", "--samples", 7, "--samples-file", "drawn.jsonl")
    result, _ = evaluate(*common, "--sample-steps", 3, "--batch-size", 4)
    data, file, drawn = result["generative"]
    assert file.pop("name") == "drawn.jsonl" and drawn.pop("name") == "samples, 3 steps"
    assert file == drawn and file["steps"] == 3
    assert result["figures"] == [] and "samples" not in result

    (folder / "bare.jsonl").write_text('{"text": "The red fox"}\n{"text": ""}\n')
    result, printed = evaluate(*common, "--samples-file", "bare.jsonl", "--judge-length", 6)
    assert [entry["name"] for entry in result["generative"]] == ["data", "drawn.jsonl", "bare.jsonl"]
    bare = result["generative"][2]
    assert bare["num"] == 2 and bare["num_empty"] == 1 and bare["network_calls"] is None
    assert result["judge"]["max_length"] == 6 and result["generative"][0]["num_truncated"] == 7
    assert "cut: longer than 6 tokens" in printed


def test_a_hugging_face_folder_judges(evaluate, folder):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "corpus" / "tokenizer" / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder / "gpt2")
    end = tokenizer.eos_token_id
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2, eos_token_id=end, bos_token_id=end
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    result, _ = evaluate("ar", "--metrics", "generative", "--judge", "gpt2", "--samples", 4)
    assert result["judge"] == {"path": "gpt2", "kind": "huggingface", "precision": "fp32", "max_length": 64}
    data, drawn = result["generative"]
    assert drawn["name"] == "samples" and drawn["steps"] is None and drawn["network_calls"] == 32
    assert data["perplexity"] == pytest.approx(len(tokenizer), rel=0.2), "an untrained judge knows nothing"


def test_several_corpora(evaluate):
    both, printed = evaluate("ar", "--data", "corpus", "--data", "other")
    assert [corpus["data"] for corpus in both["corpora"]] == ["corpus", "other"]
    alone, _ = evaluate("ar", "--data", "other")
    assert both["corpora"][1] == alone["corpora"][0]
    own, _ = evaluate("ar")
    assert own["figures"] == both["corpora"][0]["figures"] == both["figures"] != alone["figures"]
    assert own["unigram_entropy"] == both["unigram_entropy"] and own["num_tokens"] == both["num_tokens"]
    assert "corpus, validation split" in printed and "other, validation split" in printed


def test_answers_to_the_sources_of_pairs(evaluate):
    result, printed = evaluate("pairs", "--metrics", "bound,conditional", "--sample-steps", "2,6", "--samples", 3,
                               "--split", "train")  # fmt: skip
    assert [entry["steps"] for entry in result["conditional"]] == [2, 6]
    for entry in result["conditional"]:
        assert entry["num"] == 3 and 0 < entry["network_calls"] <= entry["steps"]
        for name in ("bleu", "bleu_cased", "rouge_1", "rouge_2", "rouge_l", "exact_match", "token_accuracy"):
            assert 0 <= entry[name] <= 100
        assert entry["bleu_signature"] in printed
        assert entry["sampler"]["sampler"] == "ancestral" and entry["sampler"]["steps"] == entry["steps"]
    assert "2 steps; 6 steps: sampler ancestral, temperature 1.0" in printed
    again, _ = evaluate("pairs", "--metrics", "conditional", "--sample-steps", 2, "--samples", 3, "--split", "train",
                        "--batch-size", 1)  # fmt: skip
    assert again["conditional"] == result["conditional"][:1]
    assert result["num_tokens"] < result["num_sequences"] * 32, "sources are given, not scored"


def test_only_a_bound_replaces_the_runs_own_evaluation(evaluate, folder, monkeypatch):
    own = folder / "ar" / "evaluation.json"
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.main(parser.parse_args(["ar", "--sequences", "2"]))
    before = own.read_bytes()
    assert json.loads(before)["figures"]
    command.main(parser.parse_args(["ar", "--metrics", "entropy", "--samples", "2"]))
    assert own.read_bytes() == before


@pytest.mark.parametrize(
    "words, says",
    [
        (["mdlm", "--metrics", "entropy", "--draws", "7"], "--draws would be ignored"),
        (["mdlm", "--metrics", "entropy", "--sequences", "7"], "--sequences would be ignored"),
        (["mdlm", "--metrics", "bound", "--samples", "99"], "--samples would be ignored"),
        (["mdlm", "--judge", "ar"], "--judge would be ignored"),
        (["mdlm", "--samples-file", "x"], "--samples-file would be ignored"),
        (["mdlm", "--sample-steps", "3"], "--sample-steps would be ignored"),
        (["mdlm", "--metrics", "generative"], "need a judge"),
        (["mdlm", "--metrics", "generative", "--judge", "mdlm"], "must be an autoregressive model"),
        (["mdlm", "--metrics", "generative", "--judge", "corpus/tokenizer"], "the judge cannot be loaded"),
        (["mdlm", "--metrics", "generative", "--judge", "ar", "--judge-length", "33"], "between 2 and 32"),
        (["mdlm", "--metrics", "entropy", "--sample-steps", "2,none"], "whole numbers"),
        (["mdlm", "--metrics", "entropy", "--sample-steps", "0"], "whole numbers"),
        (["mdlm", "--metrics", "entropy", "--sample-steps", "2,4"], "entropy is of one number of steps"),
        (["ar", "--metrics", "entropy", "--sample-steps", "3"], "--sample-steps would be ignored: an AR model"),
        (["mdlm", "--metrics", "conditional"], "need .source, target. pairs"),
        (["pairs", "--metrics", "entropy"], "writes answers, not texts"),
        (["mdlm", "--data", "corpus", "--data", "pairs"], "the corpus pairs was tokenised with another tokenizer"),
    ],
)
def test_mistakes_are_explained(evaluate, words, says):
    with pytest.raises(BraidError, match=says):
        evaluate(*words)


def test_a_later_look_keeps_what_it_did_not_ask_for(folder, monkeypatch, capsys):
    """evaluation.json of the same weights: the entropy stays when only the bound is scored again."""
    monkeypatch.chdir(folder)

    def run(*words):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        deterministic = torch.are_deterministic_algorithms_enabled()
        assert command.main(parser.parse_args(["mdlm", "--device", "cpu", "--sequences", "3", *words])) == 0
        torch.use_deterministic_algorithms(deterministic)
        return json.loads((folder / "mdlm" / "evaluation.json").read_text())

    first = run("--metrics", "bound,entropy", "--samples", "3")
    second = run("--seed", "1")
    assert second["samples"] == first["samples"] and second["figures"] != first["figures"]
    file = folder / "mdlm" / "evaluation.json"
    file.write_text(json.dumps(second | {"checkpoint_step": second["checkpoint_step"] + 1}))
    assert "samples" not in run(), "other weights: nothing of it holds"
