"""Makes small_networks and memory_bodies importable by the tests of this folder, and processes startable by them."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TESTS = HERE.parent.parent
sys.path += [str(HERE), str(TESTS / "parallel"), str(TESTS / "pretrain" / "training")]

from rank_processes import run_on_ranks  # noqa: E402


@pytest.fixture(scope="session")
def ranks():
    """`ranks(body, n, *args)`: what `body(world, *args)` returns on each of n processes (rank_processes.py)."""
    return run_on_ranks
