"""Damaged files: checkpoints, the corpus, the metrics. What can be used is used and said; nothing is overwritten."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from small_corpus import damage
from training_runs import (
    Trainers,
    assert_outcome,
    assert_refused,
    assert_same_run,
    checkpoints,
    last_checkpoint,
    steps_of,
)

OPTIONS = {"training__steps": 16, "checkpoint__every": 4, "training__log_every": 3}


@pytest.fixture
def stopped(trainers: Trainers, tmp_path: Path) -> Path:
    """A run of 16 steps, killed when those of steps 8 and 12 were saved."""
    fault = {"BRAID_FAULT": "save:before_pointer:kill@3"}
    trainers.train("tiny_mdlm", "run", env=fault, code=-signal.SIGKILL, **OPTIONS)
    assert checkpoints(tmp_path / "run") == [4, 8, 12]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("weights.safetensors", "flipped"),
        ("optimizer.safetensors", "truncated"),
        ("ema.safetensors", "missing"),
        ("state.json", "flipped"),
        ("manifest.json", "missing"),
    ],
)
def test_the_previous_checkpoint_is_used_and_the_run_is_the_same(
    trainers: Trainers, tmp_path: Path, stopped: Path, name: str, how: str
) -> None:
    newest = stopped / "checkpoints" / "step-00000012"
    damage(newest / name, how)
    broken = contents(newest)
    done = trainers.train("tiny_mdlm", "run", **OPTIONS)
    assert "checkpoint run/checkpoints/step-00000012 is damaged and was passed over" in done.out and name in done.out
    assert "resumed from step 8 (run/checkpoints/step-00000008)" in done.out
    assert contents(newest.with_name("step-00000012.damaged-1")) == broken, "kept for whoever wants to look"
    trainers.train("tiny_mdlm", "straight", **OPTIONS)
    assert_same_run(stopped, tmp_path / "straight")
    assert checkpoints(stopped) == [12, 16]


def test_without_a_valid_checkpoint_nothing_is_begun_again(trainers: Trainers, tmp_path: Path, stopped: Path) -> None:
    damage(stopped / "checkpoints" / "step-00000008" / "weights.safetensors", "flipped")
    damage(stopped / "checkpoints" / "step-00000012" / "optimizer.safetensors", "truncated")
    before = contents(stopped)
    said = ("none of the checkpoints in run/checkpoints is valid", "steps 8, 12", "move run away or choose another")
    for ranks in (1, 2):
        started = trainers.start_ranks(ranks, "tiny_mdlm", "run", **OPTIONS)
        for process in started:
            assert_refused(process, 2, *said, run_dir=stopped)
        assert "step-00000008 is damaged and was passed over: the content of weights.safetensors" in started[0].out
        assert "step-00000012 is damaged and was passed over: optimizer.safetensors has" in started[0].out
        after = contents(stopped)
        assert after.keys() - before.keys() == {"outcome.json"}
        assert {name for name in before if after[name] != before[name]} <= {".lock"}
        (stopped / "outcome.json").unlink()
    stopped.rename(tmp_path / "aside")  # as the message says
    assert "resumed" not in trainers.train("tiny_mdlm", "run", **OPTIONS).out
    assert_outcome(stopped, 0)


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_a_damaged_checkpoint_is_neither_sampled_nor_evaluated(
    trainers: Trainers, stopped: Path, tmp_path: Path, command: str
) -> None:
    damage(stopped / "checkpoints" / "step-00000008" / "ema.safetensors", "flipped")
    options = ["--num", 1, "--output", "samples.jsonl"] if command == "sample" else ["--draws", 1]
    named = trainers.braid(command, "run/checkpoints/step-00000008", *options, "--device", "cpu")
    assert_refused(named, 2, "step-00000008 cannot be loaded", "the content of ema.safetensors has changed")
    damage(stopped / "checkpoints" / "step-00000012" / "weights.safetensors", "missing")
    newest = trainers.braid(command, "run", *options, "--device", "cpu")
    assert_refused(newest, 2, "no valid checkpoint in run/checkpoints")
    assert not (tmp_path / "samples.jsonl").exists() and not (stopped / "evaluation.json").exists()


def test_a_damaged_shard_stops_the_run_by_name_or_is_skipped_into_the_ledger(
    trainers: Trainers, corpus: Path, tmp_path: Path
) -> None:
    trainers.corpus = tmp_path / "corpus"
    shutil.copytree(corpus, trainers.corpus)
    damage(trainers.corpus / "train" / "shard.00001.mds", "flipped")
    options = {"training__steps": 16, "checkpoint__every": 1}
    process = trainers.start("tiny_mdlm", "run", **options)
    assert_refused(process, 2, r"shard\.00001\.mds", run_dir=tmp_path / "run")
    saved = last_checkpoint(tmp_path / "run").step if checkpoints(tmp_path / "run") else 0
    done = trainers.train("tiny_mdlm", "run", data__damaged="skip", **options)
    assert ("resumed" in done.out) == (saved > 0)
    ledger = [json.loads(line) for line in (tmp_path / "run" / "damaged.jsonl").read_text().splitlines()]
    assert ledger and {entry["shard"] for entry in ledger} == {"shard.00001.mds"}
    assert_outcome(tmp_path / "run", 0)


def test_metrics_that_were_cut_short_are_said_and_go_on(trainers: Trainers, stopped: Path) -> None:
    metrics = stopped / "metrics.jsonl"
    known = last_checkpoint(stopped).state["metrics_offset"]  # training may have gone on while it was saved
    metrics.write_bytes(metrics.read_bytes()[: known - 30])
    done = trainers.train("tiny_mdlm", "run", **OPTIONS)
    assert "metrics.jsonl" in done.out and "the lines in between are lost, the run goes on" in done.out
    assert steps_of(stopped) == [3, 6, 9, 15, 16], "step 12 lost its line, no other did"
