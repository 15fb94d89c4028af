"""Save under one layout, go on under another: what is loaded is what was saved, to the bit, and the run is the one that
was never interrupted."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from layouts import LAYOUTS, LOSS_LIMIT, Layout, train
from training_runs import samples, steps_of

from braid.pretrain.checkpoint.folder import load_checkpoint
from braid.pretrain.checkpoint.store import CheckpointStore
from braid.pretrain.telemetry.metrics_log import read_metrics

SAVED, MORE = 5, 20
ONE = Layout(1)


class Chain(NamedTuple):
    """Layouts, one after the other, of a run of a system with some fields of its own."""

    layouts: list[Layout]
    system: str = "CCDD MDiT"
    fields: dict[str, object] = {}


CHAINS = {
    "TP 2 -> one": Chain([LAYOUTS["TP 2"], ONE], "ELF"),
    "PP 2 -> one": Chain([LAYOUTS["PP 2"], ONE], "RePlaid"),
    "ZeRO-3 -> TP 2 x PP 2": Chain([LAYOUTS["DP 2, ZeRO-3"], Layout(4, tensor=2, pipeline=2)]),
    "DP 4 -> one -> DP 2": Chain([Layout(4), ONE, Layout(2)]),
    "TP 2 + SP -> CP 2": Chain([LAYOUTS["TP 2 + SP"], LAYOUTS["CP 2"]], "Co-LADD"),
    "CP 2 -> ZeRO-1": Chain([LAYOUTS["CP 2"], LAYOUTS["DP 2, ZeRO-1"]]),
    "PP 4 -> PP 2": Chain([LAYOUTS["PP 4"], LAYOUTS["PP 2"]], "CCDD MMDiT"),
    "PP 2, interleaved -> TP 2": Chain([LAYOUTS["PP 2, interleaved"], LAYOUTS["TP 2"]], "RePlaid"),
    "ZeRO-1 -> ZeRO-3 on twice as many": Chain(
        [LAYOUTS["DP 2, ZeRO-1"], Layout(4, engine="deepspeed", zero=3)], "RePlaid"
    ),
    "Megatron -> plain, bf16": Chain([Layout(2, engine="megatron"), ONE], fields={"run__precision": "bf16"}),
    "one -> Megatron x TP 2": Chain([ONE, Layout(4, tensor=2, engine="megatron")]),
    "TP 2 x PP 2 x DP 2 + SP -> ZeRO-2, offloaded -> one": Chain(
        [LAYOUTS["TP 2 x PP 2 x DP 2 + SP"], LAYOUTS["DP 2, ZeRO-2, offloaded to the CPU"], ONE]
    ),
    "PP 2 x DP 2, ZeRO-1 -> one": Chain([LAYOUTS["PP 2 x DP 2, ZeRO-1"], ONE], "AR"),
    "ZeRO-2 -> TP 2 x PP 2 x DP 2, ZeRO-1": Chain([LAYOUTS["DP 2, ZeRO-2"], LAYOUTS["TP 2 x PP 2 x DP 2, ZeRO-1"]]),
    "ZeRO-2 -> TP 2 x DP 2 + SP, ZeRO-3": Chain([LAYOUTS["DP 2, ZeRO-2"], LAYOUTS["TP 2 x DP 2 + SP, ZeRO-3"]], "ELF"),
}
QUICK = ("ZeRO-3 -> TP 2 x PP 2",)


@pytest.mark.parametrize("chain", [pytest.param(c, marks=[] if c in QUICK else pytest.mark.slow) for c in CHAINS])
def test_a_run_goes_on_under_another_layout(trainers, tmp_path, monkeypatch, chain: str) -> None:
    (first, *others), system, fields = CHAINS[chain]
    last = SAVED + MORE * len(others)
    # Schedules that do not depend on the length of the run.
    same = {"optimizer__schedule": "constant", "training__sample_every": 0, "checkpoint__every": SAVED} | fields
    if system == "RePlaid":
        same["objective__output_prior_warmup_steps"] = 0
    whole = train(trainers, system, "whole", ONE, **same, training__steps=last)
    moved = train(trainers, system, "moved", first, **same, training__steps=SAVED)
    for number, layout in enumerate(others):
        step, resaved = SAVED + MORE * number, tmp_path / f"resaved-{number}"
        monkeypatch.setenv("RESAVED", str(resaved))
        train(trainers, system, "moved", layout, **same, training__steps=step + MORE)
        found, saved = (
            load_checkpoint(CheckpointStore(folder).path(step)) for folder in (resaved, moved / "checkpoints")
        )
        assert found.groups.keys() == saved.groups.keys() >= {"weights", "optimizer", "ema"}
        for group, tensors in saved.groups.items():
            assert found.groups[group].keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert torch.equal(found.groups[group][name], tensor), (group, name)
    assert steps_of(moved) == steps_of(whole) == list(range(1, last + 1))
    assert samples(moved) == samples(whole), "a sample is repeated, left out or noised otherwise"
    losses, expected = (
        {line["step"]: line["loss"] for line in read_metrics(run_dir / "metrics.jsonl") if line["split"] == "train"}
        for run_dir in (moved, whole)
    )
    assert losses == pytest.approx(expected, rel=LOSS_LIMIT)
