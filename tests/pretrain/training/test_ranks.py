"""Ranks and micro-batches are a layout, not a setting: samples and noise are the same, and so are loss and gradient.

The loss is global sum / global count. With samples of very different lengths the mean of the ranks' means is another
number, so the runs here have padding, which `recorded_training.py` adds: no corpus has any yet.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from recorded_training import pad
from training_runs import (
    Trainers,
    assert_outcome,
    assert_refused,
    has_lines,
    last_checkpoint,
    recorded,
    steps_of,
)

from braid.parallel.mesh import Mesh
from braid.pretrain.checkpoint.store import CheckpointStore
from braid.pretrain.config.load import load_config, recipes
from braid.pretrain.objectives.base import Noise
from braid.pretrain.telemetry.metrics_log import read_metrics
from braid.pretrain.training.loop import Trainer

# Seven validation sequences divide among no number of ranks.
FIVE_STEPS = {
    "training__steps": 5,
    "optimizer__eps": 1e-5,  # AdamW would make a step of the rounding of a gradient that is nearly zero
    "training__log_every": 1,
    "training__validation_sequences": 7,
    "model__num_layers": 2,
    "recorded": True,
}
WHOLE = (1, 8)
EVERY_LAYOUT = ("tiny_mdlm", "tiny_ccdd", "tiny_ar")
LAYOUTS = {(1, 2): "one rank, four micro-batches", (2, 2): "two ranks, two each", (4, 2): "four ranks"}


def train(trainers: Trainers, recipe: str, layout: tuple[int, int], padded: bool) -> Path:
    """Five steps of a batch of 8 on a layout of (ranks, micro-batch size); the run's folder."""
    run = "ranks-{}-micro-{}".format(*layout)
    gradients = trainers.folder / f"{run}.gradients"
    gradients.mkdir()
    env = {"GRADIENTS": str(gradients), "PADDED": str(int(padded))}
    trainers.train(recipe, run, ranks=layout[0], training__micro_batch_size=layout[1], env=env, **FIVE_STEPS)
    return trainers.folder / run


def gradients(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return torch.load(run_dir.with_name(f"{run_dir.name}.gradients") / f"{step}.pt")


def samples(run_dir: Path) -> dict[int, dict[str, str]]:
    """Of each step: ordinal -> hash of tokens, times, masks and noise. No sample may be there twice."""
    steps: dict[int, dict[str, str]] = {}
    for line in recorded(run_dir):
        seen = steps.setdefault(line["step"], {})
        assert not seen.keys() & line["samples"].keys()
        seen.update(line["samples"])
    return steps


def mean_of_means(run_dir: Path, step: int, ranks: int) -> float:
    """The loss of a step as it would be if each rank divided by its own count."""
    means = []
    for rank in range(ranks):
        lines = [line for line in recorded(run_dir) if (line["step"], line["rank"]) == (step, rank)]
        means.append(sum(line["sum"] for line in lines) / sum(line["count"] for line in lines))
    return sum(means) / ranks


@pytest.mark.parametrize(("recipe", "padded"), [("tiny_mdlm", False), ("tiny_mdlm", True), ("tiny_ccdd", True)])
def test_every_layout_trains_the_same(trainers: Trainers, recipe: str, padded: bool) -> None:
    whole = train(trainers, recipe, WHOLE, padded)
    expected = read_metrics(whole / "metrics.jsonl")
    assert [line["split"] for line in expected] == ["train"] * 5 + ["validation"]
    counts = [line["count"] for line in recorded(whole)]
    assert counts == [65 if padded else 128] * 5
    for layout, name in LAYOUTS.items():
        run_dir = train(trainers, recipe, layout, padded)
        assert samples(run_dir) == samples(whole), name
        for line, other in zip(read_metrics(run_dir / "metrics.jsonl"), expected, strict=True):
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-6), name
            assert line["terms"] == pytest.approx(other["terms"], rel=1e-6), name
            if line["split"] == "train":
                assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5), name
                for found, wanted in zip(line["loss_by_time"], other["loss_by_time"], strict=True):
                    assert found == (wanted if wanted is None else pytest.approx(wanted, rel=1e-5)), name
                assert line["tokens_seen"] == other["tokens_seen"]
        for step in range(1, 6):
            found = gradients(run_dir, step)
            for parameter, gradient in gradients(whole, step).items():
                torch.testing.assert_close(found[parameter], gradient, rtol=1e-4, atol=1e-6, msg=f"{name}: {parameter}")
        weights = last_checkpoint(whole).groups["weights"]
        for parameter, value in last_checkpoint(run_dir).groups["weights"].items():
            torch.testing.assert_close(value, weights[parameter], rtol=0, atol=1e-5, msg=f"{name}: {parameter}")
        if padded and layout[0] > 1:
            by_ranks = mean_of_means(run_dir, 1, layout[0])
            assert abs(by_ranks / expected[0]["loss"] - 1) > 1e-2, "the test could not tell the two apart"


@pytest.mark.parametrize("recipe", [n for n in recipes() if n.startswith("tiny_") and n not in EVERY_LAYOUT])
def test_two_ranks_train_every_system_as_one(trainers: Trainers, recipe: str) -> None:
    """State that follows from sums over the whole batch (codebooks, running averages) included."""
    whole, halves = train(trainers, recipe, WHOLE, False), train(trainers, recipe, (2, 2), False)
    pairs = zip(*(read_metrics(run_dir / "metrics.jsonl") for run_dir in (halves, whole)), strict=True)
    for line, other in pairs:
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["terms"] == pytest.approx(other["terms"], rel=1e-5)
    found, wanted = (last_checkpoint(run_dir).groups["weights"] for run_dir in (halves, whole))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("recipe", ["tiny_mdlm", "tiny_ccdd"])
