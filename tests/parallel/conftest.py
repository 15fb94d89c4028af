"""Makes rank_bodies importable by the tests of this folder and by the processes they start."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
