"""softmax(q k^T / sqrt K) v, by torch or by the flash-attn package: what every attention of the house comes to.

Shape suffixes: B sequences, H heads, L positions, K head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from braid.kernels.capabilities import require

_library = "torch"


def use_attention(library: str) -> None:
    """Which library computes attention in this process from now on: `torch` or `flash-attn`. BraidError, saying how to
    install it, where it is not there."""
    global _library
    if library != "torch":
        require(library)
    _library = library


def attention(
    q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """[B, H, L, K]; queries may be of another number than keys and values.

    mask: what may be seen, bool that broadcasts to [B, H, queries, keys]. causal: position i sees none above i.
    flash-attn has no masks and computes in half precision; torch does what it does not.
    """
    is_half = q_BHLK.dtype in (torch.bfloat16, torch.float16)
    if _library == "flash-attn" and mask is None and is_half and q_BHLK.is_cuda:
        return _flash(q_BHLK, k_BHLK, v_BHLK, causal)
    return F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, attn_mask=mask, is_causal=causal)


def _flash(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, causal: bool) -> Tensor:
    """By flash-attn 2, whose tensors are [B, L, H, K]; its backward pass is deterministic where torch is told to be."""
    # It aligns the triangle of a causal mask with the last key, and torch with the first.
    assert not causal or q_BHLK.shape[2] == k_BHLK.shape[2]
    q_BLHK, k_BLHK, v_BLHK = (x.transpose(1, 2) for x in (q_BHLK, k_BHLK, v_BHLK))
    deterministic = torch.are_deterministic_algorithms_enabled()
    flash_attn_func = require("flash-attn").flash_attn_func
    return flash_attn_func(q_BLHK, k_BLHK, v_BLHK, causal=causal, deterministic=deterministic).transpose(1, 2)
