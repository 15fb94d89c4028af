"""Megatron-core where there is no CUDA: its layers, schedules and optimizers on the CPU, over gloo.

Megatron-core 0.16 computes on any device, but its functions say `torch.cuda.current_device()`,
`torch.cuda.synchronize()` and "cuda". `install` makes these words mean the CPU, in memory, in the modules of MODULES
alone: the constants of their functions are replaced, and what they call `torch` is torch with another `torch.cuda`.
torch itself stays as it is, so nobody else sees a difference. Streams, CUDA graphs, fp16, fp8 and Megatron's own random
numbers (dropout) are left alone and need CUDA.

What Megatron hands to torch to be sent together goes one by one. Where torch gathers together over gloo (2.13 at least:
`all_gather_into_tensor` inside its `_coalescing_manager`), memory is corrupted now and then, and the process dies a
little later in some other place.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
            if hasattr(module, "_coalescing_manager"):
                module._coalescing_manager = _one_by_one
                module.dist_all_gather_func = _begun(torch.distributed.all_gather_into_tensor)
                module.dist_reduce_scatter_func = _begun(torch.distributed.reduce_scatter_tensor)


class _Seen(ModuleType):
    """A module as those modules see it, with what is set here in place of its own."""

    def __init__(self, module: ModuleType, **others: Any) -> None:
        super().__init__(module.__name__)
        self.module = module
        vars(self).update(others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class _Handle:
    """What was begun under `_one_by_one`."""

    def __init__(self) -> None:
        self.works: list[torch.distributed.Work] = []

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        self.works.clear()


_open: list[_Handle] = []
"""Of the managers that have been entered; the last one is told what is begun."""


@contextmanager
def _one_by_one(group: torch.distributed.ProcessGroup, async_ops: bool = False) -> Iterator[_Handle]:
    """In place of torch's `_coalescing_manager`: see the docstring of the module. Each collective names its group."""
    handle = _Handle()
    _open.append(handle)
    try:
        yield handle
    finally:
        _open.pop()
    if not async_ops:
        handle.wait()


def _begun(collective: Callable) -> Callable:
    """A collective of torch's that tells the manager, where there is one, what it has begun."""

    @functools.wraps(collective)
    def begin(*args: Any, async_op: bool = False, **kwargs: Any) -> torch.distributed.Work | None:
        work = collective(*args, async_op=async_op or bool(_open), **kwargs)
        if _open and work is not None:  # None: this rank is not in the group
            _open[-1].works.append(work)
        return work

    return begin


_TORCH = _Seen(
    torch,
    # The current device is the CPU, where nothing has to be waited for.
    cuda=_Seen(torch.cuda, current_device=lambda: torch.device("cpu"), synchronize=lambda: None),
    distributed=_Seen(torch.distributed, all_reduce=_begun(torch.distributed.all_reduce)),
)


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
