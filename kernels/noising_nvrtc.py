"""The kernels of csrc/noising.cuh and csrc/normals.cuh, launched by `nvrtc.py`: what csrc/*_cuda.cu do in C++."""

from __future__ import annotations

import ctypes

from torch import Tensor

from braid.kernels import arguments, nvrtc
from braid.kernels.noising import PIECE

CHANNELS_PER_WARP = 128
TYPES = ("float", "braid::bfloat16")
FLAGS = ("false", "true")


def normals_into(out: Tensor, key: Tensor, ordinals: Tensor, positions: Tensor, first_channel: int, draw: int) -> None:
    filled = arguments.normals(out, key, ordinals, positions, first_channel, draw)
    num_blocks = -(-(first_channel % 4 + filled.channels) // 4)
    blocks = nvrtc.blocks_for(filled.rows * filled.length * num_blocks, nvrtc.THREADS, out.device)
    nvrtc.launch("normals.cuh", "braid::normals_kernel", (blocks, 1), (filled,), out.device)


def noise_into(*tensors_and_numbers: Tensor | int | None) -> None:
    a = arguments.noising(*tensors_and_numbers)
    device = next(x.device for x in tensors_and_numbers[3:] if isinstance(x, Tensor))
    eights = in_eights(a, a.latents, a.eps)
    lanes = lanes_for(a, eights)
    blocks = nvrtc.blocks_for(a.rows * a.length, nvrtc.THREADS // lanes, device)
    kernel = _kernel("noising_kernel", TYPES[a.vectors_bfloat16], TYPES[a.latents_bfloat16], FLAGS[eights])
    nvrtc.launch("noising.cuh", kernel, (blocks, 1), (a, ctypes.c_int(lanes)), device)


def noise_backward_into(latents_gradient: Tensor, *tensors_and_numbers: Tensor | int | None) -> None:
    g = arguments.noising_backward(latents_gradient, *tensors_and_numbers)
    a, device, latent = g.forward, latents_gradient.device, TYPES[g.forward.latents_bfloat16]
    count = a.rows * a.length
    if g.vectors_gradient or g.alpha_gradient or g.sigma_gradient or (g.table_gradient and not g.order):
        eights = in_eights(a, g.latents_gradient, g.vectors_gradient, g.table_gradient)
        lanes = lanes_for(a, eights)
        blocks = nvrtc.blocks_for(count, nvrtc.THREADS // lanes, device)
        flags = FLAGS[eights], FLAGS[bool(g.sigma_gradient)]
        kernel = _kernel("noising_backward_kernel", TYPES[a.vectors_bfloat16], latent, *flags)
        nvrtc.launch("noising.cuh", kernel, (blocks, 1), (g, ctypes.c_int(lanes)), device)
    if g.table_gradient and g.order:
        num_pieces, warps = -(-count // PIECE), nvrtc.THREADS // nvrtc.WARP
        shape = (-(-num_pieces // warps), -(-a.channels // CHANNELS_PER_WARP))
        nvrtc.launch("noising.cuh", _kernel("table_pieces_kernel", latent), shape, (g,), device)
        nvrtc.launch("noising.cuh", "braid::table_partials_kernel", shape, (g,), device)


def in_eights(a: arguments.NoisingArguments, *addresses: int | None) -> bool:
    """Whether channels can be taken eight at a time, 16 bytes to an access."""
    aligned = all((address or 0) % 16 == 0 for address in (a.vectors, *addresses))
    return a.channels % 8 == 0 and a.first_channel % 4 == 0 and aligned


def lanes_for(a: arguments.NoisingArguments, eights: bool) -> int:
    """Threads to a position, a power of two."""
    pieces = a.channels // 8 if eights else -(-(a.first_channel % 4 + a.channels) // 4)
    lanes = 1
    while lanes < nvrtc.WARP and lanes < pieces:
        lanes *= 2
    return lanes


def _kernel(name: str, *template_arguments: str) -> str:
    return f"braid::{name}<{', '.join(template_arguments)}>"
