"""Trainers as processes, started in milliseconds and killed for real; and what must be equal between two runs."""

from __future__ import annotations

import atexit
import functools
import itertools
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ports import free_port

from braid.pretrain.checkpoint.folder import Checkpoint, load_checkpoint
from braid.pretrain.checkpoint.store import CheckpointStore
from braid.pretrain.telemetry.metrics_log import read_metrics
from braid.pretrain.training.outcome import read_outcome

HERE = Path(__file__).parent
RECORDED = HERE / "recorded_training.py"
# The last two are what a trainer imports late, in its first step or save.
PRELOADED = ("braid.pretrain.training.run", "braid.pretrain.command", "torch._inductor.config", "safetensors.torch")
VOLATILE = ("tokens_per_second", "mfu", "data_wait", "seconds")
STATUS = {0: "done", 2: "bad_config", 3: "preempted", 4: "failed", 5: "data_exhausted", 130: "failed"}

TINY = {
    "run.device": "cpu", "run.threads": 1, "data.sequence_length": 16, "data.window": 2,
    "model.width": 16, "model.num_layers": 1, "model.num_heads": 2,
    "training.global_batch_size": 8, "training.micro_batch_size": 4, "training.validation_sequences": 8,
    "training.log_every": 4,
}  # fmt: skip
"""A model that steps in milliseconds, over the tiny recipes."""


