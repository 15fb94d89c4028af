"""What users ask of `braid sample` that it cannot do: refused by name, nothing written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from training_runs import Trainers, assert_refused

INFILLS = {
    "number": b'{"text": "ab"}\n{"text": 5}\n',
    "latin": '{"text": "caf\u00e9"}\n'.encode("latin-1"),
    "half": b'{"text": "\\ud83d"}\n',
    "gap": b'{"text": "a[[2]]b"}\n',
}


def refuse(trainers: Trainers, mistakes: list[tuple[list, list[str]]]) -> None:
    for name, content in INFILLS.items():
        (trainers.folder / f"{name}.jsonl").write_bytes(content)
    for words, said in mistakes:
        done = trainers.braid("sample", "run", *words, "--device", "cpu", "--output", "samples.jsonl")
        assert_refused(done, 2, *map(re.escape, said), "change: ")
        assert not (trainers.folder / "samples.jsonl").exists()


def test_of_a_joint_model(trainers: Trainers, tmp_path: Path) -> None:
    trainers.train("tiny_ccdd", "run", training__steps=6)
    refuse(trainers, [
        (["--seed", -1], ["--seed must be a key of 64 bits", "-1"]),
        (["--seed", 2**64], ["--seed must be a key of 64 bits", "from 0 to 18446744073709551615"]),
        (["--guidance", -3], ["--guidance = -3.0 must be at least 0"]),
        (["--guidance", "nan", "--temperature", "inf"], ["2 problems", "--guidance = nan", "--temperature = inf"]),
        (["--infill", "number.jsonl"], ["number.jsonl, line 2: not a JSON object with a text", '{"text": 5}']),
        (["--infill", "latin.jsonl"], ["latin.jsonl is not UTF-8 text", "save it in UTF-8"]),
        (["--infill", "half.jsonl"], ["the prompt is not UTF-8 text", "ud83d"]),
    ])  # fmt: skip
    (tmp_path / "separator.jsonl").write_bytes('{"text": "a\u2028b[[2]]"}\r\n'.encode())
    words = ["--infill", "separator.jsonl", "--num", 1, "--steps", 2, "--guidance", 1.5, "--sampler", "ddpm"]
    done = trainers.braid("sample", "run", *words, "--device", "cpu", "--output", "samples.jsonl")
    assert done.code == 0, done.err
    [line] = (tmp_path / "samples.jsonl").read_bytes().decode().rstrip("\n").split("\n")
    assert json.loads(line)["text"].startswith("a\u2028b") and json.loads(line)["network_calls"] == 4


def test_of_places_for_the_output(trainers: Trainers, tmp_path: Path) -> None:
    """Said before anything is drawn or scored."""
    trainers.train("tiny_mdlm", "run", training__steps=6)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for place in ("file/samples.jsonl", "folder", "/proc/none/samples.jsonl"):
        drawn = trainers.braid("sample", "run", "--device", "cpu", "--output", place)
        assert_refused(drawn, 2, re.escape(f"{place} cannot be written"), "change: ")
        scored = trainers.braid("evaluate", "run", "--sequences", 2, "--device", "cpu", "--json", place)
        assert_refused(scored, 2, re.escape(f"{place} cannot be written"), "change: ")
        assert "nats" not in scored.out


def test_guidance_of_a_joint_model_that_never_missed_its_latents(trainers: Trainers) -> None:
    trainers.train("tiny_ccdd", "run", training__steps=6, objective__latent_dropout=0)
    refuse(trainers, [(["--guidance", 1.5], ["objective.latent_dropout = 0", "--guidance = 1.5", "--guidance=1"])])


@pytest.mark.parametrize("name", ["ar", "mdlm"])
def test_of_a_model_without_latents(trainers: Trainers, name: str) -> None:
    trainers.train(f"tiny_{name}", "run", training__steps=6)
    ignored = f"is ignored by objective.name = '{name}'"
    only = {"ar": "autoregressive", "mdlm": "ancestral"}[name]
    infills = [
        (["--infill", "gap.jsonl"], ["an AR model cannot infill"]),
    ]
    refuse(trainers, [
        (["--guidance", 1], [f"--guidance = 1.0 {ignored}", "leave out --guidance"]),
        (["--sampler", "ddpm"], ["--sampler = 'ddpm' is not one of", only]),
        *(infills if name == "ar" else []),
    ])  # fmt: skip


def test_of_latents_of_given_texts(trainers: Trainers, tmp_path: Path) -> None:
    """Only for models of latents that are there before the text; what was shown is said beside the samples."""
    trainers.train("tiny_di_ladd", "run", training__steps=6)
    corpus = ["--latents-of", trainers.corpus]
    refuse(trainers, [
        (corpus, ["--latents-of shows latents that are there before the text", "--sampler sequential"]),
        ([*corpus, "--sampler", "sequential", "--latent-steps", 4], ["--latent-steps would be ignored"]),
        (["--latents-of", "nowhere", "--sampler", "sequential"], ["nowhere"]),
    ])  # fmt: skip
    words = [*corpus, "--sampler", "sequential", "--num", 3, "--steps", 4, "--device", "cpu"]
    done = trainers.braid("sample", "run", *words, "--output", "samples.jsonl")
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["sampler"]["latents_of"] for line in lines] == [str(trainers.corpus)] * 3
    assert all(line["network_calls"] <= 4 for line in lines)

    (tmp_path / "samples.jsonl").unlink()
    trainers.train("tiny_mdlm", "other", training__steps=6)
    done = trainers.braid("sample", "other", *corpus, "--device", "cpu", "--output", "samples.jsonl")
    assert_refused(done, 2, "--latents-of is for LADD", "objective.name = 'mdlm'")
