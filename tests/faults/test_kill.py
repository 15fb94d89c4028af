"""Killed at any moment, inside a save too, and started again: in the end the run is the one nobody disturbed."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
from training_runs import (
    Process,
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

from braid.pretrain.checkpoint.faults import PHASES
from braid.pretrain.checkpoint.store import CheckpointStore
from braid.pretrain.training.outcome import read_outcome

MODES = ["asynchronous", "synchronous"]
OFTEN = {"checkpoint__every": 3, "training__validate_every": 10}


def samples_by_step(run_dir: Path) -> dict[int, set[tuple[str, str]]]:
    """(ordinal, hash of tokens, times, masks and noise) of every sample each step ever saw, repetitions included."""
    samples: dict[int, set[tuple[str, str]]] = {}
    for line in recorded(run_dir):
        samples.setdefault(line["step"], set()).update(line["samples"].items())
    return samples


def kill_at_random(process: Process, run_dir: Path, steps: int, draw: random.Random) -> None:
    """SIGKILL up to `steps` steps after where it is now, and a moment later: in a step, a save, a validation."""
    target = step_reached(run_dir) + draw.randint(1, steps)
    process.wait_until(lambda: step_reached(run_dir) >= target)
    time.sleep(draw.uniform(0, 0.03))
    process.signal(signal.SIGKILL)


def train_under_fire(trainers: Trainers, recipe: str, run: str, *, kills: int, seed: int, **options: object) -> None:
    """Train through `kills` kills, every other one at a phase of a save."""
    steps = options["training__steps"]
    draw, folder = random.Random(seed), trainers.folder / run
    phases = draw.sample(PHASES, len(PHASES))
    saved = 0
    for number in range(kills):
        phase = phases[number // 2 % len(phases)] if number % 2 else None
        env = {"BRAID_FAULT": f"save:{phase}:kill@{3 if phase == 'during_purge' else 1}"} if phase else None
        process = trainers.start(recipe, run, env=env, **options)
        if phase is None:
            kill_at_random(process, folder, steps // kills, draw)
        assert process.wait() == -signal.SIGKILL, (number, phase, process.out, process.err)
        assert read_outcome(folder) is None, "what was killed has no ending"
        assert "Traceback" not in process.err and "error" not in process.err, process.err
        if (folder / "checkpoints").exists() and checkpoints(folder):
            assert saved <= last_checkpoint(folder).step, "a kill has cost a checkpoint"
            saved = last_checkpoint(folder).step
    assert 0 < saved < steps
    trainers.train(recipe, run, **options)
    assert_outcome(folder, 0)


def compare_with_undisturbed(trainers: Trainers, recipe: str, mode: str, *, kills: int, steps: int, seed: int) -> None:
    options = {"training__steps": steps, "recorded": True, "checkpoint__asynchronous": mode == "asynchronous", **OFTEN}
    trainers.train(recipe, "straight", **options)
    train_under_fire(trainers, recipe, "shot", kills=kills, seed=seed, **options)
    straight, shot = trainers.folder / "straight", trainers.folder / "shot"
    assert_same_run(shot, straight)
    assert steps_of(shot) == list(range(4, steps + 1, 4))
    assert not list(shot.glob("checkpoints/.tmp-*")), "the last start clears away what the killed ones left"
    # Every time a step was done, in whichever process, it saw the same samples with the same noise.
    assert samples_by_step(shot) == samples_by_step(straight)
    assert len(recorded(shot)) > len(recorded(straight)), "no step was ever repeated: nothing was tested"


@pytest.mark.parametrize("mode", MODES)
def test_a_joint_model_killed_again_and_again(trainers: Trainers, mode: str) -> None:
    compare_with_undisturbed(trainers, "tiny_ccdd", mode, kills=6, steps=60, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["asynchronous", "synchronous"])
@pytest.mark.parametrize("recipe", ["tiny_mdlm", "tiny_ccdd"])
def test_two_hundred_steps_and_twenty_kills(trainers: Trainers, recipe: str, mode: str) -> None:
    compare_with_undisturbed(trainers, recipe, mode, kills=20, steps=200, seed=2)


@pytest.mark.parametrize("phase", ["during_tensors", "after_manifest", "before_rename", "after_rename"])
def test_killed_at_a_phase_of_a_save_while_training_goes_on(trainers: Trainers, tmp_path: Path, phase: str) -> None:
    options = {"training__steps": 12, "checkpoint__every": 3, "checkpoint__asynchronous": True}
    trainers.train("tiny_ccdd", "straight", **options)
    fault = {"BRAID_FAULT": f"save:{phase}:kill@2"}
    trainers.train("tiny_ccdd", "shot", env=fault, code=-signal.SIGKILL, **options)
    assert checkpoints(tmp_path / "shot") == ([3, 6] if phase == "after_rename" else [3])
    trainers.train("tiny_ccdd", "shot", **options)
    assert_same_run(tmp_path / "shot", tmp_path / "straight")


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({}, id="data"),
        pytest.param({"parallel__tensor": 2}, id="tensor", marks=pytest.mark.slow),
        pytest.param({"parallel__pipeline": 2, "model__num_layers": 2}, id="pipeline", marks=pytest.mark.slow),
        pytest.param({"parallel__engine": "megatron"}, id="megatron"),
    ],
)
def test_a_rank_killed_ends_its_peers_and_the_run_goes_on_bit_for_bit(
    trainers: Trainers, tmp_path: Path, layout: dict[str, object]
) -> None:
    options = {"training__steps": 20, "checkpoint__every": 4, "training__log_every": 2} | layout
    trainers.train("tiny_ccdd", "straight", ranks=2, **options)
    first, second = trainers.start_ranks(2, "tiny_ccdd", "shot", **options)
    second.wait_until(lambda: has_lines(tmp_path / "shot", 3))
    second.signal(signal.SIGKILL)
    assert second.wait() == -signal.SIGKILL
    together = r"(a (sum|broadcast) over (2|the 2) ranks.*|what 2 ranks do together)"
    said = rf"\[rank 0\] error: {together} did not complete: another rank"
    assert_refused(first, 4, said, run_dir=tmp_path / "shot")
    trainers.train("tiny_ccdd", "shot", ranks=2, **options)
    assert_same_run(tmp_path / "shot", tmp_path / "straight")


def test_killed_before_the_first_checkpoint_it_starts_from_scratch(trainers: Trainers, tmp_path: Path) -> None:
    options = {"training__steps": 12, "training__log_every": 1}
    trainers.train("tiny_mdlm", "straight", **options)
    process = trainers.start("tiny_mdlm", "shot", **options | {"training__steps": 5000})
    process.wait_until(lambda: has_lines(tmp_path / "shot", 3))
    process.signal(signal.SIGKILL)
    process.wait()
    assert CheckpointStore(tmp_path / "shot" / "checkpoints").latest_valid() is None
    done = trainers.train("tiny_mdlm", "shot", **options)
    assert "written after the checkpoint; their steps are done again" in done.out and "resumed" not in done.out
    assert_same_run(tmp_path / "shot", tmp_path / "straight")
