"""A run in pieces is the run in one piece, bit for bit: however it was stopped, wherever in an epoch, and how often.

Runs that are killed are in tests/faults/test_kill.py.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_fixtures import ROWS
from training_runs import (
    Trainers,
    assert_outcome,
    assert_refused,
    assert_same_run,
    checkpoints,
    has_lines,
    last_checkpoint,
    recorded,
    step_reached,
    steps_of,
)

from braid.pretrain.config.load import recipes

STOPPED = ["tiny_ar", "tiny_mdlm", "tiny_ccdd"]


@pytest.mark.parametrize("recipe", STOPPED)
def test_stopped_twice_and_resumed_twice(trainers: Trainers, tmp_path: Path, recipe: str) -> None:
    """Both stops come before the first line of the log, whose means are over the steps of all three processes."""
    run_dir = tmp_path / "stopped"
    stops = [0]
    for number in (signal.SIGTERM, signal.SIGUSR1):
        process = trainers.start(recipe, "stopped", recorded=True, training__steps=10**6, training__log_every=10**6)
        process.wait_until(lambda: step_reached(run_dir) > stops[-1] + 5)
        process.signal(number)
        assert_refused(process, 3, rf"stopped by {number.name} after step \d+ of 1000000; the state is saved")
        outcome = assert_outcome(run_dir, 3)
        assert last_checkpoint(run_dir).step == outcome["step"] and outcome["message"] in process.err
        stops.append(outcome["step"])
    assert steps_of(run_dir) == []
    steps = stops[-1] + 7
    options = {"training__steps": steps, "training__log_every": steps - 2, "training__validate_every": steps - 1}
    assert f"resumed from step {stops[-1]}" in trainers.train(recipe, "stopped", **options).out
    assert_outcome(run_dir, 0)
    trainers.train(recipe, "straight", **options)
    assert_same_run(run_dir, tmp_path / "straight")
    assert steps_of(run_dir) == [steps - 2, steps] and steps_of(run_dir, "validation") == [steps - 1, steps]


@pytest.mark.parametrize("recipe", [name for name in recipes() if name.startswith("tiny_") and name not in STOPPED])
def test_every_system_resumes_bit_for_bit(trainers: Trainers, tmp_path: Path, recipe: str) -> None:
    """Killed in the middle of a save, after state of its own (schedules, codebooks, averages) has moved. What a
    system's sampler and evaluation need comes out of the checkpoint."""
    options = {"training__steps": 12, "training__log_every": 5, "checkpoint__every": 7, "model__num_layers": 2}
    trainers.train(recipe, "straight", **options)
    fault = {"BRAID_FAULT": "save:after_rename:kill@1"}
    trainers.train(recipe, "pieces", env=fault, code=-signal.SIGKILL, **options)
    assert "resumed from step 7" in trainers.train(recipe, "pieces", **options).out
    assert_same_run(tmp_path / "pieces", tmp_path / "straight")
    drawn = trainers.braid("sample", "pieces", "--num", 2, "--device", "cpu", "--output", "samples.jsonl")
    if recipe == "tiny_t5":
        assert_refused(drawn, 2, "cannot be sampled")
    else:
        assert drawn.code == 0, drawn.err
    scored = trainers.braid("evaluate", "pieces", "--sequences", 4, "--draws", 1, "--device", "cpu")
    assert scored.code == 0, scored.err


