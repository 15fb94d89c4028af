"""Device and precision of a run: how the forward pass is computed. Losses, times, and the weights that the optimizer
updates are never bf16."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import nullcontext

import torch

from braid.pretrain.config.schema import RunConfig
from braid.pretrain.objectives.base import Objective

from .optimizer import parameter_kinds

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of two numbers in glibc's malloc.h."""
ENVIRONMENT = ("MALLOC_", "GLIBC_TUNABLES")
KEPT_BYTES, OWN_MAPPING_BYTES = (1 << 31) - 1, 1 << 30


def prepare_process(config: RunConfig) -> None:
    """Threads, memory and determinism of this process. Called once, before anything is computed."""
    _keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses deterministic mode without it
    torch.use_deterministic_algorithms(config.deterministic)
    # Filling fresh memory is a debugging aid that costs time; nothing here reads uninitialised memory.
    torch.utils.deterministic.fill_uninitialized_memory = False


def autocast(precision: str, device: torch.device) -> torch.autocast | nullcontext:
    """Context of a forward pass: bf16 autocast, or nothing for fp32."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def cast_by_autocast(objective: Objective) -> list[str]:
    """Names of the weights that autocast casts to bf16 in every use: the matrices of the network, but for those of
    layers that their class calls `in_float32`. What an objective owns beside its network computes in float32."""
    float32 = {
        id(parameter)
        for owner in objective.modules()
        for layer in getattr(owner, "in_float32", ())
        for parameter in owner.get_submodule(layer).parameters()
    }
    kinds = parameter_kinds(objective)
    return [
        name
        for name, parameter in objective.named_parameters()
        if parameter.requires_grad
        and kinds[name] == "matrix"
        and name.startswith("network.")
        and id(parameter) not in float32
    ]


def _keep_freed_memory() -> bool:
    """Makes malloc keep what it was given back; whether it does.

    By default glibc hands every freed block above 32 MiB back to the system, and every step faults the same pages in
    again: a model with a large vocabulary then spends half of its time on a CPU there (see benchmarks/LOGBOOK.md).
    Whoever has set malloc up in the environment is left alone, and so are other C libraries.
    """
    if not sys.platform.startswith("linux") or any(name.startswith(ENVIRONMENT) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, OWN_MAPPING_BYTES) and mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
