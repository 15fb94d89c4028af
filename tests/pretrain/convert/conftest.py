"""Makes the helpers that start trainers importable by the tests of this folder."""

import sys
from pathlib import Path

PRETRAIN = Path(__file__).parents[1]
sys.path += [str(PRETRAIN / "training"), str(PRETRAIN / "checkpoint")]

from training_fixtures import corpus, trainers  # noqa: E402, F401
