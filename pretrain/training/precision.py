"""Device and precision of a run: how the forward pass is computed. Weights, losses and times are never bf16."""

from __future__ import annotations

import os
from contextlib import nullcontext

import torch

from braid.pretrain.config.schema import RunConfig


def prepare_process(config: RunConfig) -> None:
    """Threads and determinism of this process. Called once, before anything is computed."""
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
