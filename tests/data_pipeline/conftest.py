"""Makes the helpers of this folder (small_corpus, stores) importable by its tests, and serves their `folder`."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture
def server(folder):
    """The test file's corpus `folder` behind a store that fails as it is told."""
    from stores import FaultyServer

    server = FaultyServer(folder)
    yield server
    server.stop()
