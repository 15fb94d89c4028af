"""Makes the helpers of this folder (small_corpus) importable by its tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
