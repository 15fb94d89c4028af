"""Makes the helpers of this folder importable by its tests, and its fixtures known to them."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

from training_fixtures import asynchronous_io, corpus, trainers  # noqa: E402, F401
