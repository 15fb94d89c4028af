"""MMDiT: two streams of their own weights that meet by cross-attention (CCDD, arXiv 2510.03206).

Layers alternate: a two-stream block, then a private block of each stream. In a two-stream block every stream attends to
itself (RoPE), then the tokens' queries attend the latents and the latents' queries the tokens (no RoPE; both read what
the other was before), then every stream has its MLP: nine modulation vectors a stream. All gates start at zero.
Shape suffixes: as in joint.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from braid.kernels.random import dropout_keep, fold_key
from braid.parallel.context import CoreAttention
from braid.parallel.layers import Columns, Rows
from braid.pretrain.config.schema import ModelConfig
from braid.pretrain.model.blocks import MLP, Attention, Block, DropoutKey, run_blocks
from braid.pretrain.model.conditioning import LayerNorm, Modulation, modulate
from braid.pretrain.model.joint import (
    BlockCosts,
    Routing,
    TwoStrandNetwork,
    attention_weights,
    drop,
    hidden_width,
    mlp_weights,
    strand_keys,
)

Vectors = tuple[Tensor, ...]
Masks = tuple[Tensor, ...]
NOTHING_DROPPED = (None, None, None)


class MMDiT(TwoStrandNetwork):
    """`num_layers` counts both kinds of layers: the published model, 6 groups of one two-stream block and one private
    block for each stream, has 12."""

    def make_blocks(self) -> Iterable[nn.Module]:
        assert self.config.num_layers % 2 == 0, "layers come in pairs: two-stream, private"
        kinds = (TwoStreamBlock, PrivateBlocks)
        return (kinds[layer % 2](self.config, layer) for layer in range(self.config.num_layers))

    def trunk(
        self, x_BLSW: Tensor, c_BSC: Tensor, dropout: DropoutKey | None, segments: Tensor | None
    ) -> tuple[Tensor, Routing | None]:
        blocks = self.stage.pick(self.blocks)
        return run_blocks(blocks, self.config, x_BLSW, c_BSC, dropout, region=self.region, segments=segments), None

    def block_costs(self) -> BlockCosts:
        groups, width = self.config.num_layers // 2, self.config.width
        two_stream = 2 * (2 * attention_weights(width) + mlp_weights(self.config))
        private = 2 * (attention_weights(width) + mlp_weights(self.config))
        return BlockCosts(
            groups * (two_stream + private),
            groups * 2 * (2 + 1) * width,
            groups * 2 * (9 + 6) * width * self.config.cond_dim,
        )


class TwoStreamBlock(nn.Module):
    """Self-attention, exchange and MLP of both streams."""

    def __init__(self, model: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.dropout = layer, model.dropout
        self.tokens, self.latents = Stream(model), Stream(model)

    def forward(
        self,
        x_BLSW: Tensor,
        c_BSC: Tensor,
        rope: tuple[Tensor, Tensor],
        keep: tuple[Masks, Masks] | None = None,
        cache: None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        """`keep` is what `dropout_masks` gives, or None for no dropout; a bidirectional block has nothing to cache.
        `visible`, as `Context.visible` gives it, is about positions, whichever stream looks at whichever."""
        tokens, latents = self.tokens, self.latents
        x_BLW, z_BLW = x_BLSW.unbind(2)
        u, w = tokens.adaln(c_BSC[:, 0]), latents.adaln(c_BSC[:, 1])
        keep_x, keep_z = keep or (NOTHING_DROPPED, NOTHING_DROPPED)
        x_BLW = tokens.attend(x_BLW, u, rope, keep_x[0], visible)
        z_BLW = latents.attend(z_BLW, w, rope, keep_z[0], visible)
        (q_x, k_x, v_x), (q_z, k_z, v_z) = tokens.project(x_BLW, u), latents.project(z_BLW, w)
        x_BLW = tokens.exchange(x_BLW, u, (q_x, k_z, v_z), keep_x[1], visible)
        z_BLW = latents.exchange(z_BLW, w, (q_z, k_x, v_x), keep_z[1], visible)
        x_BLW = tokens.transform(x_BLW, u, keep_x[2])
        z_BLW = latents.transform(z_BLW, w, keep_z[2])
        return torch.stack([x_BLW, z_BLW], 2)

    def dropout_masks(self, dropout: DropoutKey, width: int) -> tuple[Masks, Masks]:
        """What is kept, bool [B, L, W], after self-attention, exchange and MLP of the tokens and of the latents; see
        `Block.dropout_masks`."""
        first, second = (
            tuple(
                dropout_keep(fold_key(k.key, "dropout", self.layer, site), k.ordinals, k.positions, width, self.dropout)
                for site in ("attention", "cross", "mlp")
            )
            for k in strand_keys(dropout)
        )
        return first, second


class Stream(nn.Module):
    """One stream's part of a two-stream block. `vectors` are its nine: shift, scale and gate of each of its steps."""

    divided: ClassVar = {"cross_qkv": Columns(parts=3), "cross_out": Rows()}

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        width = model.width
        self.dropout = model.dropout
        self.adaln = Modulation(model.cond_dim, width, 9)
        self.attention_norm = LayerNorm(width)
        self.attention = Attention(width, model.num_heads, causal=False)
        self.cross_norm = LayerNorm(width)
        self.cross_qkv = nn.Linear(width, 3 * width, bias=False)
        self.cross_out = nn.Linear(width, width, bias=False)
        self.cross_core = CoreAttention()
        self.mlp_norm = LayerNorm(width)
        self.mlp = MLP(width, hidden_width(model))

    def attend(
        self,
        x_BLW: Tensor,
        vectors: Vectors,
        rope: tuple[Tensor, Tensor],
        keep: Tensor | None,
        visible: Tensor | None,
    ) -> Tensor:
        """Self-attention."""
        shift, scale, gate = vectors[0:3]
        update_BLW = self.attention(modulate(self.attention_norm(x_BLW), shift, scale), rope, visible=visible)
        return x_BLW + gate * drop(update_BLW, keep, self.dropout)

    def project(self, x_BLW: Tensor, vectors: Vectors) -> tuple[Tensor, Tensor, Tensor]:
        """This stream's queries, keys and values for the exchange, [B, H, L, K] each."""
        shift, scale, _ = vectors[3:6]
        qkv = self.cross_qkv(modulate(self.cross_norm(x_BLW), shift, scale))
        q_BHLK, k_BHLK, v_BHLK = qkv.unflatten(-1, (3, -1, self.attention.head_dim)).permute(2, 0, 3, 1, 4)
        return q_BHLK, k_BHLK, v_BHLK

    def exchange(
        self,
        x_BLW: Tensor,
        vectors: Vectors,
        qkv: tuple[Tensor, Tensor, Tensor],
        keep: Tensor | None,
        visible: Tensor | None,
    ) -> Tensor:
        """Cross-attention: this stream's queries, the other's keys and values."""
        heads_BHLK = self.cross_core(*qkv, keys=visible)
        update_BLW = self.cross_out(heads_BHLK.transpose(1, 2).flatten(2))
        return x_BLW + vectors[5] * drop(update_BLW, keep, self.dropout)

    def transform(self, x_BLW: Tensor, vectors: Vectors, keep: Tensor | None) -> Tensor:
        """MLP."""
        shift, scale, gate = vectors[6:9]
        update_BLW = self.mlp(modulate(self.mlp_norm(x_BLW), shift, scale))
        return x_BLW + gate * drop(update_BLW, keep, self.dropout)


class PrivateBlocks(nn.Module):
    """A plain block for each stream, at the same depth; nothing is exchanged."""

    def __init__(self, model: ModelConfig, layer: int) -> None:
        super().__init__()
        self.tokens, self.latents = (Block(model, layer, causal=False) for _ in range(2))

    def forward(
        self,
        x_BLSW: Tensor,
        c_BSC: Tensor,
        rope: tuple[Tensor, Tensor],
        keep: tuple[Masks, Masks] | None = None,
        cache: None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        """As `TwoStreamBlock.forward`."""
        keep_x, keep_z = keep or (None, None)
        x_BLW = self.tokens(x_BLSW[:, :, 0], c_BSC[:, 0], rope, keep_x, None, visible)
        z_BLW = self.latents(x_BLSW[:, :, 1], c_BSC[:, 1], rope, keep_z, None, visible)
        return torch.stack([x_BLW, z_BLW], 2)

    def dropout_masks(self, dropout: DropoutKey, width: int) -> tuple[Masks, Masks]:
        """What is kept after attention and MLP of the tokens and of the latents."""
        keys = strand_keys(dropout)
        return self.tokens.dropout_masks(keys[0], width), self.latents.dropout_masks(keys[1], width)
