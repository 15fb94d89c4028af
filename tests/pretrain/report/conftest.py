"""Makes the helpers of this folder (synthetic_run, report_page) importable by its tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
