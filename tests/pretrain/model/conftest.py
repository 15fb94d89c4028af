"""bfloat16 on the CPU, and the small corpora of the data pipeline's tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Some virtual machines advertise AMX and kill the process that uses it. oneDNN reads this when it is first used.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
sys.path.append(str(Path(__file__).parents[2] / "data_pipeline"))  # small_corpus
