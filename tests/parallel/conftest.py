"""Makes the helpers of this folder, and those that start processes, importable by its tests."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent / "pretrain" / "training")]

from rank_processes import run_on_ranks  # noqa: E402
from training_fixtures import asynchronous_io  # noqa: E402, F401


@pytest.fixture(scope="session")
def ranks():
    """`ranks(body, n, *args)`: what `body(world, *args)` returns on each of n processes (rank_processes.py)."""
    return run_on_ranks
