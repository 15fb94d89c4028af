"""`braid::normal`: standard normals of the noise contract as one operation, which torch.compile leaves as it is.

`random.normal` is how it is called. The operation exists for every implementation alike; the key is a tensor, so that
graphs hold for all keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from braid.kernels import dispatch

LIBRARY = torch.library.Library("braid", "FRAGMENT")
LIBRARY.define(
    "normal(Tensor key, Tensor ordinals, Tensor positions, int channels, int first_channel, int draw) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def as_key(key: int | Tensor) -> Tensor:
    """int64 []: the bits of a 64-bit unsigned key. An int becomes a tensor on the host."""
    if isinstance(key, Tensor):
        assert key.dtype == torch.int64 and key.numel() == 1
        return key
    assert 0 <= key < 1 << 64, f"a key has 64 unsigned bits: {key}"
    return torch.tensor(key - (1 << 64) if key >> 63 else key, device="cpu")


def near(key: Tensor, device: torch.device) -> Tensor:
    """The key where kernels on `device` can read it: on the host, from where it goes by value, or there."""
    return key if key.device.type == "cpu" else key.to(device)


def as_int(key: Tensor) -> int:
    """The unsigned key of `as_key`."""
    return int(key) & (1 << 64) - 1


def _draw(key: Tensor, ordinals: Tensor, positions: Tensor, channels: int, first_channel: int, draw: int) -> Tensor:
    normals = _empty(key, ordinals, positions, channels, first_channel, draw)
    if normals.numel():
        functions = dispatch.functions("normals", ordinals.device)
        key = near(key, ordinals.device)
        functions.normals_into(normals, key, ordinals.contiguous(), positions.contiguous(), first_channel, draw)
    return normals


def _empty(key: Tensor, ordinals: Tensor, positions: Tensor, channels: int, first_channel: int, draw: int) -> Tensor:
    return ordinals.new_empty((ordinals.shape[0], positions.shape[-1], channels), dtype=torch.float32)


for device in ("CPU", "CUDA"):
    LIBRARY.impl("normal", _draw, device)
torch.library.register_fake("braid::normal", _empty, lib=LIBRARY)
