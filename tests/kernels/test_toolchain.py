"""The CUDA sources compile, by nvcc and by NVRTC, for every architecture, and spill no registers."""

from __future__ import annotations

import re
import subprocess

import pytest

from braid.kernels import nvrtc, toolchain
from braid.kernels.toolchain import BuildError

NVCC = toolchain.find_nvcc()


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
@pytest.mark.parametrize("source", sorted(path.name for path in toolchain.SOURCES.glob("*_cuda.cu")))
def test_nvcc_compiles_for_all_architectures_without_spilling(source, tmp_path):
    architectures = toolchain.known_architectures(NVCC)
    command = [NVCC, *toolchain.nvcc_flags(architectures), "-Xptxas", "-v", "-c", str(toolchain.SOURCES / source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "made.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill", done.stdout + done.stderr)]
    assert len(spilled) >= 2 * len(architectures) and not any(spilled)


KERNELS = [
    ("normals.cuh", "braid::normals_kernel"),
    ("noising.cuh", "braid::noising_kernel<float, braid::bfloat16, true>"),
    ("noising.cuh", "braid::noising_backward_kernel<braid::bfloat16, float, false, true>"),
    ("noising.cuh", "braid::table_pieces_kernel<float>"),
    ("noising.cuh", "braid::table_partials_kernel"),
    ("sampling.cuh", "braid::sampling_kernel<float>"),
    ("cross_entropy.cuh", "braid::cross_entropy_kernel<braid::bfloat16>"),
]


@pytest.mark.parametrize("source, kernel", KERNELS)
def test_nvrtc_compiles(source, kernel):
    try:
        nvrtc.library()
    except BuildError as error:
        pytest.skip(str(error))
    code, name = nvrtc.compiled(source, kernel, 90)
    assert code[:4] == b"\x7fELF" and name.encode() in code


def test_nvrtc_says_what_is_wrong():
    try:
        nvrtc.library()
    except BuildError as error:
        pytest.skip(str(error))
    with pytest.raises(BuildError, match="NVRTC.*error"):
        nvrtc.compiled("noising.cuh", "braid::no_such_kernel", 90)