class Process:
    """A running Python. Its output is in `out` and `err`, complete once it has ended."""

    def __init__(self, python: WarmPython, number: int, pid: int, stdout: Path, stderr: Path) -> None:
        self.python, self.number, self.pid, self.stdout, self.stderr = python, number, pid, stdout, stderr

    @property
    def out(self) -> str:
        return self.stdout.read_text()

    @property
    def err(self) -> str:
        return self.stderr.read_text()

    @property
    def code(self) -> int | None:
        """Exit code, minus the signal for one that was killed; None while it runs."""
        self.python.read_answers(0)
        return self.python.codes.get(self.number)

    def cpu_seconds(self) -> float:
        """Time on a processor so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def wait(self, timeout_s: float = 120) -> int:
        deadline = time.monotonic() + timeout_s
        while self.code is None:
            assert time.monotonic() < deadline, f"still running after {timeout_s} s\n{self.out}\n{self.err}"
            self.python.read_answers(0.05)
        return self.code

    def signal(self, number: int) -> None:
        if self.code is None:
            os.kill(self.pid, number)

    def signal_group(self, number: int) -> None:
        """To the process and all it has started, as a terminal does."""
        os.killpg(self.pid, number)

    def wait_until(self, what: Callable[[], Any], timeout_s: float = 120) -> Any:
        """Poll until `what()` is true; returns it. The process must not end before."""
        deadline = time.monotonic() + timeout_s
        while not (answer := what()):
            assert self.code is None, f"ended with {self.code} before its time\n{self.out}\n{self.err}"
            assert time.monotonic() < deadline, f"nothing after {timeout_s} s\n{self.out}\n{self.err}"
            time.sleep(0.002)
        return answer


class WarmPython:
    """The process of warm_python.py, which has imported `modules`; it ends with this one."""

    def __init__(self, *modules: str, env: dict[str, str] | None = None) -> None:
        self._server = subprocess.Popen(
            [sys.executable, HERE / "warm_python.py", *modules],
            env=os.environ | (env or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._buffered = b""
        self._pids: dict[int, int] = {}
        self.codes: dict[int, int] = {}
        """By the number of the request: a long session uses process ids more than once."""
        self._requests = itertools.count()
        atexit.register(self._close)

    def start(self, argv: list[str], cwd: Path, env: dict[str, str], output: Path) -> Process:
        """`python ARGV` with its streams in the files `output`.out and `output`.err, which are replaced."""
        stdout, stderr = output.with_suffix(".out"), output.with_suffix(".err")
        for file in (stdout, stderr):
            file.write_bytes(b"")
        number = next(self._requests)
        request = {"number": number, "argv": argv, "cwd": str(cwd), "env": env}
        request |= {"stdout": str(stdout), "stderr": str(stderr)}
        self._server.stdin.write(json.dumps(request).encode() + b"\n")
        self._server.stdin.flush()
        while number not in self._pids:
            self.read_answers(60)
        return Process(self, number, self._pids.pop(number), stdout, stderr)

    def _close(self) -> None:
        self._server.stdin.close()
        self._server.wait(10)

    def read_answers(self, timeout_s: float) -> None:
        pipe = self._server.stdout.fileno()
        if not select.select([pipe], [], [], timeout_s)[0]:
            return
        received = os.read(pipe, 1 << 16)
        assert received, "the warm Python is gone"
        *lines, self._buffered = (self._buffered + received).split(b"\n")
        for line in lines:
            match json.loads(line):
                case ["started", number, pid]:
                    self._pids[number] = pid
                case ["ended", number, code]:
                    self.codes[number] = code


@functools.cache
def warm_python() -> WarmPython:
    """One for the whole test session."""
    return WarmPython(*PRELOADED)


class Trainers:
    """Starts `braid pretrain` on one corpus, below one folder. What is still running at the end is killed."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        self.corpus, self.folder = corpus, folder
        self._started: list[Process] = []

    def python(self, *argv: object, env: dict[str, str] | None = None) -> Process:
        """Start `python ARGV` in the folder."""
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        output = self.folder / f"process-{len(self._started)}"
        process = warm_python().start([*map(str, argv)], self.folder, environment | (env or {}), output)
        self._started.append(process)
        return process

    def braid(self, *words: object, env: dict[str, str] | None = None) -> Process:
        """`braid WORDS`, to its end."""
        process = self.python("-m", "braid.launch.cli", *words, env=env)
        process.wait()
        return process

    def start(self, recipe: str, run: str, *, env: dict[str, str] | None = None, recorded: bool = False,
              tiny: bool = True, **fields: object) -> Process:  # fmt: skip
        """Start a run in the folder `run`. Fields are written with two underscores for the dot: training__steps=9.

        recorded: through recorded_training.py, with its record in `<run>.record`.
        """
        words = [recipe, f"run.dir={run}", f"data.path={self.corpus}"]
        words += [f"{name}={value}" for name, value in TINY.items() if tiny]
        words += [f"{name.replace('__', '.')}={value}" for name, value in fields.items()]
        return self.python(*([RECORDED, f"{run}.record"] if recorded else ["-m", "braid.pretrain"]), *words, env=env)

    def start_ranks(self, size: int, recipe: str, run: str, *, env: dict[str, str] | None = None,
                    env_of: dict[int, dict[str, str]] | None = None, **options: Any) -> list[Process]:  # fmt: skip
        """The same on `size` ranks, as torchrun would start them. `env_of`: more of some ranks' environment."""
        port = free_port()
        peers = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        own = [(env or {}) | (env_of or {}).get(rank, {}) for rank in range(size)]
        ranks = [peers | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | own[rank] for rank in range(size)]
        return [self.start(recipe, run, env=environment, **options) for environment in ranks]

    def train(self, recipe: str, run: str, *, code: int = 0, ranks: int = 1, **options: Any) -> Process:
        """Run to the end, which must be `code` on every rank; returns the process of rank 0."""
        if ranks == 1:
            started = [self.start(recipe, run, **options)]
        else:
            started = self.start_ranks(ranks, recipe, run, **options)
        for process in started:
            assert process.wait() == code, f"exit code {process.code}\n{process.out}\n{process.err}"
        return started[0]

    def close(self) -> None:
        for process in self._started:
            process.signal(signal.SIGKILL)
            process.wait()


def assert_refused(process: Process, code: int, *said: str, run_dir: Path | None = None) -> None:
    """It ended with `code` and a message (regular expressions) that has no traceback; outcome.json agrees."""
    assert process.wait() == code, f"exit code {process.code}\n{process.out}\n{process.err}"
    assert "Traceback" not in process.err + process.out, process.err
    assert process.err.startswith("braid: "), process.err
    for pattern in said:
        assert re.search(pattern, process.err), f"no {pattern!r} in\n{process.err}"
    if run_dir is not None:
        assert_outcome(run_dir, code)


