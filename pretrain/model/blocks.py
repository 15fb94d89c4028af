"""The transformer block of the DiT backbone, attention and MLP under the time's adaLN, and how a stack of them is run.

The "DiT small" block of the masked-diffusion line (MDLM, Duo, GIDD, CCDD): float32 LayerNorm without bias, no bias in
the attention, half-split RoPE, tanh-GELU MLP with biases, adaLN-Zero. Shape suffixes: see conditioning.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from braid.kernels.random import dropout_keep, fold_key
from braid.parallel.context import CoreAttention
from braid.parallel.layers import ALONE, Columns, Region, Rows
from braid.pretrain.config.schema import ModelConfig
from braid.pretrain.model.conditioning import LayerNorm, Modulation, modulate


@dataclass(frozen=True)
class DropoutKey:
    """What a dropout mask is a function of, beside layer and site: the run's key, ordinals [B] and positions [L]."""

    key: int
    ordinals: Tensor
    positions: Tensor


class KeyValueCache:
    """Keys and values of the positions a causal model has seen, by layer; it grows as the model goes on."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def length(self, layer: int) -> int:
        """Positions held of a layer."""
        return self._held[layer][0].shape[2] if layer in self._held else 0

    def extend(self, layer: int, k_BHLK: Tensor, v_BHLK: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new positions of a layer; returns all of them."""
        if layer in self._held:
            k_BHLK, v_BHLK = (torch.cat(pair, 2) for pair in zip(self._held[layer], (k_BHLK, v_BHLK), strict=True))
        self._held[layer] = (k_BHLK, v_BHLK)
        return k_BHLK, v_BHLK


def rope_tables(
    length: int, head_dim: int, base: float, device: torch.device, *, start: int = 0
) -> tuple[Tensor, Tensor]:
    """cos and sin [L, K/2] of position / base^(2i/K) (arXiv 2104.09864), in float64 rounded once to float32. Positions
    count from `start`."""
    positions = torch.arange(start, start + length, device=device, dtype=torch.float64)
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim
    angles = positions[:, None] * base**-exponents
    return angles.cos().float(), angles.sin().float()


def rotate(x_BHLK: Tensor, cos_LK: Tensor, sin_LK: Tensor) -> Tensor:
    """Rotate the pairs (i, i + K/2) of every head by their position's angle (half-split RoPE), in float32."""
    first, second = x_BHLK.float().chunk(2, dim=-1)
    rotated = torch.cat([first * cos_LK - second * sin_LK, second * cos_LK + first * sin_LK], dim=-1)
    return rotated.to(x_BHLK.dtype)


