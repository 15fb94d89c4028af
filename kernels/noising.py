"""Joint noising: corrupt tokens and noise their vectors in one operation, forward and backward, from one noise key.

For token x of row b at position l, with the numbers of the noise contract (`random.py`):

    u = uniform of word `word` of TOKEN        r = word 1 of TOKEN        eps_c = normal of channel first_channel + c
    x_t = x                            where `keep`
          mask_id                      where u < mask_below           (kind 1)
          the r-th real token          where u < noise_below else     (kind 2; perhaps x itself)
          x                            elsewhere                      (kind 0)
    z_c = alpha e_c + sigma eps_c      each product and the sum rounded to float32, then, if asked, to bfloat16

The r-th real token is i = r num_tokens >> 32, or i + 1 where i >= mask_id. So masked (MDLM, arXiv 2406.07524: no
`noise_below`), uniform (Duo, 2506.10892: no `mask_below`) and hybrid processes (GIDD, 2503.04482) are one rule. e is
the vector of x or of x_t, from a table or given for each position; corrupted tokens may have coefficients of their own.

Neither eps nor u is stored: the backward pass draws eps anew. The results have the same bits on every device, in every
implementation (`dispatch.py`), batching and division. The gradient of a table is a sum over positions: in a fixed order
on the CPU, whatever the number of threads, and on CUDA where torch's deterministic algorithms are on.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from braid.kernels import dispatch
from braid.kernels.normals import LIBRARY, as_key, near
from braid.kernels.reference import MAX_BLOCKS, MAX_DRAWS

PIECE = 128
"""Sorted positions whose gradients one CUDA block adds up; the same number is in csrc/noising.h."""

KEPT, MASKED, REPLACED = 0, 1, 2
"""Kinds of tokens."""

LATENT_TYPES = (torch.float32, torch.bfloat16)


class JointNoising(NamedTuple):
    """What was made; None where there was nothing to make, or where it was not asked for."""

    tokens: Tensor | None
    """x_t, int64 [B, L]."""
    kind: Tensor | None
    """0 as it was, 1 masked, 2 replaced, uint8 [B, L]."""
    latents: Tensor | None
    """z, float32 or bfloat16 [B, L, D]."""
    eps: Tensor | None
    """float32 [B, L, D], a constant."""
    weights: Tensor | None
    """float32 [B, L]."""


def joint_noising(
    tokens: Tensor | None,
    vectors: Tensor | None,
    key: int | Tensor,
    ordinals: Tensor,
    positions: Tensor,
    *,
    mask_below: Tensor | None = None,
    noise_below: Tensor | None = None,
    mask_id: int = -1,
    num_tokens: int = 0,
    keep: Tensor | None = None,
    alpha: Tensor | None = None,
    sigma: Tensor | None = None,
    alpha_corrupted: Tensor | None = None,
    sigma_corrupted: Tensor | None = None,
    embed: Literal["clean", "noised"] = "clean",
    weights_by_kind: Tensor | None = None,
    word: int = 0,
    draw: int = 0,
    first_channel: int = 0,
    dtype: torch.dtype = torch.float32,
    return_eps: bool = False,
) -> JointNoising:
    """Noise B rows of L positions.

    tokens         int64 [B, L]; None with vectors for each position and nothing to corrupt
    vectors        float32 or bfloat16: a table [V, D], or one for each position [B, L, D]; None: tokens alone
    key            the 64-bit noise key, an int or int64 []; as a tensor it may change without recompilation
    ordinals       int64 [B], the samples' places in the global order
    positions      int64 [L] or [B, L], places of tokens in their whole rows
    mask_below, noise_below      thresholds of u, [B] or [B, L]
    mask_id, num_tokens          the mask, and how many real tokens there are (the ids but the mask's)
    keep           bool [B, L], tokens that are never corrupted
    alpha, sigma   [B] or [B, L]; alpha_corrupted and sigma_corrupted, both or neither, for corrupted tokens
    weights_by_kind      float32 [B, 3], what `weights` holds for each kind
    word           which word of TOKEN decides; 1 is the replacement's
    draw, first_channel          of the contract: repetition, and the first channel of a divided D
    dtype          of z

    Thresholds and coefficients are rounded once to float32. Differentiable in vectors, alpha and sigma (all of them).
    A token without a row in the table is an error on the CPU and stops the kernel on CUDA.
    """
    assert tokens is not None or vectors is not None and vectors.ndim == 3, "there is nothing to noise"
    assert vectors is None or (alpha is not None and sigma is not None), "vectors need alpha and sigma"
    assert (alpha_corrupted is None) == (sigma_corrupted is None), "corrupted tokens need both coefficients"
    assert dtype in LATENT_TYPES and (vectors is None or vectors.dtype in LATENT_TYPES)
    assert 0 <= draw < MAX_DRAWS and 0 <= word < 4 and first_channel >= 0
    assert vectors is None or first_channel + vectors.shape[-1] <= 4 * MAX_BLOCKS, "block has 16 bits"
    assert noise_below is None or 0 < num_tokens < 1 << 31, "replacements need the number of tokens"
    per_position = (mask_below, noise_below, alpha, sigma, alpha_corrupted, sigma_corrupted)
    given = (tokens, vectors, ordinals, positions, keep, weights_by_kind, *per_position)
    assert len({x.device for x in given if x is not None}) == 1, "all tensors but the key belong on one device"
    assert all(x is None or x.dtype == torch.int64 for x in (tokens, ordinals, positions))
    assert keep is None or keep.dtype == torch.bool
    assert weights_by_kind is None or weights_by_kind.dtype == torch.float32
    latents, noised_tokens, kind, eps, weights = torch.ops.braid.joint_noising(
        tokens,
        vectors,
        as_key(key),
        ordinals,
        positions,
        keep,
        weights_by_kind,
        *(None if x is None else (x if x.ndim == 2 else x[:, None]).float() for x in per_position),
        mask_id,
        num_tokens,
        first_channel,
        word,
        draw,
        embed == "noised",
        dtype,
        return_eps,
    )
    has_tokens, has_latents = tokens is not None, vectors is not None
    return JointNoising(
        noised_tokens if has_tokens else None,
        kind if has_tokens else None,
        latents if has_latents else None,
        eps if has_latents and return_eps else None,
        weights if weights_by_kind is not None else None,
    )


LIBRARY.define(
    "joint_noising(Tensor? tokens, Tensor? vectors, Tensor key, Tensor ordinals, Tensor positions, Tensor? keep, "
    "Tensor? weights_by_kind, Tensor? mask_below, Tensor? noise_below, Tensor? alpha, Tensor? sigma, "
    "Tensor? alpha_corrupted, Tensor? sigma_corrupted, int mask_id, int num_tokens, int first_channel, int word, "
    "int draw, bool embed_noised, ScalarType dtype, bool return_eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "joint_noising_backward(Tensor latents_gradient, Tensor? sources, Tensor? kind, Tensor vectors, Tensor key, "
    "Tensor ordinals, Tensor positions, Tensor alpha, Tensor? alpha_corrupted, int first_channel, int draw, "
    "bool[3] needed) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _outputs(
    tokens: Tensor | None,
    vectors: Tensor | None,
    key: Tensor,
    ordinals: Tensor,
    positions: Tensor,
    keep: Tensor | None,
    weights_by_kind: Tensor | None,
    *others: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Latents, tokens, kinds, eps and weights, to be filled; those nobody asked for are empty."""
    dtype, return_eps = others[-2:]
    places = tuple(tokens.shape) if tokens is not None else tuple(vectors.shape[:2])
    of_tokens = places if tokens is not None else (0,)
    of_latents = (*places, vectors.shape[-1]) if vectors is not None else (0,)
    return (
        ordinals.new_empty(of_latents, dtype=dtype),
        ordinals.new_empty(of_tokens),
        ordinals.new_empty(of_tokens, dtype=torch.uint8),
        ordinals.new_empty(of_latents if return_eps else (0,), dtype=torch.float32),
        ordinals.new_empty(of_tokens if weights_by_kind is not None else (0,), dtype=torch.float32),
    )


def _forward(
    tokens: Tensor | None,
    vectors: Tensor | None,
    key: Tensor,
    ordinals: Tensor,
    positions: Tensor,
    keep: Tensor | None,
    weights_by_kind: Tensor | None,
    *others: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    thresholds_and_coefficients, numbers, (dtype, return_eps) = others[:6], others[6:12], others[12:]
    inputs = (tokens, vectors, near(key, ordinals.device), ordinals, positions, keep, weights_by_kind)
    outputs = _outputs(*inputs, dtype, return_eps)
    if any(output.numel() for output in outputs):
        places = tokens.shape if tokens is not None else vectors.shape[:2]
        dispatch.functions("noising", ordinals.device).noise_into(
            *(x if x is None else x.contiguous() for x in inputs),
            *(x if x is None else x.expand(places) for x in thresholds_and_coefficients),
            *numbers,
            *(output if output.numel() else None for output in outputs),
        )
    return outputs


def _gradients(
    latents_gradient: Tensor,
    sources: Tensor | None,
    kind: Tensor | None,
    vectors: Tensor,
    key: Tensor,
    ordinals: Tensor,
    positions: Tensor,
    alpha: Tensor,
    alpha_corrupted: Tensor | None,
    first_channel: int,
    draw: int,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors of the backward pass, to be filled; empty where not needed."""
    places = latents_gradient.shape[:2]
    return (
        vectors.new_empty(vectors.shape if needed[0] else (0,)),
        alpha.new_empty(places if needed[1] else (0,)),
        alpha.new_empty(places if needed[2] else (0,)),
    )


def _backward(
    latents_gradient: Tensor,
    sources: Tensor | None,
    kind: Tensor | None,
    vectors: Tensor,
    key: Tensor,
    ordinals: Tensor,
    positions: Tensor,
    alpha: Tensor,
    alpha_corrupted: Tensor | None,
    first_channel: int,
    draw: int,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of vectors, and for each position of the alpha and the sigma it had."""
    key = near(key, vectors.device)
    inputs = (latents_gradient, sources, kind, vectors, key, ordinals, positions, alpha, alpha_corrupted)
    of_vectors, *of_coefficients = _gradients(*inputs, first_channel, draw, needed)
    of_table = order = partials = None
    if needed[0] and vectors.ndim == 2:
        of_table = torch.zeros_like(vectors, dtype=torch.float32)
        if vectors.device.type == "cpu" or torch.are_deterministic_algorithms_enabled():
            order = sources.flatten().argsort(stable=True)
            if vectors.device.type != "cpu":
                partials = of_table.new_empty((-(-len(order) // PIECE), 2, vectors.shape[1]))
    if latents_gradient.numel():
        places = latents_gradient.shape[:2]
        dispatch.functions("noising", vectors.device).noise_backward_into(
            *(x if x is None else x.contiguous() for x in (latents_gradient, sources, kind, order, vectors, key)),
            ordinals.contiguous(),
            positions.contiguous(),
            alpha.expand(places),
            None if alpha_corrupted is None else alpha_corrupted.expand(places),
            first_channel,
            draw,
            of_vectors if needed[0] and of_table is None else None,
            of_table,
            partials,
            *(gradient if gradient.numel() else None for gradient in of_coefficients),
        )
    if of_table is not None:
        of_vectors = of_table.to(vectors.dtype)
    return of_vectors, *of_coefficients


def _save(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    tokens, vectors, key, ordinals, positions = inputs[:5]
    alpha, alpha_corrupted = inputs[9], inputs[11]
    first_channel, draw, embed_noised = inputs[15], inputs[17], inputs[18]
    _, noised, kind, eps, weights = output
    ctx.mark_non_differentiable(noised, kind, eps, weights)
    ctx.set_materialize_grads(False)
    ctx.has_tokens, ctx.numbers = tokens is not None, (first_channel, draw)
    sources = noised if embed_noised or tokens is None else tokens
    ctx.save_for_backward(sources, kind, vectors, key, ordinals, positions, alpha, alpha_corrupted)
    ctx.shapes = [None if x is None else x.shape for x in inputs[9:13]]


def _back_propagate(ctx, *gradients: Tensor | None) -> tuple:
    of_inputs: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if gradients[0] is None:
        return tuple(of_inputs)
    sources, kind, vectors, key, ordinals, positions, alpha, alpha_corrupted = ctx.saved_tensors
    if not ctx.has_tokens:
        sources = kind = None
    wants = ctx.needs_input_grad
    needed = [wants[1], wants[9] or wants[11], wants[10] or wants[12]]
    coefficients = (alpha, alpha_corrupted)
    of_vectors, *of_coefficients = torch.ops.braid.joint_noising_backward(
        gradients[0], sources, kind, vectors, key, ordinals, positions, *coefficients, *ctx.numbers, needed
    )
    of_inputs[1] = of_vectors if wants[1] else None
    for own, gradient in zip((9, 10), of_coefficients, strict=True):
        other = own + 2
        has_other = ctx.shapes[other - 9] is not None and kind is not None
        for place, mine in ((own, kind == 0 if has_other else None), (other, kind != 0 if has_other else None)):
            if wants[place]:
                of_inputs[place] = _reduce(gradient if mine is None else gradient * mine, ctx.shapes[place - 9])
    return tuple(of_inputs)


def _reduce(per_position: Tensor, shape: torch.Size) -> Tensor:
    """Sum over what was broadcast, [B, L] to [B, 1], by halves: one order, whatever the device and its threads."""
    if shape == per_position.shape:
        return per_position
    while per_position.shape[1] > 1:
        half = (per_position.shape[1] + 1) // 2
        rest = torch.nn.functional.pad(per_position[:, half:], (0, 2 * half - per_position.shape[1]))
        per_position = per_position[:, :half] + rest
    return per_position


for device in ("CPU", "CUDA"):
    LIBRARY.impl("joint_noising", _forward, device)
    LIBRARY.impl("joint_noising_backward", _backward, device)
torch.library.register_fake("braid::joint_noising", _outputs, lib=LIBRARY)
torch.library.register_fake("braid::joint_noising_backward", _gradients, lib=LIBRARY)
torch.library.register_autograd("braid::joint_noising", _back_propagate, setup_context=_save, lib=LIBRARY)
