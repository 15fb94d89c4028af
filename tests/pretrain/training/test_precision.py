"""How a process is set up to compute."""

import subprocess
import sys

import pytest

FAULTS_OF_A_STEP = """
import resource, torch
from braid.pretrain.config.schema import RunConfig
from braid.pretrain.training.precision import prepare_process

prepare_process(RunConfig(threads=1))
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)  # 64 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(), faults()
print(min(faults() for _ in range(3)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
@pytest.mark.parametrize("environment,few", [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "131072"}, False)])
def test_freed_memory_is_used_again_without_page_faults(environment: dict, few: bool) -> None:
    output = subprocess.run([sys.executable, "-c", FAULTS_OF_A_STEP], env=environment, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    assert (int(output.stdout) < 1000) == few, f"{output.stdout.strip()} faults; 64 MiB are 16384 pages of 4 KiB"
