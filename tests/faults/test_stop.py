"""Asked to stop, by a key or a scheduler: the step in hand is finished, everything is saved, and the exit code is 3."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from training_runs import Trainers, assert_outcome, assert_refused, checkpoints, has_lines, last_checkpoint, steps_of

from braid.pretrain.training.outcome import read_outcome

ENDLESS = {"training__steps": 10**6, "training__log_every": 1}
LONG_VALIDATION = {
    "training__validate_every": 1, "training__validation_sequences": 10**6, "training__micro_batch_size": 1,
    "model__num_layers": 24,
}  # fmt: skip
"""Some seconds of it."""


def test_what_was_preempted_and_then_killed_has_no_ending(trainers: Trainers, tmp_path: Path) -> None:
    """Whoever restarts it must not take the outcome of the start before for this one's."""
    run_dir = tmp_path / "run"
    process = trainers.start("tiny_mdlm", "run", **ENDLESS)
    process.wait_until(lambda: has_lines(run_dir))
    process.signal(signal.SIGTERM)
    assert process.wait() == assert_outcome(run_dir, 3)["exit_code"]
    steps = len(steps_of(run_dir))
    process = trainers.start("tiny_mdlm", "run", **ENDLESS)
    process.wait_until(lambda: len(steps_of(run_dir)) > steps)
    assert read_outcome(run_dir) is None
    process.signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and read_outcome(run_dir) is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_in_training(trainers: Trainers, tmp_path: Path, number: signal.Signals) -> None:
    run_dir = tmp_path / "run"
    process = trainers.start("tiny_mdlm", "run", **ENDLESS)
    process.wait_until(lambda: has_lines(run_dir, 3))
    process.signal(number)
    assert_refused(process, 3, f"stopped by {number.name} after step", "run the same command again", run_dir=run_dir)
    step = assert_outcome(run_dir, 3)["step"]
    assert last_checkpoint(run_dir).step == step and steps_of(run_dir) == list(range(1, step + 1))


def test_in_validation(trainers: Trainers, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = trainers.start("tiny_mdlm", "run", **ENDLESS, **LONG_VALIDATION)
    process.wait_until(lambda: steps_of(run_dir) == [1] if has_lines(run_dir) else False)
    process.signal(signal.SIGINT)
    assert steps_of(run_dir, "validation") == [], "the signal came before the validation was over"
    assert_refused(process, 3, "stopped by SIGINT after step 1 of", run_dir=run_dir)
    assert steps_of(run_dir) == steps_of(run_dir, "validation") == checkpoints(run_dir) == [1]


def test_a_second_key_press_does_not_wait(trainers: Trainers, tmp_path: Path) -> None:
    """The checkpoint before is intact, and there is no outcome but "interrupted"."""
    run_dir = tmp_path / "run"
    options = ENDLESS | LONG_VALIDATION | {"training__validate_every": 2, "checkpoint__every": 1}
    process = trainers.start("tiny_mdlm", "run", **options)
    process.wait_until(lambda: has_lines(run_dir, 2))
    process.signal(signal.SIGINT)
    time.sleep(0.6)
    process.signal(signal.SIGINT)
    assert_refused(process, 130, "interrupted", run_dir=run_dir)
    assert steps_of(run_dir, "validation") == [] and last_checkpoint(run_dir).step == 1


def test_while_data_workers_read_ahead(trainers: Trainers, tmp_path: Path) -> None:
    """A Ctrl-C reaches every process of the terminal's group, and a scheduler signals all processes of a job."""
    run_dir = tmp_path / "run"
    process = trainers.start("tiny_mdlm", "run", data__workers=2, **ENDLESS)
    process.wait_until(lambda: has_lines(run_dir, 3))
    process.signal_group(signal.SIGINT)
    assert_refused(process, 3, "stopped by SIGINT", run_dir=run_dir)
    assert last_checkpoint(run_dir).step == assert_outcome(run_dir, 3)["step"]
