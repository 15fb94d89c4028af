"""The CUDA kernels and their launchers, compiled for the emulator, with the functions of an implementation."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

from torch import Tensor

from braid.kernels import arguments, row_arguments, toolchain

EMULATOR = Path(__file__).parent / "emulator"


class Emulated:
    """What `dispatch.functions` gives, for the emulator."""

    def __init__(self, folder: Path) -> None:
        made = folder / "emulated.so"
        flags = ("-std=c++17", "-O1", "-fPIC", "-shared", *toolchain.EXACT_FLAGS)
        include = (f"-I{toolchain.SOURCES}", f"-I{EMULATOR}")
        command = [toolchain.find().compiler, *flags, *include, str(EMULATOR / "emulated.cpp"), "-o", str(made)]
        subprocess.run(command, check=True)
        self.library = ctypes.CDLL(str(made))

    def normals_into(self, *tensors_and_numbers: Tensor | int) -> None:
        self._launch("braid_launch_normals", arguments.normals(*tensors_and_numbers))

    def noise_into(self, *tensors_and_numbers: Tensor | int | None) -> None:
        self._launch("braid_launch_noising", arguments.noising(*tensors_and_numbers))

    def noise_backward_into(self, *tensors_and_numbers: Tensor | int | None) -> None:
        self._launch("braid_launch_noising_backward", arguments.noising_backward(*tensors_and_numbers))

    def sample_into(self, *tensors_and_numbers: Tensor | float | None) -> None:
        self._launch("braid_launch_sampling", row_arguments.sampling(*tensors_and_numbers))

    def cross_entropy_into(self, *tensors_and_numbers: Tensor | float) -> None:
        self._launch("braid_launch_cross_entropy", row_arguments.cross_entropy(*tensors_and_numbers))

    def _launch(self, name: str, filled: ctypes.Structure) -> None:
        assert getattr(self.library, name)(ctypes.byref(filled), None) == 0