class Attention(nn.Module):
    """Multi-head self-attention over all positions, or over the earlier ones where `causal`; no biases."""

    divided: ClassVar = {"qkv": Columns(parts=3), "out": Rows()}

    def __init__(self, width: int, num_heads: int, causal: bool, layer: int = 0) -> None:
        super().__init__()
        self.head_dim, self.causal, self.layer = width // num_heads, causal, layer
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.core = CoreAttention()

    def forward(
        self,
        x_BLW: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: KeyValueCache | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        # The rows of qkv are (q, k, v) x head x head dimension, the order of the published checkpoints.
        q_BHLK, k_BHLK, v_BHLK = self.qkv(x_BLW).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        q_BHLK, k_BHLK = rotate(q_BHLK, *rope), rotate(k_BHLK, *rope)
        seen = 0
        if cache is not None:
            k_BHLK, v_BHLK = cache.extend(self.layer, k_BHLK, v_BHLK)
            seen = k_BHLK.shape[2] - q_BHLK.shape[2]
            # A triangle that is aligned with the last position: only the first call and single positions are asked for.
            assert seen == 0 or q_BHLK.shape[2] == 1, "a cache is extended by one position at a time"
        x_BHLK = self.core(q_BHLK, k_BHLK, v_BHLK, keys=visible, causal=self.causal and seen == 0)
        return self.out(x_BHLK.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear, tanh-GELU, Linear, with biases."""

    divided: ClassVar = {"input": Columns(), "output": Rows()}

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.input = nn.Linear(width, hidden)
        self.output = nn.Linear(hidden, width)

    def forward(self, x_BLW: Tensor) -> Tensor:
        return self.output(F.gelu(self.input(x_BLW), approximate="tanh"))


class Block(nn.Module):
    """x + gate * attention(modulate(norm(x))), then the same with the MLP."""

    def __init__(self, model: ModelConfig, layer: int, causal: bool) -> None:
        super().__init__()
        self.layer, self.dropout = layer, model.dropout
        self.adaln = Modulation(model.cond_dim, model.width, 6)
        self.attention_norm = LayerNorm(model.width)
        self.attention = Attention(model.width, model.num_heads, causal, layer)
        self.mlp_norm = LayerNorm(model.width)
        self.mlp = MLP(model.width, round(model.width * model.mlp_ratio))

    def forward(
        self,
        x_BLW: Tensor,
        c_BC: Tensor,
        rope: tuple[Tensor, Tensor],
        keep: tuple[Tensor, Tensor] | None = None,
        cache: KeyValueCache | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        """`keep` is what `dropout_masks` gives, or None for no dropout; `visible` what `Context.visible` gives."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaln(c_BC)
        update_BLW = self.attention(modulate(self.attention_norm(x_BLW), shift, scale), rope, cache, visible)
        x_BLW = x_BLW + gate * self.drop(update_BLW, keep and keep[0])
        update_BLW = self.mlp(modulate(self.mlp_norm(x_BLW), mlp_shift, mlp_scale))
        return x_BLW + mlp_gate * self.drop(update_BLW, keep and keep[1])

    def drop(self, x_BLW: Tensor, keep_BLW: Tensor | None) -> Tensor:
        """Inverted dropout."""
        return x_BLW if keep_BLW is None else x_BLW * keep_BLW / (1 - self.dropout)

    def dropout_masks(self, dropout: DropoutKey, width: int) -> tuple[Tensor, Tensor]:
        """What is kept after the attention and after the MLP, bool [B, L, W] each: a pure function of (key, layer,
        site, ordinal, position, channel). Drawn outside `forward`: compiled blocks share one graph whatever the key."""
        keys = (fold_key(dropout.key, "dropout", self.layer, site) for site in ("attention", "mlp"))
        first, second = (dropout_keep(key, dropout.ordinals, dropout.positions, width, self.dropout) for key in keys)
        return first, second


def run_blocks(
    blocks: Sequence[nn.Module],
    model: ModelConfig,
    x_BLW: Tensor,
    c_BC: Tensor,
    dropout: DropoutKey | None,
    cache: KeyValueCache | None = None,
    region: Region = ALONE,
    segments: Tensor | None = None,
) -> Tensor:
    """The state after a stack of `Block`s, run as `block_runner` says."""
    run = block_runner(blocks, model, x_BLW, c_BC, dropout, cache, region, segments)
    for block in blocks:
        x_BLW = run(block, x_BLW)
    return x_BLW


def block_runner(
    blocks: Sequence[nn.Module],
    model: ModelConfig,
    x_BLW: Tensor,
    c_BC: Tensor,
    dropout: DropoutKey | None,
    cache: KeyValueCache | None = None,
    region: Region = ALONE,
    segments: Tensor | None = None,
) -> Callable[[nn.Module, Tensor], Any]:
    """What runs one of `blocks` on the state before it, and returns all that the block does: with RoPE from position 0
    (after those in `cache`), dropout in training, and activation checkpointing, as `model` says. `x_BLW` is the state
    before the first block, [B, L, W] or with strands [B, L, S, W]; where `region` divides it, RoPE is for all L
    positions, which attention gets, and dropout for those that are here.

    `segments` (int [B, L]): only positions of the same number see each other. RoPE goes on from one to the next, for
    attention knows of positions but how far apart they are."""
    length = region.length(x_BLW)
    visible = region.context.visible(segments)
    start = region.context.start(length) if cache is None else cache.length(blocks[0].layer)
    rope = rope_tables(length, model.width // model.num_heads, model.rope_base, x_BLW.device, start=start)
    if blocks[0].training and model.dropout > 0:
        assert dropout is not None, "dropout in training needs its key"
        dropout = replace(dropout, positions=region.positions(dropout.positions))
    else:
        dropout = None

    def run(block: nn.Module, x_BLW: Tensor) -> Any:
        keep = block.dropout_masks(dropout, x_BLW.shape[-1]) if dropout else None
        return block(x_BLW, c_BC, rope, keep, cache, visible)

    if model.activation_checkpointing == "block" and torch.is_grad_enabled():
        assert cache is None, "a block that is run again would extend the cache again"
        # Dropout is a function of counters, so there is no generator state to save for the second run.
        return partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
    return run
