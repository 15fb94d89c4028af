"""Which implementation of a fused operation runs: the one place that decides.

    compiled   the shared library (`library.py`); on CUDA without an nvcc, its kernels through NVRTC (`nvrtc.py`)
    triton     Triton's, on CUDA
    eager      plain torch operations, anywhere

BRAID_KERNELS names one; `auto`, the default, is the first of them that works on the device. All give the same bits in
the forward direction. An operation's functions have the same names and arguments in every implementation and fill
tensors that their caller has made.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from braid.kernels import library, nvrtc
from braid.kernels.errors import BraidError
from braid.kernels.toolchain import BuildError

NAMES = ("auto", "compiled", "triton", "eager")

MODULES = {
    "normals": {
        "nvrtc": "braid.kernels.noising_nvrtc",
        "triton": "braid.kernels.noising_triton",
        "eager": "braid.kernels.random",
    },
    "noising": {
        "nvrtc": "braid.kernels.noising_nvrtc",
        "triton": "braid.kernels.noising_triton",
        "eager": "braid.kernels.noising_eager",
    },
    "sampling": {
        "nvrtc": "braid.kernels.row_nvrtc",
        "triton": "braid.kernels.sampling_triton",
        "eager": "braid.kernels.sampling_eager",
    },
    "cross_entropy": {
        "nvrtc": "braid.kernels.row_nvrtc",
        "triton": "braid.kernels.cross_entropy_triton",
        "eager": "braid.kernels.cross_entropy_eager",
    },
}
"""Operation -> implementation -> where its functions are; those of the library are in `torch.ops.braid`."""


@dataclass(frozen=True)
class Choice:
    """What runs on a kind of device, and why."""

    name: str
    """compiled, nvrtc, triton or eager."""
    reason: str


def functions(operation: str, device: torch.device) -> Any:
    """What holds the functions of `operation` for tensors on `device`."""
    return _functions(operation, device.type)


@cache
def _functions(operation: str, device_type: str) -> Any:
    name = choose(device_type).name
    if name == "compiled":
        return torch.ops.braid
    return importlib.import_module(MODULES[operation][name])


@cache
def choose(device_type: str) -> Choice:
    """The implementation for tensors on `cpu`, `cuda`, ...; BraidError if BRAID_KERNELS asks for what is not there."""
    asked = os.environ.get("BRAID_KERNELS", "auto")
    if asked not in NAMES:
        raise BraidError("BRAID_KERNELS is unknown", found=asked, change=f"use one of {', '.join(NAMES)}")
    if asked == "eager":
        return Choice("eager", "BRAID_KERNELS=eager")
    if asked == "triton" and device_type != "cuda":
        return Choice("eager", "BRAID_KERNELS=triton is for CUDA")
    missing = []
    for name, available in (("compiled", _compiled), ("triton", _triton)):
        if asked in ("auto", name):
            choice = available(device_type)
            if choice.name != "eager":
                return choice
            missing.append(f"{name}: {choice.reason}")
    if asked != "auto":
        raise BraidError(
            f"BRAID_KERNELS={asked} cannot be used on {device_type}",
            found=missing[0],
            change="mend that, or set BRAID_KERNELS=auto for the best there is",
        )
    return Choice("eager", "; ".join(missing))


def _compiled(device_type: str) -> Choice:
    if device_type not in ("cpu", "cuda"):
        return Choice("eager", f"there are no kernels for {device_type}")
    found = library.load()
    if found.loaded and (device_type == "cpu" or found.cuda):
        return Choice("compiled", found.found)
    if device_type == "cpu":
        return Choice("eager", found.found)
    try:
        nvrtc.library()
    except BuildError as error:
        return Choice("eager", f"{found.found}; {error}")
    return Choice("nvrtc", f"compiled when first used, for the library has no CUDA ({found.found})")


def _triton(device_type: str) -> Choice:
    if device_type != "cuda":
        return Choice("eager", "it is for CUDA")
    if importlib.util.find_spec("triton") is None:
        return Choice("eager", "not installed")
    return Choice("triton", f"version {importlib.metadata.version('triton')}")
