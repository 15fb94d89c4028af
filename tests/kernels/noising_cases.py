"""Random calls of joint noising, with what NumPy makes of them: shared by the tests of its implementations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from braid.kernels import reference
from braid.kernels.noising import PIECE, JointNoising
from braid.kernels.normals import as_key

FAR = 1 << 33


@dataclass
class Case:
    """Arguments of `joint_noising`."""

    tokens: Tensor | None
    vectors: Tensor | None
    key: int
    ordinals: Tensor
    positions: Tensor
    options: dict[str, Any]

    @property
    def arguments(self) -> tuple:
        return self.tokens, self.vectors, self.key, self.ordinals, self.positions

    def shape(self) -> tuple[int, int]:
        return tuple(self.tokens.shape if self.tokens is not None else self.vectors.shape[:2])


def random_case(seed: int, *, channels: int | None = None) -> Case:
    """Small and odd: every option is there in some cases and not in others."""
    rng = np.random.default_rng(seed)

    def often(share: float = 0.5) -> bool:
        return bool(rng.random() < share)

    rows, length = int(rng.integers(1, 5)), int(rng.integers(1, 9))
    channels = channels or int(rng.choice([1, 3, 8, 16, 24, 63, 64, 70, 128, 136, 200]))
    vocab = int(rng.integers(3, 40))
    mask_id = int(rng.integers(0, vocab))
    has_tokens, has_vectors = often(0.85), often(0.85)
    has_vectors = has_vectors or not has_tokens

    def per_position(low: float = -1.0, high: float = 1.0) -> Tensor:
        shape = (rows, length) if often() else (rows,)
        return torch.from_numpy(rng.uniform(low, high, shape).astype(np.float32))

    tokens = torch.from_numpy(rng.integers(0, vocab, (rows, length))) if has_tokens else None
    vectors = None
    if has_vectors:
        shape = (vocab, channels) if has_tokens and often(0.6) else (rows, length, channels)
        dtype = torch.bfloat16 if often() else torch.float32
        vectors = torch.from_numpy(rng.normal(size=shape).astype(np.float32)).to(dtype)
    options: dict[str, Any] = {"draw": int(rng.integers(256)), "mask_id": mask_id, "num_tokens": vocab - 1}
    if has_tokens:
        options["word"] = int(rng.choice([0, 0, 2, 3]))
        if often(0.8):
            options["mask_below"] = per_position(0, 0.6)
        if often(0.6):
            options["noise_below"] = per_position(0.2, 1.0)
        if often():
            options["keep"] = torch.from_numpy(rng.random((rows, length)) < 0.3)
        if often():
            options["weights_by_kind"] = torch.from_numpy(rng.random((rows, 3)).astype(np.float32))
    if has_vectors:
        options |= {"alpha": per_position(), "sigma": per_position(0, 2)}
        if has_tokens and often(0.4):
            options |= {"alpha_corrupted": per_position(), "sigma_corrupted": per_position(0, 2)}
        options |= {
            "embed": "noised" if often() else "clean",
            "dtype": torch.bfloat16 if often() else torch.float32,
            "return_eps": often(),
            "first_channel": int(rng.choice([0, 0, 4, 8, 1, 6, 1021])),
        }
    ordinals = torch.from_numpy(rng.integers(0, 2 * FAR, rows))
    positions = torch.from_numpy(rng.integers(0, 2**32, (rows, length) if often(0.3) else length))
    return Case(tokens, vectors, int(rng.integers(0, 2**64, dtype=np.uint64)), ordinals, positions, options)


def expected(case: Case) -> JointNoising:
    """By `reference.py`."""
    options, (rows, length) = case.options, case.shape()

    def wide(name: str) -> np.ndarray | None:
        if name not in options:
            return None
        x = options[name].numpy()
        return np.broadcast_to(x if x.ndim == 2 else x[:, None], (rows, length))

    ordinals, positions = case.ordinals.numpy(), case.positions.numpy()
    noised = kind = latents = eps = weights = None
    if case.tokens is not None:
        named = {name: options[name] for name in ("mask_id", "num_tokens", "draw", "word") if name in options}
        named |= {"keep": options["keep"].numpy()} if "keep" in options else {}
        noised, kind = reference.noised_tokens(
            case.key, case.tokens.numpy(), ordinals, positions,
            mask_below=wide("mask_below"), noise_below=wide("noise_below"), **named,
        )  # fmt: skip
        if "weights_by_kind" in options:
            weights = torch.from_numpy(np.take_along_axis(options["weights_by_kind"].numpy(), kind.astype(int), 1))
    if case.vectors is not None:
        table = case.vectors.float().numpy()
        clean = table if table.ndim == 3 else table[noised if options["embed"] == "noised" else case.tokens.numpy()]
        first, draw = options["first_channel"], options["draw"]
        drawn = reference.normal(case.key, ordinals, positions, table.shape[-1], draw=draw, first_channel=first)
        alpha, sigma = (
            own if (other := wide(f"{name}_corrupted")) is None else np.where(kind == 0, own, other)
            for name in ("alpha", "sigma")
            for own in [wide(name)]
        )
        latents = torch.from_numpy(reference.noised_latents(clean, drawn, alpha, sigma)).to(options["dtype"])
        eps = torch.from_numpy(drawn) if options["return_eps"] else None
    tokens, kind = (None if x is None else torch.from_numpy(x) for x in (noised, kind))
    return JointNoising(tokens, kind, latents, eps, weights)


def gradients(functions: Any, case: Case, latents_gradient: Tensor, *, ordered: bool) -> tuple[Tensor, ...]:
    """The backward pass of `functions` (an implementation) for a case with vectors: gradients of vectors or table, and
    of alpha and sigma at each position. All outputs start as NaN, but for the table's, which is 0 before."""
    options, (rows, length), wanted = case.options, case.shape(), expected(case)
    vectors, is_table = case.vectors, case.vectors.ndim == 2
    sources = order = partials = of_vectors = of_table = None
    if case.tokens is not None:
        sources = wanted.tokens if options["embed"] == "noised" else case.tokens
    if is_table:
        of_table = torch.zeros(vectors.shape)
        order = sources.flatten().argsort(stable=True) if ordered else None
        partials = torch.full((-(-rows * length // PIECE), 2, vectors.shape[1]), torch.nan)
    else:
        of_vectors = torch.full_like(vectors, torch.nan)
    of_alpha, of_sigma = torch.full((2, rows, length), torch.nan).unbind()

    def wide(name: str) -> Tensor | None:
        x = options.get(name)
        return None if x is None else (x if x.ndim == 2 else x[:, None]).expand(rows, length)

    functions.noise_backward_into(
        latents_gradient, sources, wanted.kind, order, vectors, as_key(case.key), case.ordinals, case.positions,
        wide("alpha"), wide("alpha_corrupted"), options["first_channel"], options["draw"], of_vectors, of_table,
        partials, of_alpha, of_sigma,
    )  # fmt: skip
    return of_table if is_table else of_vectors, of_alpha, of_sigma


def expected_gradients(case: Case, latents_gradient: Tensor) -> tuple[Tensor, ...]:
    """By autograd in float64, the coefficients being those of each position."""
    options, (rows, length), wanted = case.options, case.shape(), expected(case)
    eps = reference.normal(
        case.key, case.ordinals.numpy(), case.positions.numpy(), case.vectors.shape[-1], draw=options["draw"],
        first_channel=options["first_channel"],
    )  # fmt: skip
    vectors = case.vectors.double().requires_grad_()
    coefficients = []
    for name in ("alpha", "sigma"):
        own, other = (options.get(full) for full in (name, f"{name}_corrupted"))
        own, other = (
            None if x is None else (x if x.ndim == 2 else x[:, None]).expand(rows, length) for x in (own, other)
        )
        used = own if other is None else torch.where(wanted.kind == 0, own, other)
        coefficients.append(used.double().requires_grad_())
    clean = vectors
    if vectors.ndim == 2:
        clean = vectors[wanted.tokens if options["embed"] == "noised" else case.tokens]
    z = coefficients[0][..., None] * clean + coefficients[1][..., None] * torch.from_numpy(eps).double()
    return torch.autograd.grad(z, (vectors, *coefficients), latents_gradient.double())


def assert_same(found: JointNoising, wanted: JointNoising) -> None:
    """Bit for bit."""
    for name, ours, theirs in zip(JointNoising._fields, found, wanted, strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, name
            assert torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8)), name
