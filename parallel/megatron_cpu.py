"""Megatron-core where there is no CUDA: its layers, schedules and optimizers on the CPU, over gloo.

Megatron-core 0.16 computes on any device, but its functions say `torch.cuda.current_device()`,
`torch.cuda.synchronize()` and "cuda". `install` makes these words mean the CPU, in memory, in the modules of MODULES
alone: the constants of their functions are replaced, and what they call `torch` is torch with another `torch.cuda`.
torch itself stays as it is, so nobody else sees a difference. Streams, CUDA graphs, fp16, fp8 and Megatron's own random
numbers (dropout) are left alone and need CUDA.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch

from braid.kernels.capabilities import require
from braid.kernels.errors import ConfigError

SUPPORTED = "0.16."

MODULES = (
    "distributed.param_and_grad_buffer",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "optimizer.optimizer",
    "pipeline_parallel.p2p_communication",
    "pipeline_parallel.schedules",
    "tensor_parallel.layers",
    "tensor_parallel.mappings",
    "utils",
)
"""Those below `megatron.core` that Braid uses and that speak of CUDA where Braid passes."""


def install() -> None:
    """Let Megatron-core run on the CPU in this process. Does nothing where there is CUDA, nor when called again.

    Raises:
        BraidError: Megatron-core is not installed.
        ConfigError: its version is another one than this file knows.
    """
    if torch.cuda.is_available():
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it complains of Transformer Engine and Apex, which need CUDA
        core = require("megatron-core")
    if not core.__version__.startswith(SUPPORTED):
        raise ConfigError(
            f"without CUDA, Megatron-core must be of version {SUPPORTED}*",
            found=core.__version__,
            change="pip install 'braid-lm[megatron]', or train on a GPU",
        )
    for name in MODULES:
        module = importlib.import_module(f"megatron.core.{name}")
        if module.torch is torch:
            for function in _functions(module):
                _move_to_cpu(function)
            module.torch = _TORCH


class _Torch(ModuleType):
    """torch as those modules see it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _Cuda(ModuleType):
    """torch.cuda as they see it: the current device is the CPU, where nothing has to be waited for."""

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def synchronize(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


_TORCH = _Torch("torch")
_TORCH.cuda = _Cuda("torch.cuda")


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    """All functions and methods written in `module`, and the wrappers that decorators put around them."""
    for owner in [module, *(value for value in vars(module).values() if inspect.isclass(value))]:
        for value in vars(owner).values():
            for function in (value.fget, value.fset) if isinstance(value, property) else [value]:
                function = getattr(function, "__func__", function)  # of static and class methods
                while inspect.isfunction(function) and function.__module__ == module.__name__:
                    yield function
                    function = getattr(function, "__wrapped__", None)


def _move_to_cpu(function: FunctionType) -> None:
    """Replace the word in the function's constants and in what a decorator keeps for it (autocast's `device_type`)."""
    function.__code__ = _on_cpu(function.__code__)
    for cell in function.__closure__ or ():
        if isinstance(cell.cell_contents, str):
            cell.cell_contents = _on_cpu(cell.cell_contents)


def _on_cpu(constant: Any) -> Any:
    match constant:
        case "cuda":
            return "cpu"
        case str() if constant.startswith("torch.cuda."):  # names of tensor types
            return constant.replace("torch.cuda.", "torch.", 1)
        case tuple():
            return tuple(map(_on_cpu, constant))
        case CodeType():
            return constant.replace(co_consts=_on_cpu(constant.co_consts))
    return constant
