"""Real runs on two sources: killed and resumed bit for bit, on other ranks, and with other weights."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from small_corpus import build, texts
from training_fixtures import ROWS
from training_runs import Trainers, assert_refused, assert_same_run, last_checkpoint, samples

from braid.pretrain.telemetry.metrics_log import read_metrics

OTHER_ROWS = 33
STEPS = {"training__steps": 24, "training__log_every": 4, "training__validate_every": 8}


@pytest.fixture(scope="module")
def mixture(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The corpus and a smaller one, as fields of a run: even shares, then three to one."""
    other = tmp_path_factory.mktemp("other")
    text = "".join(texts(60, 60, seed=7)).encode()[: 14 * OTHER_ROWS].decode(errors="ignore")
    build(other, [text], shard_bytes=1 << 9)
    build(other, texts(9, 60, seed=8), split="validation")
    return {
        "data__sources": f"{{main: {corpus}, other: {other}}}",
        "data__weights": "{main: 1, other: 1}",
        "data__stages": "[{from_sample: 100, weights: {main: 3, other: 1}}]",
    }


def train_lines(run_dir: Path) -> list[dict]:
    return [record for record in read_metrics(run_dir / "metrics.jsonl") if record["split"] == "train"]


def test_killed_and_resumed_bit_for_bit(trainers: Trainers, tmp_path: Path, mixture: dict[str, object]) -> None:
    """Killed in a save before and another after the change of weights, which comes in the middle of a batch."""
    trainers.train("tiny_mdlm", "straight", **STEPS, **mixture)
    for stop in (8, 15):
        fault = {"BRAID_FAULT": "save:after_rename:kill@1"}
        options = STEPS | mixture | {"checkpoint__every": stop, "data__workers": stop % 2}
        trainers.train("tiny_mdlm", "pieces", env=fault, code=-signal.SIGKILL, **options)
    done = trainers.train("tiny_mdlm", "pieces", **STEPS, **mixture)
    assert "resumed from step 15" in done.out and "a new stage begins" not in done.out
    assert "from sample 100: main 75 %, other 25 %" in done.out
    assert_same_run(tmp_path / "pieces", tmp_path / "straight")
    lines = train_lines(tmp_path / "straight")
    for line in lines:
        sources = line["sources"]
        assert sum(source["tokens_seen"] for source in sources.values()) == line["tokens_seen"]
        assert line["unique_tokens"] + line["repeated_tokens"] == line["tokens_seen"]
        for name, num_rows in (("main", ROWS), ("other", OTHER_ROWS)):
            seen = sources[name]["tokens_seen"] // 16
            assert sources[name]["unique_tokens"] == 16 * min(seen, num_rows)
            assert sources[name]["epoch"] == pytest.approx(seen / num_rows)
    assert [line["sources"]["main"]["weight"] for line in lines] == [0.5] * 3 + [0.75] * 3
    assert lines[-1]["sources"]["other"]["repeated_tokens"] > 0, "it should have been gone through"
    assert last_checkpoint(tmp_path / "straight").state["loader"]["stages"] == [
        {"first": 0, "shares": {"main": 1, "other": 1}},
        {"first": 100, "shares": {"main": 3, "other": 1}},
    ]


def test_resumed_on_other_ranks_and_then_with_other_weights(
    trainers: Trainers, tmp_path: Path, mixture: dict[str, object]
) -> None:
    """Two ranks go on with one rank's samples over the change of weights. Other weights begin a stage, recorded."""
    options = STEPS | mixture | {"recorded": True}
    trainers.train("tiny_mdlm", "straight", **options)
    trainers.train("tiny_mdlm", "pieces", **options | {"training__steps": 10, "data__stages": "[]"})
    trainers.train("tiny_mdlm", "pieces", ranks=2, **options)
    assert samples(tmp_path / "pieces") == samples(tmp_path / "straight")
    assert len(samples(tmp_path / "straight")) == 24

    longer = options | {"training__steps": 30, "data__weights": "{main: 1, other: 0}", "data__stages": "[]"}
    done = trainers.train("tiny_mdlm", "pieces", **longer)
    assert "the sources have other weights than so far: a new stage begins at sample 192" in done.out
    assert "data.weights: {'main': 1.0, 'other': 1.0} -> {'main': 1.0, 'other': 0.0}" in done.out
    before, after = (line["sources"]["other"] for line in train_lines(tmp_path / "pieces")[-3::2])
    assert after["weight"] == 0 and after["tokens_seen"] == before["tokens_seen"]
    stages = last_checkpoint(tmp_path / "pieces").state["loader"]["stages"]
    assert [stage["first"] for stage in stages] == [0, 100, 192] and stages[-1]["shares"] == {"main": 1}
    gone = json.dumps({"main": mixture["data__sources"].split(",")[0].removeprefix("{main: ")})
    refused = trainers.start("tiny_mdlm", "pieces", **longer | {"data__sources": gone, "data__weights": "{main: 1}"})
    assert_refused(refused, 2, "the source other is gone", "weight 0")


def test_validation_and_evaluation_of_a_mixture(trainers: Trainers, tmp_path: Path, mixture: dict[str, object]) -> None:
    """The whole is the sum of its sources by their shares; each is there by itself."""
    trainers.train("tiny_mdlm", "run", **STEPS | mixture | {"training__steps": 16, "training__validate_every": 5})
    validated = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["split"] == "validation"]
    assert [line["step"] for line in validated] == [5, 10, 15, 16]
    for line, share in zip(validated, (0.5, 0.5, 0.75, 0.75), strict=True):
        parts = [line["sources"][name] for name in ("main", "other")]
        for value in ("loss", "standard_error"):
            assert all(part[value] > 0 for part in parts)
        assert line["loss"] == pytest.approx(share * parts[0]["loss"] + (1 - share) * parts[1]["loss"])
        variance = (share * parts[0]["standard_error"]) ** 2 + ((1 - share) * parts[1]["standard_error"]) ** 2
        assert line["standard_error"] == pytest.approx(variance**0.5)
    done = trainers.braid("evaluate", "run", "--draws", 1, "--device", "cpu")
    assert done.code == 0, done.err
    assert "mixture of main 75 %, other 25 %, validation split" in done.out
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    values = [corpus["figures"][0]["value"] for corpus in found["corpora"]]
    assert found["figures"][0]["value"] == pytest.approx(0.75 * values[0] + 0.25 * values[1])
    assert found["num_sequences"] == sum(corpus["num_sequences"] for corpus in found["corpora"])
    report = trainers.braid("report", "run")
    assert report.code == 0, report.err