@pytest.mark.parametrize(("batch", "stop"), [(8, 14), (8, 15), (16, 7), (16, 8), (16, 15)])
def test_resumed_at_the_edge_of_an_epoch(trainers: Trainers, tmp_path: Path, batch: int, stop: int) -> None:
    """An epoch is 15 batches of 8, or 7 and a half of 16. The first process dies in the save after step `stop`."""
    options = {"training__steps": 18, "training__global_batch_size": batch, "training__log_every": 5, "recorded": True}
    options["checkpoint__asynchronous"] = False  # else training goes on while the save dies, and is recorded
    trainers.train("tiny_mdlm", "straight", **options)
    fault = {"BRAID_FAULT": "save:after_rename:kill@1"}
    trainers.train("tiny_mdlm", "pieces", checkpoint__every=stop, env=fault, code=-signal.SIGKILL, **options)
    assert checkpoints(tmp_path / "pieces") == [stop]
    trainers.train("tiny_mdlm", "pieces", **options)
    assert_same_run(tmp_path / "pieces", tmp_path / "straight")
    pieces, straight = recorded(tmp_path / "pieces"), recorded(tmp_path / "straight")
    assert [line["samples"] for line in pieces] == [line["samples"] for line in straight]
    ordinals = [int(ordinal) for line in pieces for ordinal in line["samples"]]
    assert ordinals == list(range(18 * batch)) and 18 * batch > ROWS, "every sample once, in order"


def test_nothing_left_to_do(trainers: Trainers, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    trainers.train("tiny_mdlm", "run", training__steps=8)
    metrics = (run_dir / "metrics.jsonl").read_bytes()
    written = (run_dir / "checkpoints" / "step-00000008").stat().st_mtime_ns
    for ranks, steps in ((1, 8), (2, 8), (1, 5)):  # also when the run is already longer than is asked for
        done = trainers.train("tiny_mdlm", "run", ranks=ranks, training__steps=steps)
        assert f"nothing is left to do: step 8 of {steps}" in done.out
        assert (run_dir / "metrics.jsonl").read_bytes() == metrics and checkpoints(run_dir) == [8]
        assert (run_dir / "checkpoints" / "step-00000008").stat().st_mtime_ns == written
        assert assert_outcome(run_dir, 0)["step"] == 8


def test_a_finished_run_is_made_longer(trainers: Trainers, tmp_path: Path) -> None:
    """The schedule is constant, so ten steps and ten more are twenty."""
    trainers.train("tiny_ccdd", "pieces", training__steps=10, training__log_every=5)
    trainers.train("tiny_ccdd", "pieces", training__steps=20, training__log_every=5, training__validate_every=10)
    trainers.train("tiny_ccdd", "straight", training__steps=20, training__log_every=5, training__validate_every=10)
    assert_same_run(tmp_path / "pieces", tmp_path / "straight")


def test_the_folder_is_a_recipe(trainers: Trainers, tmp_path: Path) -> None:
    """config.yaml of a stopped run, passed back, continues it."""
    trainers.train("tiny_mdlm", "straight", training__steps=9, checkpoint__every=4)
    fault = {"BRAID_FAULT": "save:before_pointer:kill@1"}
    trainers.train("tiny_mdlm", "run", training__steps=9, checkpoint__every=4, env=fault, code=-signal.SIGKILL)
    process = trainers.braid("pretrain", tmp_path / "run" / "config.yaml")
    assert process.code == 0 and "resumed from step 4" in process.out, process.err
    assert_same_run(tmp_path / "run", tmp_path / "straight")


def test_the_first_step_comes_within_ten_seconds(corpus: Path, tmp_path: Path) -> None:
    """The real command with nothing warm. A machine that is busy with something else gets three tries."""
    command = [sys.executable, "-m", "braid.launch.cli", "pretrain", "tiny_mdlm", f"data.path={corpus}"]
    options = ["run.device=cpu", "training.log_every=1", "training.steps=5"]
    seconds = []
    while len(seconds) < 3 and min(seconds, default=10) >= 10:
        run_dir = tmp_path / f"run-{len(seconds)}"
        started = time.monotonic()
        process = subprocess.Popen([*command, *options, f"run.dir={run_dir}"], stdout=subprocess.DEVNULL)
        while not has_lines(run_dir):
            assert process.poll() is None
            time.sleep(0.01)
        seconds.append(time.monotonic() - started)
        assert process.wait(timeout=60) == 0
    assert seconds[-1] < 10, seconds
