"""Laws to draw tokens from, and the draws by the NumPy reference: shared by the tests of the implementations."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import torch
from torch import Tensor

from braid.kernels import reference
from braid.kernels.sampling import ReverseStep

KEY = 0x9E3779B97F4A7C15


def uniform_step(t: float, s: float, num_tokens: int) -> ReverseStep:
    """Of the process whose tokens survive with probability 1 - t and else are any of `num_tokens`."""
    ratio = (1 - t) / (1 - s)
    arrives = (1 - ratio) / num_tokens
    return ReverseStep(1 - s, s / num_tokens, 0.0, ratio, arrives, arrives)


def hybrid_step(t: float, s: float, num_tokens: int, scale: float = 0.5) -> ReverseStep:
    """With masks and, unless `scale` is 0, uniform noise besides."""

    def state(time: float) -> np.ndarray:
        c = scale * (time * (1 - time)) ** 0.5
        return np.array([1 - time, c / num_tokens, time]) / (1 + c)

    (survival_t, noise_t, mask_t), (survival_s, noise_s, mask_s) = state(t), state(s)
    ratio = survival_t / survival_s
    return ReverseStep(
        *map(float, (survival_s, noise_s, mask_s, ratio, mask_t - ratio * mask_s, noise_t - ratio * noise_s))
    )


def law(
    logits: Tensor,
    *,
    other: Tensor | None = None,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    left_out: int | None = None,
    step: ReverseStep | None = None,
    noisy: Tensor | None = None,
) -> np.ndarray:
    """Probabilities float64 [N, V], by NumPy."""
    guided = logits.float().numpy()
    if other is not None:
        guided = np.float32(guidance) * guided + np.float32(1 - guidance) * other.float().numpy()
    guided = guided.astype(np.float64)
    if left_out is not None:
        guided[:, left_out] = -np.inf
    p = np.exp(guided / temperature - (guided / temperature).max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    if top_p < 1:
        for row in p:
            order = np.argsort(-row, kind="stable")
            before = np.cumsum(row[order]) - row[order]
            row[order[before >= top_p]] = 0
        p /= p.sum(1, keepdims=True)
    if step is not None:
        survival, noise, mask, stays, arrives_at_mask, arrives = astuple(step)
        rows, at = np.arange(len(p)), noisy.numpy()
        w = survival * p + noise
        w[:, left_out] = mask
        p = w * np.where(at == left_out, arrives_at_mask, arrives)[:, None]
        p[rows, at] += stays * w[rows, at]
        p /= np.maximum(p.sum(1, keepdims=True), 1e-300)
    return p


def drawn(p: np.ndarray, ordinals: Tensor, positions: Tensor, draw: int = 0) -> Tensor:
    """The race of the contract for these probabilities."""
    with np.errstate(divide="ignore"):
        tokens = reference.categorical(KEY, np.log(p), ordinals.numpy(), positions.numpy(), draw=draw)
    return torch.from_numpy(tokens)


def random_case(seed: int, vocab_size: int, rows: int, *, step: str = "none") -> tuple[Tensor, dict]:
    """Logits, and the options of `draw_tokens`; every option is there in some cases and not in others."""
    rng = np.random.default_rng([seed, vocab_size])
    dtype = [torch.float32, torch.bfloat16][int(rng.integers(2))]

    def some_logits() -> Tensor:
        scale = rng.choice([0.5, 2.0, 6.0])
        return torch.from_numpy(rng.normal(0, scale, (rows, vocab_size)).astype(np.float32)).to(dtype)

    logits, options = some_logits(), {}
    if rng.random() < 0.3:
        options |= {"other": some_logits(), "guidance": float(rng.uniform(0, 3))}
    if rng.random() < 0.4:
        options["temperature"] = float(rng.uniform(0.3, 2))
    if rng.random() < 0.4:
        options["top_p"] = float(rng.uniform(0.05, 0.99))
    if step != "none" or rng.random() < 0.7:
        options["left_out"] = int(rng.integers(vocab_size))
    if step != "none":
        t = float(rng.uniform(0.1, 0.999))
        s = t * float(rng.choice([0, 0.5, 0.95]))
        mask, num_tokens = options["left_out"], vocab_size - 1
        noisy = rng.integers(0, vocab_size, rows)
        if step == "uniform":
            noisy = np.where(noisy == mask, (mask + 1) % vocab_size, noisy)
            options["step"] = uniform_step(t, s, num_tokens)
        else:
            noisy = np.where(rng.random(rows) < 0.6, mask, noisy)
            options["step"] = hybrid_step(t, s, num_tokens, 0.5 if step == "hybrid" else 0.0)
        options["noisy"] = torch.from_numpy(noisy)
    return logits, options
