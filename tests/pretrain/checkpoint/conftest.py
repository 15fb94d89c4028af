"""Makes the helpers of this folder, and those that start processes, importable by its tests."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent / "training"), str(HERE.parents[1] / "parallel")]

from training_fixtures import corpus, trainers  # noqa: E402, F401
