"""No step twice, no line lost, never unreadable: with real kills, torn lines and full disks."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest

from braid.kernels.errors import InputError
from braid.pretrain.checkpoint.files import write_atomically
from braid.pretrain.telemetry.metrics_log import MetricsLog, read_metrics

STEPS, EVERY = 400, 7


def record_of(step: int) -> dict:
    """What is logged at a step: a function of the step alone, as the deterministic fields of a run are."""
    draw = random.Random(step)
    return {"step": step, "split": "train", "loss": draw.random() * 1e3, "text": "é" * draw.randrange(40), "mfu": None}


def run(folder: Path, pause: float = 0.0) -> None:
    """A run that logs every step and saves every `EVERY`: its checkpoint is (step, offset)."""
    saved = folder / "checkpoint"
    step, offset = json.loads(saved.read_text()) if saved.exists() else (0, None)
    log = MetricsLog(folder / "metrics.jsonl", offset, report=lambda message: None)
    while step < STEPS:
        step += 1
        log.write(record_of(step))
        if step % 50 == 0:
            log.write({"step": step, "split": "validation", "loss": float(step)})
        if step % EVERY == 0:
            write_atomically(saved, json.dumps([step, log.offset]).encode())
        time.sleep(pause)
    log.close()


def test_killed_and_resumed_at_random_the_file_is_that_of_an_uninterrupted_run(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    run(whole)
    draw, kills = random.Random(0), 0
    while True:
        child = os.fork()
        if child == 0:
            try:
                run(broken, pause=0.001)
                os._exit(0)
            finally:
                os._exit(1)
        time.sleep(draw.uniform(0.005, 0.06))
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] == 0:
            break
        kills += 1
        assert kills < 500
        path = broken / "metrics.jsonl"
        steps = [record["step"] for record in read_metrics(path)] if path.exists() else []
        assert steps == sorted(steps)
    assert kills >= 5
    assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    records = read_metrics(broken / "metrics.jsonl")
    assert [r["step"] for r in records if r["split"] == "train"] == list(range(1, STEPS + 1))
    assert [r for r in records if r["split"] == "train"] == [record_of(step) for step in range(1, STEPS + 1)]


def test_lines_are_there_at_once_and_the_file_stays_the_same_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    with open(path) as follower:  # as `tail -f` does
        log.write({"step": 1})
        assert follower.readline() == '{"step":1}\n'
        offset = log.offset
        assert offset == path.stat().st_size
        log.write({"step": 2})
        inode = path.stat().st_ino
        log.close()
        messages = []
        log = MetricsLog(path, offset, report=messages.append)
        assert path.stat().st_ino == inode and path.read_text() == '{"step":1}\n'
        assert len(messages) == 1 and "dropped 1 lines" in messages[0]
        log.write({"step": 2, "again": True})
        assert follower.readline() == '{"step":2,"again":true}\n'


def test_a_new_run_starts_with_an_empty_file(tmp_path: Path) -> None:
    """A run killed before its first checkpoint starts again at step 1."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":1}\n{"step":2}\n{"st')
    messages = []
    MetricsLog(path, None, report=messages.append).write({"step": 1})
    assert path.read_text() == '{"step":1}\n' and "dropped 2 lines" in messages[0]


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    record = {"loss": math.nan, "terms": {"a": math.inf, "b": [1.5, -math.inf, (math.nan,)]}, "mfu": None, "ok": True}
    log.write(record)
    [read] = read_metrics(tmp_path / "metrics.jsonl")
    assert read == {"loss": None, "terms": {"a": None, "b": [1.5, None, [None]]}, "mfu": None, "ok": True}
    assert math.isnan(record["loss"]), "the caller's record is untouched"
    values = [0.1 + 0.2, 1e-320, 2**0.5, -0.0]
    log.write({"v": values})
    assert [v.hex() for v in read_metrics(tmp_path / "metrics.jsonl")[1]["v"]] == [v.hex() for v in values]


def test_a_shorter_file_than_the_checkpoint_knew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    messages = []
    path.write_text('{"step":1}\n{"ste')
    log = MetricsLog(path, 1000, report=messages.append)
    assert "16 bytes are there of the 1000" in messages[0] and "dropped 0 lines (5 bytes)" in messages[1]
    log.write({"step": 9})
    assert [record["step"] for record in read_metrics(path)] == [1, 9]
    assert log.offset == path.stat().st_size


def test_a_full_disk_costs_no_line(tmp_path: Path) -> None:
    """Through a limit on the file's size, in a child: the limit cannot be raised again by everybody."""
    child = os.fork()
    if child == 0:
        try:
            messages = []
            log = MetricsLog(tmp_path / "metrics.jsonl", report=messages.append)
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (25, hard))
            for step in range(1, 6):  # the limit falls into the third line: half of it is written
                log.write({"step": step})
            assert len(messages) == 1 and "cannot be written" in messages[0]
            assert (tmp_path / "metrics.jsonl").stat().st_size == 25 and log.offset == 55
            assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            log.write({"step": 6})
            assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
            assert log.offset == 66
            resource.setrlimit(resource.RLIMIT_FSIZE, (70, hard))
            log.write({"step": 7})
            assert len(messages) == 2, "a new failure is said anew"
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 500, enabled=False)
    log.write({"step": 1})
    assert log.offset == 0 and not (tmp_path / "metrics.jsonl").exists()
    log.close()


def test_reading_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(InputError, match="there is no"):
        read_metrics(path)
    path.write_text("")
    assert read_metrics(path) == []
    path.write_text('{"step":1}\n{"step":\n{"step":3}\n')
    with pytest.raises(InputError, match="line 2 is no JSON object"):
        read_metrics(path)
    path.write_text('{"step":1}\n3\n')
    with pytest.raises(InputError, match="line 2 is no JSON object"):
        read_metrics(path)
