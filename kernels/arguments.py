"""The structures of csrc/noising.h and csrc/normals.h, filled from tensors: for NVRTC, whose kernels are launched from
Python, and for the emulator of the tests. (The library fills its own, in C++.)

Tensors must live until the kernel has been enqueued; a structure holds addresses alone.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

ADDRESS, INT64, INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class PerPosition(ctypes.Structure):
    _fields_ = [("values", ADDRESS), ("row_stride", INT64), ("column_stride", INT64)]

    @classmethod
    def of(cls, x: Tensor | None) -> PerPosition:
        return cls(None, 0, 0) if x is None else cls(x.data_ptr(), *x.stride())


class NoisingArguments(ctypes.Structure):
    _fields_ = [
        ("tokens", ADDRESS), ("vectors", ADDRESS), ("key", ADDRESS), ("key_value", INT64), ("ordinals", ADDRESS),
        ("positions", ADDRESS), ("keep", ADDRESS), ("weights_by_kind", ADDRESS),
        ("mask_below", PerPosition), ("noise_below", PerPosition), ("alpha", PerPosition), ("sigma", PerPosition),
        ("alpha_corrupted", PerPosition), ("sigma_corrupted", PerPosition),
        ("noised_tokens", ADDRESS), ("kind", ADDRESS), ("latents", ADDRESS), ("eps", ADDRESS), ("weights", ADDRESS),
        ("rows", INT64), ("length", INT64), ("channels", INT64), ("table_rows", INT64),
        ("positions_row_stride", INT64), ("mask_id", INT64), ("num_tokens", INT64), ("first_channel", INT64),
        ("word", INT32), ("draw", INT32), ("embed_noised", INT32),
        ("vectors_bfloat16", INT32), ("latents_bfloat16", INT32),
    ]  # fmt: skip


class NoisingGradients(ctypes.Structure):
    _fields_ = [
        ("forward", NoisingArguments), ("latents_gradient", ADDRESS), ("order", ADDRESS),
        ("vectors_gradient", ADDRESS), ("table_gradient", ADDRESS), ("partials", ADDRESS),
        ("alpha_gradient", ADDRESS), ("sigma_gradient", ADDRESS),
    ]  # fmt: skip


class NormalArguments(ctypes.Structure):
    _fields_ = [
        ("normals", ADDRESS), ("key", ADDRESS), ("key_value", INT64), ("ordinals", ADDRESS), ("positions", ADDRESS),
        ("rows", INT64), ("length", INT64), ("channels", INT64), ("positions_row_stride", INT64),
        ("first_channel", INT64), ("draw", INT32),
    ]  # fmt: skip


def normals(
    out: Tensor, key: Tensor, ordinals: Tensor, positions: Tensor, first_channel: int, draw: int
) -> NormalArguments:
    """Of `normals_into`."""
    rows, length, channels = out.shape
    return NormalArguments(
        normals=_address(out), **_key(key), ordinals=_address(ordinals), positions=_address(positions), rows=rows,
        length=length, channels=channels, positions_row_stride=length if positions.ndim == 2 else 0,
        first_channel=first_channel, draw=draw,
    )  # fmt: skip


def noising(
    tokens: Tensor | None,
    vectors: Tensor | None,
    key: Tensor,
    ordinals: Tensor,
    positions: Tensor,
    keep: Tensor | None,
    weights_by_kind: Tensor | None,
    mask_below: Tensor | None,
    noise_below: Tensor | None,
    alpha: Tensor | None,
    sigma: Tensor | None,
    alpha_corrupted: Tensor | None,
    sigma_corrupted: Tensor | None,
    mask_id: int,
    num_tokens: int,
    first_channel: int,
    word: int,
    draw: int,
    embed_noised: bool,
    latents: Tensor | None,
    noised_tokens: Tensor | None,
    kind: Tensor | None,
    eps: Tensor | None,
    weights: Tensor | None,
) -> NoisingArguments:
    """Of `noise_into`."""
    rows, length = tokens.shape if tokens is not None else latents.shape[:2]
    addresses = {
        "tokens": tokens, "vectors": vectors, "ordinals": ordinals, "positions": positions, "keep": keep,
        "weights_by_kind": weights_by_kind, "noised_tokens": noised_tokens, "kind": kind, "latents": latents,
        "eps": eps, "weights": weights,
    }  # fmt: skip
    per_position = {
        "mask_below": mask_below, "noise_below": noise_below, "alpha": alpha, "sigma": sigma,
        "alpha_corrupted": alpha_corrupted, "sigma_corrupted": sigma_corrupted,
    }  # fmt: skip
    return NoisingArguments(
        **_key(key), **{name: _address(tensor) for name, tensor in addresses.items()},
        **{name: PerPosition.of(tensor) for name, tensor in per_position.items()},
        rows=rows, length=length, channels=0 if vectors is None else vectors.shape[-1],
        table_rows=0 if vectors is None or vectors.ndim == 3 else vectors.shape[0],
        positions_row_stride=length if positions.ndim == 2 else 0, mask_id=mask_id, num_tokens=num_tokens,
        first_channel=first_channel, word=word, draw=draw, embed_noised=embed_noised,
        vectors_bfloat16=_is_bfloat16(vectors), latents_bfloat16=_is_bfloat16(latents),
    )  # fmt: skip


def noising_backward(
    latents_gradient: Tensor,
    sources: Tensor | None,
    kind: Tensor | None,
    order: Tensor | None,
    vectors: Tensor,
    key: Tensor,
    ordinals: Tensor,
    positions: Tensor,
    alpha: Tensor,
    alpha_corrupted: Tensor | None,
    first_channel: int,
    draw: int,
    vectors_gradient: Tensor | None,
    table_gradient: Tensor | None,
    partials: Tensor | None,
    alpha_gradient: Tensor | None,
    sigma_gradient: Tensor | None,
) -> NoisingGradients:
    """Of `noise_backward_into`. The coefficients of the noise are not needed; alpha's stand in for them."""
    forward = noising(
        sources, vectors, key, ordinals, positions, None, None, None, None, alpha, alpha, alpha_corrupted,
        alpha_corrupted, 0, 0, first_channel, 0, draw, False, latents_gradient, None, kind, None, None,
    )  # fmt: skip
    forward.latents = None
    tensors = (latents_gradient, order, vectors_gradient, table_gradient, partials, alpha_gradient, sigma_gradient)
    return NoisingGradients(forward, *map(_address, tensors))


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _is_bfloat16(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype == torch.bfloat16


def _key(key: Tensor) -> dict[str, int | None]:
    """A key on the host goes by value."""
    if key.device.type == "cpu":
        return {"key": None, "key_value": int(key)}
    return {"key": key.data_ptr(), "key_value": 0}