def test_the_gradient_is_that_of_the_sum_over_the_count(trainers: Trainers, tmp_path: Path, recipe: str) -> None:
    """Against one backward pass, in this process, of the first global batch in one piece."""
    run_dir = train(trainers, recipe, (2, 2), padded=True)
    config = load_config(run_dir / "config.yaml", [f"run.dir={tmp_path / 'reference'}", "training.micro_batch_size=8"])
    (tmp_path / "reference").mkdir()
    trainer = Trainer(config, Mesh.single(), CheckpointStore(tmp_path / "reference" / "checkpoints"))
    [batch] = next(iter(trainer.loader))

    def loss_of(batch):
        objective = trainer.objective
        noise = Noise.training(trainer.noise_key, 0, 8, batch.ordinals, objective.time_groups)
        corrupted = objective.corrupt(batch, noise)
        return objective.loss(objective.predict(corrupted), corrupted)

    def gradient_of(loss) -> dict[str, torch.Tensor]:
        trainer.objective.zero_grad(set_to_none=True)
        loss.backward()
        named = trainer.objective.named_parameters()
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named}

    batch = pad(batch)
    trainer.objective.train()
    terms = loss_of(batch)
    found = gradients(run_dir, 1)
    for name, gradient in gradient_of(terms.total / terms.count).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    halves = [
        dataclasses.replace(batch, **{name: value[half] for name, value in vars(batch).items() if value is not None})
        for half in (slice(0, 4), slice(4, 8))
    ]
    of_means = gradient_of(sum(terms.total / terms.count for terms in map(loss_of, halves)) / 2)
    apart = [(found[name] - gradient).norm() / gradient.norm() for name, gradient in of_means.items() if gradient.any()]
    assert min(apart) > 1e-2, "the mean of the ranks' means has another gradient"


def test_a_signal_to_one_rank_stops_all_and_another_layout_goes_on(trainers: Trainers, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first, second = trainers.start_ranks(2, "tiny_mdlm", "run", training__steps=10**6, recorded=True)
    second.wait_until(lambda: has_lines(run_dir, 2))
    second.signal(signal.SIGTERM)
    for rank, process in enumerate((first, second)):
        assert_refused(process, 3, rf"\[rank {rank}\] error: stopped by SIGTERM after step \d+ of 1000000")
    stopped = assert_outcome(run_dir, 3)["step"]
    assert f"after step {stopped} of" in first.err and f"after step {stopped} of" in second.err
    assert last_checkpoint(run_dir).step == stopped and max(samples(run_dir)) == stopped
    steps = stopped + 9
    trainers.train("tiny_mdlm", "run", ranks=4, training__micro_batch_size=2, training__steps=steps, recorded=True)
    trainers.train("tiny_mdlm", "alone", training__steps=steps, recorded=True)
    assert samples(run_dir) == samples(tmp_path / "alone")
    assert steps_of(run_dir) == steps_of(tmp_path / "alone")
    for line, other in zip(*(read_metrics(tmp_path / run / "metrics.jsonl") for run in ("run", "alone")), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-2)


def test_a_batch_that_does_not_divide_among_the_ranks(trainers: Trainers, tmp_path: Path) -> None:
    for rank, process in enumerate(trainers.start_ranks(4, "tiny_mdlm", "run")):
        assert_refused(process, 2, rf"\[rank {rank}\] error", r"4 x 4 .*= 16", "training.global_batch_size")
    assert_outcome(tmp_path / "run", 2)


def torchrun(trainers: Trainers, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*command, "-m", "braid.pretrain", "tiny_mdlm", "run.dir=run", f"data.path={trainers.corpus}", *words],
        cwd=trainers.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_under_torchrun(trainers: Trainers, tmp_path: Path) -> None:
    launcher = torchrun(trainers, "run.device=cpu", "training.steps=6", "training.log_every=2")
    out, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, err
    assert "6 steps on 2 x cpu" in out and out.count("step 6/6") == 1, "rank 0 alone speaks"
    assert assert_outcome(tmp_path / "run", 0)["step"] == 6
    assert steps_of(tmp_path / "run") == [2, 4, 6] and last_checkpoint(tmp_path / "run").step == 6


@pytest.mark.slow
def test_a_signal_to_one_rank_under_torchrun(trainers: Trainers, tmp_path: Path) -> None:
    launcher = torchrun(trainers, "run.device=cpu", "training.steps=100000")
    run_dir = tmp_path / "run"
    deadline = time.monotonic() + 120
    while not has_lines(run_dir):
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    workers = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    rank_0 = re.match(r"process (\d+)", (run_dir / ".lock").read_text())[1]
    [other] = set(workers) - {rank_0}
    os.kill(int(other), signal.SIGTERM)
    _, err = launcher.communicate(timeout=120)
    assert launcher.returncode != 0 and err.count("error: stopped by SIGTERM after step") == 2, err
    outcome = assert_outcome(run_dir, 3)
    assert last_checkpoint(run_dir).step == outcome["step"]
