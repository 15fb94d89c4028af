"""The corpus and the trainers of tests/pretrain/training, for tests that break things."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "pretrain" / "training"))

from training_fixtures import corpus, trainers  # noqa: E402, F401
