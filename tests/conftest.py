"""What all tests share: one thread a process, children that see no stray modules, the `braid` command as a process.

Tests marked `gpu` are skipped where there is no CUDA device. `--summary FILE` writes the outcome of every test as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Before anything imports torch. Results must not depend on the number of cores, and tests share them.
os.environ["OMP_NUM_THREADS"] = "1"
# Children must not find `kernels`, `launch`, ... in the working directory (tests/test_house.py says what that breaks).
os.environ["PYTHONSAFEPATH"] = "1"
# Some virtual machines advertise AMX and kill the process that uses it (bf16). oneDNN reads this when it is first used.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return Path(__file__).parent.parent


@pytest.fixture
def run_braid(tmp_path):
    """`run_braid("pretrain", "tiny_ar", ...)` runs the real command, by default in `tmp_path`."""

    def run(*words, cwd=None, env=None, timeout=120, module="braid.launch.cli") -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", module, *map(str, words)],
            cwd=tmp_path if cwd is None else cwd,
            env=os.environ | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


def pytest_addoption(parser):
    parser.addoption("--summary", metavar="FILE", help="write the outcome of every test to FILE as JSON")
    parser.addoption("--parity", metavar="FILE", help="write the table of tests/parity to FILE as Markdown")


def pytest_collection_modifyitems(items):
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    path = config.getoption("--summary")
    if not path:
        return
    import torch

    outcomes = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")
    reports = {outcome: terminalreporter.getreports(outcome) for outcome in outcomes}
    summary = {
        "exit_status": int(exitstatus),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "counts": {outcome: len(found) for outcome, found in reports.items()},
        "tests": [
            {"test": report.nodeid, "outcome": outcome, "seconds": round(getattr(report, "duration", 0.0), 3)}
            for outcome, found in reports.items()
            for report in found
        ],
    }
    Path(path).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
