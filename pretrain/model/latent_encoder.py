"""The encoder of LADD that is learnt with the denoiser: a transformer whose last S outputs are the latent slots."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from braid.parallel.context import UNDIVIDED
from braid.parallel.layers import ALONE, Region, Rows
from braid.parallel.pipeline import ONE_PIECE
from braid.pretrain.config.schema import ModelConfig
from braid.pretrain.model.blocks import Block, DropoutKey, run_blocks
from braid.pretrain.model.conditioning import LayerNorm, TimeEmbedding
from braid.pretrain.model.flops import SINUSOID_DIM, TrainingFlops
from braid.pretrain.model.network import Network


class LatentEncoder(Network):
    """Clean tokens [B, L] to raw slots [B, S, D]: what a bidirectional DiT says at the last S of the L positions.

    LADD (arXiv 2510.18114, B3), for the text8 runs. Hidden tokens are shown as the mask token. The blocks are those of
    the backbone at time 0. Built where torch's default device says; on `meta` it stays without values.
    """

    parts: ClassVar[dict[str, str]] = {"blocks": "blocks", "token_embedding": "embedding", "output": "heads"}
    divided: ClassVar = {"token_embedding": Rows()}
    inside: ClassVar = ("blocks",)

    def __init__(
        self,
        model: ModelConfig,
        *,
        vocab_size: int,
        num_slots: int,
        latent_dim: int,
        mask_id: int,
        seed: int,
        region: Region = ALONE,
    ) -> None:
        super().__init__()
        self.config, self.vocab_size, self.mask_id = model, vocab_size, mask_id
        self.num_slots, self.latent_dim = num_slots, latent_dim
        # It is part of the corruption: every stage does that, of whole sequences.
        self.region = replace(region, context=UNDIVIDED, stage=ONE_PIECE)
        device = torch.get_default_device()
        with torch.device("meta"):
            self.token_embedding = nn.Embedding(vocab_size, model.width)
            self.time_embedding = TimeEmbedding(model.cond_dim)
            self.blocks = nn.ModuleList(Block(model, layer, causal=False) for layer in range(model.num_layers))
            self.norm = LayerNorm(model.width)
            self.output = nn.Linear(model.width, latent_dim)
        self.materialise(device, seed)
        if model.compile:
            for block in self.blocks:
                block.compile()

    def forward(self, tokens_BL: Tensor, hidden_BL: Tensor, dropout: DropoutKey | None = None) -> Tensor:
        """Raw slots [B, S, D], float32; `hidden` (bool) positions are not seen."""
        x_BLW = self.trunk(tokens_BL.masked_fill(hidden_BL, self.mask_id), dropout)
        return self.output(self.norm(x_BLW[:, -self.num_slots :])).float()

    def trunk(self, tokens_BL: Tensor, dropout: DropoutKey | None = None) -> Tensor:
        c_BC = self.region.condition(self.time_embedding(torch.zeros(len(tokens_BL), device=tokens_BL.device)))
        x_BLW = self.token_embedding(tokens_BL)
        return self.region.leave(run_blocks(self.blocks, self.config, x_BLW, c_BC, dropout, region=self.region))

    def probe(self, tokens_BL: Tensor) -> Tensor:
        return self.trunk(tokens_BL)

    def training_flops(self, sequence_length: int) -> TrainingFlops:
        """As model/flops.py counts; the output layer, at S positions, is the head."""
        model = self.config
        width, cond, layers = model.width, model.cond_dim, model.num_layers
        linear = layers * (4 * width**2 + 2 * width * round(width * model.mlp_ratio))
        per_sequence = 6 * (cond * 6 * width * layers + cond**2) + 4 * SINUSOID_DIM * cond
        return TrainingFlops(
            linear=6 * linear,
            attention=12 * layers * width * sequence_length,
            conditioning=per_sequence / sequence_length,
            head=6 * width * self.latent_dim * self.num_slots / sequence_length,
        )
