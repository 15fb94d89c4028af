"""Contenders take turns, medians do not follow outliers, and the ceilings are of this machine's order."""

import itertools
import time

import pytest
import torch

from braid.kernels.bench.measure import (
    as_json,
    copy_bytes_per_second,
    interleaved,
    machine,
    matmul_flops_per_second,
)

CPU = torch.device("cpu")


def test_contenders_take_turns_and_warm_up_first():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = interleaved(contenders, CPU, rounds=3, warmup=2)
    assert "".join(calls) == "aabb" + "ab" * 3
    assert {timing.rounds for timing in timings.values()} == {3}


def test_one_slow_round_does_not_count():
    pauses = itertools.chain([0.002, 0.2], itertools.repeat(0.002))
    timings = interleaved({"paused": lambda: time.sleep(next(pauses))}, CPU, rounds=9, warmup=1)
    assert 2 <= timings["paused"].median_ms < 100
    assert timings["paused"].first_quartile_ms <= timings["paused"].median_ms <= timings["paused"].third_quartile_ms


def test_time_that_is_up_ends_it_after_three_rounds():
    timings = interleaved({"slow": lambda: time.sleep(0.01)}, CPU, rounds=1000, warmup=0, seconds=0.0)
    assert timings["slow"].rounds == 3
    assert as_json(timings)["slow"]["rounds"] == 3


def test_ceilings():
    assert 1e8 < copy_bytes_per_second(CPU) < 1e13
    assert 1e8 < matmul_flops_per_second(CPU, torch.float32) < 1e15
    assert machine(CPU)["threads"] >= 1


def test_a_failure_passes_through():
    with pytest.raises(ZeroDivisionError):
        interleaved({"broken": lambda: 1 / 0}, CPU)
