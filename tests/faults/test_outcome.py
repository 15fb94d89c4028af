"""outcome.json says why the run ended, whichever rank it was, and is never that of an earlier start."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_corpus import build, damage, texts
from training_runs import Trainers, assert_outcome, assert_refused, checkpoints, has_lines

from braid.pretrain.training.outcome import read_outcome, write_outcome


@pytest.fixture
def half_damaged(trainers: Trainers, corpus: Path, tmp_path: Path) -> Path:
    """The trainers' corpus gets a shard that of two ranks only the second reads: the last one for validation."""
    trainers.corpus = tmp_path / "corpus"
    shutil.copytree(corpus, trainers.corpus)
    shutil.rmtree(trainers.corpus / "validation")
    build(trainers.corpus, texts(20, 60, seed=2), split="validation", shard_bytes=1 << 9)
    shard = sorted((trainers.corpus / "validation").glob("shard.*.mds"))[-1]
    damage(shard, "flipped")
    return shard


def test_the_cause_is_that_of_the_rank_that_failed_first(
    trainers: Trainers, tmp_path: Path, half_damaged: Path
) -> None:
    options = {"training__steps": 8, "training__validation_sequences": 10**6}
    first, second = trainers.start_ranks(2, "tiny_mdlm", "run", **options)
    assert_refused(second, 2, re.escape(half_damaged.name))
    assert_refused(first, 4, "another rank died")
    outcome = assert_outcome(tmp_path / "run", 2)
    assert outcome["rank"] == 1 and half_damaged.name in outcome["message"] and outcome["step"] == 8
    assert not list((tmp_path / "run").glob("*outcome-rank*"))
    damage(half_damaged, "flipped")  # the bit back
    trainers.train("tiny_mdlm", "run", ranks=2, **options)
    assert assert_outcome(tmp_path / "run", 0)["rank"] == 0


@pytest.mark.slow
def test_the_same_under_torchrun_which_ends_the_others(trainers: Trainers, tmp_path: Path, half_damaged: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["tiny_mdlm", "run.dir=run", f"data.path={trainers.corpus}", "run.device=cpu", "data.sequence_length=16",
             "training.steps=6", "training.validation_sequences=1000000"]  # fmt: skip
    launcher = subprocess.run([*command, "-m", "braid.pretrain", *words], cwd=tmp_path, capture_output=True, text=True)
    assert launcher.returncode != 0 and half_damaged.name in launcher.stderr
    assert half_damaged.name in assert_outcome(tmp_path / "run", 2)["message"]


def test_a_process_that_a_library_kills_says_where_its_threads_stood(trainers: Trainers, tmp_path: Path) -> None:
    process = trainers.start("tiny_mdlm", "run", training__steps=10**6)
    process.wait_until(lambda: has_lines(tmp_path / "run"))
    process.signal(signal.SIGABRT)
    assert process.wait() == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in process.err and "training/loop.py" in process.err


@pytest.fixture
def trained(trainers: Trainers, tmp_path: Path) -> Path:
    trainers.train("tiny_mdlm", "run", training__steps=8)
    assert_outcome(tmp_path / "run", 0)
    return tmp_path / "run"


def test_a_start_that_is_refused_replaces_the_outcome_of_the_last(trainers: Trainers, trained: Path) -> None:
    broken = trainers.folder / "broken.yaml"
    broken.write_text("training: [\n")
    for recipe, fields, said in (
        ("tiny_mdlm", {"training__steps": 0}, r"training\.steps = 0"),
        ("tiny_mdlm", {"training__step": 9}, r"training\.step"),
        ("tiny_mdml", {}, "tiny_mdml"),
        (broken.name, {}, "malformed YAML"),
        ("tiny_mdlm", {"checkpoint__resume": "never"}, "already holds checkpoints"),
    ):
        write_outcome(trained, "done", 0, 8, "")
        assert_refused(trainers.start(recipe, "run", **fields), 2, said, run_dir=trained)
        assert re.search(said, read_outcome(trained)["message"])
        (trained / "outcome.json").unlink()
    assert checkpoints(trained) == [8]


def test_refused_on_every_rank(trainers: Trainers, trained: Path) -> None:
    for process in trainers.start_ranks(3, "tiny_mdlm", "run"):
        assert_refused(process, 2, r"4 x 3 ranks = 12", run_dir=trained)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there(trainers: Trainers, trained: Path) -> None:
    assert_refused(trainers.start("tiny_mdlm", "run", run__device="cuda"), 2, run_dir=trained)


def test_what_was_not_meant_is_left_alone(trainers: Trainers, trained: Path, tmp_path: Path) -> None:
    """A misspelt run.dir, a printed configuration, a folder that is not there."""
    config = f"{trained.name}/config.yaml"
    before = (trained / "outcome.json").read_bytes()
    for words in ([config, "run.dri=other"], ["--print-config", config, "training.steps=0"]):
        assert_refused(trainers.braid("pretrain", *words), 2)
        assert (trained / "outcome.json").read_bytes() == before
    assert_refused(trainers.start("tiny_mdlm", "other", training__steps=0), 2)
    assert_refused(trainers.start("tiny_mdlm", ""), 2, "run.dir must not be empty")
    assert not (tmp_path / "other").exists() and not (tmp_path / "outcome.json").exists()
    assert_refused(trainers.braid("pretrain", config, "training.steps=0"), 2, run_dir=trained)  # the recipe names it


def test_a_run_that_goes_on_has_no_outcome(trainers: Trainers, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = trainers.start("tiny_mdlm", "run", training__steps=10**6)
    first.wait_until(lambda: has_lines(run_dir))
    assert_refused(trainers.start("tiny_mdlm", "run", training__steps=0), 2, r"training\.steps = 0")
    assert read_outcome(run_dir) is None
    first.signal(signal.SIGTERM)
    assert_refused(first, 3, run_dir=run_dir)


def test_metrics_are_not_cut_when_nothing_may_be_resumed(trainers: Trainers, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    metrics = run_dir / "metrics.jsonl"
    metrics.write_text('{"step":1,"split":"train"}\n')
    for process in trainers.start_ranks(2, "tiny_mdlm", "run", checkpoint__resume="never"):
        assert_refused(process, 2, "already holds metrics and checkpoint.resume is never", "move run/metrics.jsonl",
                       run_dir=run_dir)  # fmt: skip
    assert metrics.read_text() == '{"step":1,"split":"train"}\n'
    metrics.rename(tmp_path / "aside")  # as the message says
    trainers.train("tiny_mdlm", "run", checkpoint__resume="never", training__steps=8)
    assert_outcome(run_dir, 0)


def test_file_systems_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*names: Path) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    write_outcome(tmp_path, "bad_config", 2, 7, "the cause", rank=1)
    write_outcome(tmp_path, "failed", 4, 7, "its consequence")
    assert read_outcome(tmp_path)["message"] == "the cause"
    assert [path.name for path in tmp_path.iterdir()] == ["outcome.json"]
