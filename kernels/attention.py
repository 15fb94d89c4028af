"""softmax(q k^T / sqrt K) v, by torch or by a FlashAttention package: what every attention of the house comes to.

Shape suffixes: B sequences, H heads, L positions, K head dimension.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from braid.kernels.capabilities import require

PACKAGES = ("flash-attn", "flash-attn-3")
HOPPER = (9, 0)
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""From Hopper on, torch's default, FlashAttention 2, uses no instruction of that generation; cuDNN's kernels do. torch
leaves out by itself what cannot do a call: cuDNN where deterministic algorithms are asked for, and where a mask is."""

_library = "torch"
_order = contextlib.ExitStack()


def use_attention(library: str, device: torch.device | None = None) -> None:
    """Which library computes attention in this process from now on: `torch`, `flash-attn` or `flash-attn-3`.
    BraidError, saying how to install it, where it is not there. `device` is where: of torch's kernels, those that suit
    it come first."""
    global _library
    if library != "torch":
        require(library)
    _library = library
    _order.close()
    if device is not None and device.type == "cuda" and torch.cuda.get_device_capability(device) >= HOPPER:
        _order.enter_context(sdpa_kernel(CUDNN_FIRST, set_priority=True))


def attention(
    q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """[B, H, L, K]; queries may be of another number than keys and values.

    mask: what may be seen, bool that broadcasts to [B, H, queries, keys]. causal: position i sees none above i.
    The packages have no masks and compute in half precision; torch does what they do not. With a mask all pairs are
    computed, those that are not seen as well: the cost of packed documents is that of one long one, and the mask's.
    """
    if mask is not None and causal:
        mask, causal = mask & torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril(), False
    is_half = q_BHLK.dtype in (torch.bfloat16, torch.float16)
    if _library in PACKAGES and mask is None and is_half and q_BHLK.is_cuda:
        return _flash(q_BHLK, k_BHLK, v_BHLK, causal)
    return F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, attn_mask=mask, is_causal=causal)


def _flash(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, causal: bool) -> Tensor:
    """By FlashAttention 2 or 3, whose tensors are [B, L, H, K]; the backward pass is deterministic where torch is told
    to be."""
    # They align the triangle of a causal mask with the last key, and torch with the first.
    assert not causal or q_BHLK.shape[2] == k_BHLK.shape[2]
    q_BLHK, k_BLHK, v_BLHK = (x.transpose(1, 2) for x in (q_BHLK, k_BHLK, v_BHLK))
    deterministic = torch.are_deterministic_algorithms_enabled()
    flash_attn_func = require(_library).flash_attn_func
    found = flash_attn_func(q_BLHK, k_BLHK, v_BLHK, causal=causal, deterministic=deterministic)
    out_BLHK = found[0] if isinstance(found, tuple) else found  # some versions of 3 return the normalisers too
    return out_BLHK.transpose(1, 2)
