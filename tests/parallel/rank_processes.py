"""Functions run on several ranks, each a process of its own over gloo, forked from one that has imported everything."""

from __future__ import annotations

import functools
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ports import free_port
from training_runs import Process, WarmPython

from braid.parallel.data_parallel import TIMEOUT_S

RANK_MAIN = Path(__file__).with_name("rank_main.py")
PRELOADED = ("braid.parallel.mesh", "megatron.core", "deepspeed", "pytest")
# Ranks of tests are on the CPU, on a machine with GPUs too.
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
SHOWN = 6000  # characters of a rank's complaints


@functools.cache
def warm_python() -> WarmPython:
    """One for the whole test session."""
    return WarmPython(*PRELOADED, env=ON_CPU | {"PYTHONWARNINGS": "ignore"})


def run_on_ranks(body: Callable, n: int, *args: Any, timeout_s: float = 60, patience_s: float = TIMEOUT_S,
                 lost: Collection[int] = ()) -> list[Any]:  # fmt: skip
    """What `body(world, *args)` returns on each of `n` ranks, by rank.

    body: a function of a module that can be imported (not of a test file). Arguments and results are pickled.
    timeout_s: after that long all ranks are killed, and the error says where each of them stood.
    patience_s: of collectives, with a rank that does not join them.
    lost: ranks that need not return anything: their result is None, and they are killed when the others are done.

    Raises AssertionError with the traceback of a rank that fails, at once; the others are killed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "call").write_bytes(pickle.dumps((sys.path, pickle.dumps((body, args)), patience_s, set(lost))))
        processes = _start(folder, n)
        try:
            _wait({rank: process for rank, process in enumerate(processes) if rank not in lost}, timeout_s)
        finally:
            for process in processes:
                process.signal(signal.SIGKILL)
            for process in processes:
                process.wait()
        files = [folder / f"result-{rank}" for rank in range(n)]
        return [None if rank in lost else pickle.loads(file.read_bytes()) for rank, file in enumerate(files)]


def _start(folder: Path, n: int) -> list[Process]:
    port = free_port()
    environment = os.environ | ON_CPU | {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [str(RANK_MAIN), str(folder)]
    return [
        warm_python().start(
            command, folder, environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, folder / f"rank-{rank}"
        )
        for rank in range(n)
    ]


def _wait(processes: dict[int, Process], timeout_s: float) -> None:
    """Until all have ended well, one has not, or time is up."""
    deadline = time.monotonic() + timeout_s
    while True:
        failed = {rank: process for rank, process in processes.items() if process.code}
        assert not failed, "\n".join(
            f"rank {rank} failed with exit code {process.code}\n{process.err[-SHOWN:]}"
            for rank, process in failed.items()
        )
        running = {rank: process for rank, process in processes.items() if process.code is None}
        if not running:
            return
        if time.monotonic() > deadline:
            for process in running.values():
                process.signal(signal.SIGUSR1)
            time.sleep(0.5)
            stacks = "\n".join(f"rank {rank}:\n{process.err[-SHOWN:]}" for rank, process in running.items())
            raise AssertionError(f"after {timeout_s} s these ranks were still running\n{stacks}")
        warm_python().read_answers(0.05)
