"""No space: a save that fails costs a warning; the last one that fails ends the run, with the one before intact."""

from __future__ import annotations

import os
import resource
import subprocess
from pathlib import Path

import pytest
from training_runs import Trainers, assert_outcome, assert_refused, assert_same_run, checkpoints, last_checkpoint

STEPS = {"training__steps": 8, "checkpoint__every": 2}
FULL = r"\[Errno 28\] No space left on device"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_training_goes_on_after_a_save_that_fails(trainers: Trainers, tmp_path: Path, asynchronous: bool) -> None:
    fault = {"BRAID_FAULT": "save:after_tensors:enospc@2"}
    done = trainers.train("tiny_ccdd", "run", env=fault, checkpoint__asynchronous=asynchronous, **STEPS)
    assert "warning: the checkpoint of step 4 could not be saved; training goes on" in done.out
    assert "No space left on device" in done.out and "free space or permissions" in done.out
    assert checkpoints(tmp_path / "run") == [6, 8]
    assert_outcome(tmp_path / "run", 0)
    trainers.train("tiny_ccdd", "straight", **STEPS)
    assert_same_run(tmp_path / "run", tmp_path / "straight")


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_last_save_fails(trainers: Trainers, tmp_path: Path, ranks: int) -> None:
    fault = {"BRAID_FAULT": "save:before_manifest:enospc@4"}
    for process in trainers.start_ranks(ranks, "tiny_mdlm", "run", env=fault, **STEPS):
        assert_refused(process, 4, "no checkpoint could be saved at step 8", "No space left on device",
                       "the last valid checkpoint is intact", run_dir=tmp_path / "run")  # fmt: skip
        assert "training goes on" not in process.out
    assert last_checkpoint(tmp_path / "run").step == 6
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp-*"))
    trainers.train("tiny_mdlm", "run", ranks=ranks, **STEPS)
    trainers.train("tiny_mdlm", "straight", ranks=ranks, **STEPS)
    assert_same_run(tmp_path / "run", tmp_path / "straight")


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_limit_on_the_size_of_files(trainers: Trainers, tmp_path: Path, asynchronous: bool) -> None:
    """Every save fails from the first on: after three in a row the run ends. What it wrote is readable."""
    options = {"training__steps": 100, "checkpoint__every": 2, "checkpoint__asynchronous": asynchronous}
    process = trainers.start("tiny_mdlm", "run", **options)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (40_000, 40_000))
    assert_refused(process, 4, r"no checkpoint could be saved at step 6 \(3 in a row\)", "File too large",
                   run_dir=tmp_path / "run")  # fmt: skip
    assert process.out.count("training goes on") == 2 and checkpoints(tmp_path / "run") == []


@pytest.fixture
def disk(tmp_path: Path):
    """A file system of its own. Checkpoints want 16 MiB of it left over."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this process may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path, leave: int) -> Path:
    """A file that leaves `leave` bytes."""
    file = disk / "filler"
    free = os.statvfs(disk)
    file.write_bytes(bytes(max(0, free.f_bavail * free.f_bsize - leave)))
    return file


def test_a_disk_that_is_really_full(trainers: Trainers, tmp_path: Path, disk: Path) -> None:
    run_dir = disk / "run"
    trainers.train("tiny_mdlm", "disk/run", **STEPS | {"training__steps": 6})
    metrics = (run_dir / "metrics.jsonl").read_bytes()
    filler = fill(disk, leave=2**18)  # enough for metrics, not for a checkpoint
    process = trainers.start("tiny_mdlm", "disk/run", **STEPS | {"training__steps": 10})
    assert_refused(process, 4, "no checkpoint could be saved at step 10", "too little space", run_dir=run_dir)
    assert "warning: the checkpoint of step 8 could not be saved; training goes on" in process.out
    assert checkpoints(run_dir) == [4, 6] and last_checkpoint(run_dir).step == 6
    assert (run_dir / "metrics.jsonl").read_bytes().startswith(metrics)

    filler.unlink()
    fill(disk, leave=0)
    process = trainers.start("tiny_mdlm", "disk/run", **STEPS | {"training__steps": 10})
    assert_refused(process, 2, "no space left on the device|could not be written", "free some space")
    assert last_checkpoint(run_dir).step == 6 and (run_dir / "config.yaml").read_text()

    filler.unlink()
    trainers.train("tiny_mdlm", "disk/run", **STEPS | {"training__steps": 10})
    trainers.train("tiny_mdlm", "straight", **STEPS | {"training__steps": 6})
    trainers.train("tiny_mdlm", "straight", **STEPS | {"training__steps": 10})
    found, expected = last_checkpoint(run_dir), last_checkpoint(tmp_path / "straight")
    for name, value in expected.groups["weights"].items():
        assert value.equal(found.groups["weights"][name])
