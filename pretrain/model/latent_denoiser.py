"""The latent denoiser of sequential Co-LADD: a transformer over the latent slots alone (arXiv 2510.18114, B7)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from braid.parallel.layers import ALONE, Region
from braid.pretrain.config.schema import ModelConfig
from braid.pretrain.model.blocks import Block, DropoutKey, run_blocks
from braid.pretrain.model.conditioning import ModulatedLinear, TimeEmbedding
from braid.pretrain.model.flops import SINUSOID_DIM, TrainingFlops
from braid.pretrain.model.network import Network


class LatentDenoiser(Network):
    """Noised slots [B, S, D] and their times [B] to the clean slots [B, S, D], float32.

    One linear layer, the backbone's blocks with RoPE over the slots, and a head that starts at zero. Built where
    torch's default device says; on `meta` it stays without values. `seed` is the run key of the values.
    """

    parts: ClassVar[dict[str, str]] = {"blocks": "blocks", "latent_head": "heads"}
    inside: ClassVar = ("blocks", "latent_input", "latent_head")
    vocab_size = 0

    def __init__(
        self, model: ModelConfig, *, num_slots: int, latent_dim: int, seed: int, region: Region = ALONE
    ) -> None:
        super().__init__()
        self.config, self.num_slots, self.latent_dim, self.region = model, num_slots, latent_dim, region
        device = torch.get_default_device()
        with torch.device("meta"):
            self.latent_input = nn.Linear(latent_dim, model.width)
            self.time_embedding = TimeEmbedding(model.cond_dim)
            self.blocks = nn.ModuleList(Block(model, layer, causal=False) for layer in range(model.num_layers))
            self.latent_head = ModulatedLinear(model.width, latent_dim, model.cond_dim)
        self.materialise(device, seed)
        if model.compile:
            for block in self.blocks:
                block.compile()

    def forward(self, latents_BSD: Tensor, times_B: Tensor, dropout: DropoutKey | None = None) -> Tensor:
        """Under the caller's autocast; `dropout` speaks of slots as positions."""
        c_BC = self.region.condition(self.time_embedding(times_B))
        x_BSW = self.latent_input(self.region.enter(latents_BSD)).float()
        x_BSW = run_blocks(self.blocks, self.config, x_BSW, c_BC, dropout, region=self.region)
        return self.region.leave(self.latent_head(x_BSW, c_BC)).float()

    def training_flops(self, sequence_length: int) -> TrainingFlops:
        """As model/flops.py counts, per token of a text of `sequence_length`: the slots are spread over the tokens."""
        model, slots_per_token = self.config, self.num_slots / sequence_length
        width, cond, layers = model.width, model.cond_dim, model.num_layers
        blocks = layers * (4 * width**2 + 2 * width * round(width * model.mlp_ratio))
        per_sequence = 6 * (cond * (6 * width * layers + 2 * width) + cond**2) + 4 * SINUSOID_DIM * cond
        return TrainingFlops(
            # The first linear layer needs no gradient for its input: 4 FLOPs a parameter, not 6.
            linear=(6 * blocks + 4 * width * self.latent_dim) * slots_per_token,
            attention=12 * layers * width * self.num_slots * slots_per_token,
            conditioning=per_sequence / sequence_length,
            head=6 * width * self.latent_dim * slots_per_token,
        )
