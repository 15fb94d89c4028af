"""The kernels of csrc/sampling.cuh and csrc/cross_entropy.cuh, launched by `nvrtc.py`: one block for each row."""

from __future__ import annotations

import ctypes

from torch import Tensor

from braid.kernels import nvrtc, row_arguments

TYPES = ("float", "braid::bfloat16")


def sample_into(tokens: Tensor, *tensors_and_numbers: Tensor | float | None) -> None:
    a = row_arguments.sampling(tokens, *tensors_and_numbers)
    _launch("sampling", a, a.count, tokens)


def cross_entropy_into(logits: Tensor, *tensors_and_numbers: Tensor | float) -> None:
    a = row_arguments.cross_entropy(logits, *tensors_and_numbers)
    _launch("cross_entropy", a, a.rows, logits)


def _launch(name: str, filled: ctypes.Structure, rows: int, on: Tensor) -> None:
    blocks = nvrtc.blocks_for(rows, 1, on.device)
    kernel = f"braid::{name}_kernel<{TYPES[filled.bfloat16]}>"
    nvrtc.launch(f"{name}.cuh", kernel, (blocks, 1), (filled,), on.device)
