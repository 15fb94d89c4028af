"""CUDA kernels without an nvcc: `csrc/*.cuh` compiled by NVRTC, which every CUDA torch brings, launched by the driver.

The kernels are those of the compiled library; here Python does what their launchers do in C++. A kernel is compiled
when it is first launched on a kind of device, which takes about a second, once in a process.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from braid.kernels.toolchain import SOURCES, BuildError

FLAGS = ("--std=c++17", f"--include-path={SOURCES}")

THREADS, WARP, BLOCKS_PER_PROCESSOR = 256, 32, 8
"""As in csrc/device.cuh and csrc/launch.h."""


@cache
def library() -> ctypes.CDLL:
    """libnvrtc, from where the loader finds it or from the packages torch depends on; BuildError if it is nowhere."""
    major = (torch.version.cuda or "13").partition(".")[0]
    name, builtins = f"libnvrtc.so.{major}", f"libnvrtc-builtins.so.{major}.*"
    folders = [Path(torch.__file__).parent / "lib"]
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec else ():
        folders += sorted(Path(root).glob("*/lib"))
    for folder in folders:
        if (folder / name).exists():
            # It looks for its second half by name, not beside itself.
            for found in folder.glob(builtins):
                ctypes.CDLL(str(found), mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(folder / name))
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise BuildError(f"there is no {name}") from error


def compiled(source: str, expression: str, architecture: int) -> tuple[bytes, str]:
    """Machine code of one kernel, and its name there. `source` is a file of csrc/, `expression` the kernel in C++, with
    its template arguments; `architecture` is 80 for compute capability 8.0."""
    nvrtc, program = library(), ctypes.c_void_p()
    text = f'#include "{source}"\n'.encode()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, b"braid.cu", 0, None, None))
    try:
        _check(nvrtc.nvrtcAddNameExpression(program, expression.encode()))
        flags = [flag.encode() for flag in (*FLAGS, f"--gpu-architecture=sm_{architecture}")]
        if nvrtc.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags)):
            log = _bytes(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode(errors="replace")
            error = next((line for line in log.splitlines() if "error" in line), log[:300])
            raise BuildError(f"NVRTC: {error}")
        lowered = ctypes.c_char_p()
        _check(nvrtc.nvrtcGetLoweredName(program, expression.encode(), ctypes.byref(lowered)))
        name = lowered.value.decode()
        return _bytes(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), name
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _bytes(size_of: ctypes._CFuncPtr, read: ctypes._CFuncPtr, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(read(program, buffer))
    return buffer.raw


def _check(code: int) -> None:
    if code:
        raise BuildError(f"NVRTC error {code}")


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@cache
def _function(source: str, expression: str, device: int) -> ctypes.c_void_p:
    """Loaded into the device's context, which torch has made, and kept."""
    major, minor = torch.cuda.get_device_capability(device)
    code, name = compiled(source, expression, 10 * major + minor)
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check_driver(_driver().cuModuleLoadData(ctypes.byref(module), code))
    _check_driver(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
    return function


def _check_driver(code: int) -> None:
    if code:
        raise RuntimeError(f"braid: a kernel was not launched, CUDA driver error {code}")


def launch(
    source: str,
    expression: str,
    blocks: tuple[int, int],
    arguments: Sequence[ctypes.Structure | ctypes._SimpleCData],
    device: torch.device,
) -> None:
    """Launch on the current stream of `device`."""
    with torch.cuda.device(device):
        function = _function(source, expression, torch.cuda.current_device())
        addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        shape = (*blocks, 1, THREADS, 1, 1)
        _check_driver(_driver().cuLaunchKernel(function, *shape, 0, stream, addresses, None))


def blocks_for(count: int, per_block: int, device: torch.device) -> int:
    """As many as there is work for, or as fill the device."""
    most = torch.cuda.get_device_properties(device).multi_processor_count * BLOCKS_PER_PROCESSOR
    return min(-(-count // per_block), most)
