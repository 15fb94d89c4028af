"""Timing several ways to do one thing against each other, and what the machine could do at most.

Contenders take turns in one process, so that a busy neighbour, a warm cache or a falling clock meets all of them alike;
what is reported of each is the median of its rounds. Compare figures of one call only: those of different calls, or of
different days, were taken on machines in different states.
"""

from __future__ import annotations

import contextlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

FLUSHED_BYTES = 1 << 28
"""Written between rounds on a GPU: more than any cache holds, so that no contender finds its operands there."""
COPIED_BYTES = 1 << 28
"""Size of the buffers of the copy ceiling; a CPU's is a quarter of it."""
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True)
class Timing:
    """Of one contender, in milliseconds."""

    median_ms: float
    first_quartile_ms: float
    third_quartile_ms: float
    rounds: int


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = 20,
    warmup: int = 2,
    seconds: float = 60.0,
) -> dict[str, Timing]:
    """Time the contenders in turn: `rounds` rounds, or as many as fit into `seconds`, but three at least.

    The first `warmup` calls of each, in which it may compile or fill its caches, do not count. An exception of a
    contender passes through.
    """
    for contender in contenders.values():
        for _ in range(warmup):
            contender()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    started = time.perf_counter()
    for number in range(rounds):
        if number >= 3 and time.perf_counter() - started > seconds:
            break
        for name, contender in contenders.items():
            times[name].append(_milliseconds(contender, device))
    return {name: _timing(values) for name, values in times.items()}


def copy_bytes_per_second(device: torch.device) -> float:
    """Bytes read and written per second by the fastest of some large copies: the ceiling of whatever streams."""
    size = COPIED_BYTES if device.type == "cuda" else COPIED_BYTES // 4
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    fastest = min(_milliseconds(lambda: target.copy_(source), device) for _ in range(8))
    return 2 * size / fastest * 1e3


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the fastest of some large square products: the ceiling of whatever multiplies."""
    size = MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    fastest = min(_milliseconds(lambda: a @ b, device) for _ in range(8))
    return 2 * size**3 / fastest * 1e3


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures of this process were taken on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def as_json(timings: Mapping[str, Timing]) -> dict[str, dict[str, float]]:
    """For a report."""
    return {name: asdict(timing) for name, timing in timings.items()}


def _processor() -> str:
    """As the kernel names it, on Linux."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _timing(values: list[float]) -> Timing:
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, first, third, len(values))


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return (time.perf_counter() - started) * 1e3
    torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device).zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
