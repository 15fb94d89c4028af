"""A run whose corpus lies in an S3 server: it dies, goes on, and is the run that reads a folder."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from small_corpus import damage
from stores import S3Server
from training_runs import Trainers, assert_outcome, assert_refused, assert_same_run

OPTIONS = {"training__steps": 12, "checkpoint__every": 4}


@pytest.fixture(scope="module")
def server():
    server = S3Server()
    yield server
    server.stop()


def test_a_run_from_a_store_is_killed_and_goes_on_as_one_from_a_folder(
    trainers: Trainers, corpus: Path, tmp_path: Path, server: S3Server
) -> None:
    trainers.train("tiny_mdlm", "straight", **OPTIONS)
    trainers.corpus = server.upload(corpus, "whole")
    store = {"data__cache": tmp_path / "cache", "data__timeout_s": 60}
    kill = server.environment | {"BRAID_FAULT": "save:before_pointer:kill@2"}
    trainers.train("tiny_mdlm", "run", env=kill, code=-signal.SIGKILL, data__workers=1, **store, **OPTIONS)
    done = trainers.train("tiny_mdlm", "run", env=server.environment, **store, **OPTIONS)
    assert "resumed from step" in done.out
    assert_same_run(tmp_path / "run", tmp_path / "straight")
    assert list((tmp_path / "cache").glob("*/train/shard.00000.mds")) and not list((tmp_path / "cache").rglob("*.tmp"))


@pytest.mark.slow
def test_what_else_reads_from_a_store(trainers: Trainers, corpus: Path, tmp_path: Path, server: S3Server) -> None:
    trainers.corpus = url = server.upload(corpus, "evaluated")
    elsewhere = server.environment | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    trainers.train("tiny_ccdd", "run", env=elsewhere, training__steps=6)  # its encoder is made from the corpus
    words = ("evaluate", "run", "--sequences", 4, "--draws", 1, "--device", "cpu")
    own = trainers.braid(*words, env=elsewhere)
    assert own.code == 0, own.err
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert result["data"] == url == "s3://corpora/evaluated"
    both = trainers.braid(*words, "--data", url, "--data", corpus, "--json", "both.json", env=elsewhere)
    assert both.code == 0, both.err
    remote, local = json.loads((tmp_path / "both.json").read_text())["corpora"]
    assert remote["figures"] == local["figures"] == result["figures"]
    sample = trainers.braid("sample", "run", "--num", 1, "--output", "samples.jsonl", "--device", "cpu", env=elsewhere)
    assert sample.code == 0, sample.err
    shown = trainers.braid("data", "inspect", url, "--json", env=elsewhere)
    here = trainers.braid("data", "inspect", corpus, "--json")
    assert json.loads(shown.out)["splits"] == json.loads(here.out)["splits"]
    verified = trainers.braid("data", "verify", url, env=elsewhere)
    assert verified.code == 0 and "all whole" in verified.out


@pytest.mark.slow
def test_a_shard_that_is_damaged_in_the_store_stops_the_run_or_is_skipped(
    trainers: Trainers, corpus: Path, tmp_path: Path, server: S3Server
) -> None:
    shutil.copytree(corpus, tmp_path / "damaged")
    damage(tmp_path / "damaged" / "train" / "shard.00001.mds", "flipped")
    trainers.corpus = server.upload(tmp_path / "damaged", "damaged")
    options = {"env": server.environment, "data__cache": tmp_path / "cache", "training__steps": 16}
    process = trainers.start("tiny_mdlm", "run", **options)
    assert_refused(process, 2, r"s3://corpora/damaged/train/shard\.00001\.mds", run_dir=tmp_path / "run")
    trainers.train("tiny_mdlm", "run", data__damaged="skip", **options)
    (entry,) = map(json.loads, (tmp_path / "run" / "damaged.jsonl").read_text().splitlines())
    assert entry["shard"] == "shard.00001.mds" and "hash is" in entry["reason"]
    assert_outcome(tmp_path / "run", 0)


def test_a_store_that_is_not_there_is_an_error_with_what_to_change(trainers: Trainers, tmp_path: Path) -> None:
    trainers.corpus = "s3://corpora/whole"
    nowhere = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    process = trainers.start(
        "tiny_mdlm", "run", env=nowhere, data__cache=tmp_path / "cache", data__timeout_s=3, data__retries=1
    )
    assert_refused(process, 4, "manifest.json could not be fetched from s3://corpora/whole", "data.timeout_s",
                   run_dir=tmp_path / "run")  # fmt: skip
