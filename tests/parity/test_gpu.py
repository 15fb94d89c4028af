"""The engines on one GPU, NCCL with a world of one: in bf16 they train as plain torch does."""

from __future__ import annotations

from pathlib import Path

import pytest
from layouts import Layout
from training_runs import Trainers

from braid.pretrain.telemetry.metrics_log import read_metrics

ENGINES = {
    "ZeRO-1": Layout(1, engine="deepspeed", zero=1),
    "ZeRO-2": Layout(1, engine="deepspeed", zero=2),
    "ZeRO-3": Layout(1, engine="deepspeed", zero=3),
    "Megatron": Layout(1, engine="megatron"),
}
STEPS = {"training__steps": 10, "training__log_every": 1, "run__precision": "bf16", "run__device": "cuda"}


def losses(trainers: Trainers, run: str, layout: Layout, **options: object) -> list[float]:
    """Of the steps of a run that torchrun would start with one process."""
    [process] = trainers.start_ranks(1, "tiny_ccdd", run, **STEPS | layout.fields | options)
    assert process.wait() == 0, process.err
    lines = read_metrics(Path(trainers.folder) / run / "metrics.jsonl")
    return [line["loss"] for line in lines if line["split"] == "train"]


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_trains_on_one_gpu_as_plain_torch(trainers: Trainers, engine: str) -> None:
    plain = losses(trainers, "plain", Layout(1))
    assert losses(trainers, "divided", ENGINES[engine]) == pytest.approx(plain, rel=2e-2)