def assert_outcome(run_dir: Path, code: int) -> dict[str, Any]:
    outcome = read_outcome(run_dir)
    assert outcome is not None, "no outcome.json"
    assert (outcome["exit_code"], outcome["status"]) == (code, STATUS[code]), outcome
    return outcome


def steps_of(run_dir: Path, split: str = "train") -> list[int]:
    """Steps of the lines in metrics.jsonl."""
    return [record["step"] for record in read_metrics(run_dir / "metrics.jsonl") if record["split"] == split]


def has_lines(run_dir: Path, num: int = 1) -> bool:
    """Whether metrics.jsonl has at least so many whole lines."""
    path = run_dir / "metrics.jsonl"
    return path.exists() and path.read_bytes().count(b"\n") >= num


def checkpoints(run_dir: Path) -> list[int]:
    return CheckpointStore(run_dir / "checkpoints").steps()


def last_checkpoint(run_dir: Path) -> Checkpoint:
    step, path = CheckpointStore(run_dir / "checkpoints").latest_valid()
    assert step == checkpoints(run_dir)[-1], "the newest checkpoint is not valid"
    return load_checkpoint(path)


def steady(record: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl without what measures time."""
    return {name: value for name, value in record.items() if name not in VOLATILE}


def assert_same_run(found: Path, expected: Path) -> None:
    """The last checkpoints hold the same bits; the metrics are the same, each step there once."""
    assert_same_bits(last_checkpoint(found), last_checkpoint(expected))
    found_lines, lines = (read_metrics(run_dir / "metrics.jsonl") for run_dir in (found, expected))
    keys = [(record["step"], record["split"]) for record in found_lines]
    assert len(set(keys)) == len(keys), f"a step is there twice: {keys}"
    assert list(map(steady, found_lines)) == list(map(steady, lines))


def assert_same_bits(found: Checkpoint, expected: Checkpoint) -> None:
    assert found.step == expected.step
    assert {"weights", "optimizer"} <= found.groups.keys() == expected.groups.keys()
    for group, tensors in expected.groups.items():
        assert tensors.keys() == found.groups[group].keys() and tensors
        for name, tensor in tensors.items():
            other = found.groups[group][name]
            assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), (group, name)
            bits = [t.contiguous().view(-1).view(torch.uint8) for t in (tensor, other)]
            assert torch.equal(*bits), f"{group}/{name} differs by {(tensor - other).abs().max()}"
    found_state, state = ({k: v for k, v in c.state.items() if k not in ("seconds", "metrics_offset")}
                          for c in (found, expected))  # fmt: skip
    assert found_state == state


def recorded(run_dir: Path) -> list[dict[str, Any]]:
    """The record of all ranks of a run that was started with `recorded=True`."""
    files = sorted(run_dir.parent.glob(f"{run_dir.name}.record-rank-*"))
    lines = [line for file in files for line in file.read_text().splitlines()]
    assert lines
    return [json.loads(line) for line in lines if line.endswith("}")]  # not what a kill has torn


def samples(run_dir: Path) -> dict[int, dict[str, str]]:
    """Of each step: ordinal -> hash of tokens and draws, the same on all ranks that have the sample."""
    steps: dict[int, dict[str, str]] = {}
    for line in recorded(run_dir):
        for ordinal, digest in line["samples"].items():
            assert steps.setdefault(line["step"], {}).setdefault(ordinal, digest) == digest
    return steps


def step_reached(run_dir: Path) -> int:
    """The last step that rank 0 of a recorded run has begun."""
    record = run_dir.with_name(f"{run_dir.name}.record-rank-0")
    if not record.exists():
        return 0
    with open(record, "rb") as file:
        file.seek(max(0, record.stat().st_size - 4096))
        whole = [line for line in file.read().split(b"\n")[1:] if line.endswith(b"}")]
    return json.loads(whole[-1])["step"] if whole else 0
