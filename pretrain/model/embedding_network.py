"""The network of continuous embedding diffusion (RePlaid, arXiv 2605.18530): noisy embeddings in, token logits out.

The blocks, the head and the time embedding are those of the backbone (model/backbone.py); in place of the token
embedding stands Plaid's input layer (arXiv 2305.18619), for a noisy embedding and for an earlier estimate of the clean
one. Shape suffixes: B sequences, L positions, W model width, C conditioning width, V vocabulary, D embedding dimension.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from braid.parallel.layers import ALONE, Columns, Region
from braid.pretrain.config.schema import ModelConfig
from braid.pretrain.model.blocks import Block, DropoutKey, run_blocks
from braid.pretrain.model.conditioning import TimeEmbedding, TokenHead
from braid.pretrain.model.flops import TrainingFlops, training_flops
from braid.pretrain.model.network import Network
from braid.pretrain.model.token_logits import TokenLogits

NORM_FLOOR = 1e-8


def unit_rows(vectors_VD: Tensor) -> Tensor:
    """Vectors of length 1 in the same directions."""
    return vectors_VD / (torch.linalg.vector_norm(vectors_VD, dim=-1, keepdim=True) + NORM_FLOOR)


class UnitEmbedding(nn.Module):
    """A table of V vectors of length 1 in D dimensions; the lengths of the raw vectors mean nothing (gauge freedom)."""

    def __init__(self, vocab_size: int, num_dims: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.empty(vocab_size, num_dims))

    def forward(self) -> Tensor:
        """The whole table, float32 [V, D]."""
        return unit_rows(self.raw)


class EmbeddingNetwork(Network):
    """Noisy embeddings [B, L, D], an earlier estimate [B, L, D] and a noise level [B] to `TokenLogits`.

    The embeddings live here, but the forward pass does not read them: the objective noises them, and adds what z alone
    says of a token to the logits. Built where torch's default device says; `seed` is the key of the initial values.
    """

    parts: ClassVar[dict[str, str]] = {"blocks": "blocks", "embedding": "embedding", "token_head": "heads"}
    divided: ClassVar = {"token_head.linear": Columns()}
    inside: ClassVar = ("blocks", "token_head", "input", "estimate_input")
    at_start: ClassVar = ("input", "estimate_input")
    at_end: ClassVar = ("token_head",)

    def __init__(
        self, model: ModelConfig, *, vocab_size: int, num_dims: int, seed: int, region: Region = ALONE
    ) -> None:
        super().__init__()
        assert model.width % (2 * model.num_heads) == 0, "RoPE rotates pairs within a head"
        self.config, self.vocab_size, self.num_dims, self.region = model, vocab_size, num_dims, region
        device = torch.get_default_device()
        with torch.device("meta"):
            self.embedding = UnitEmbedding(vocab_size, num_dims)
            self.input = nn.Linear(num_dims, model.width, bias=False)
            self.estimate_input = nn.Linear(num_dims, model.width, bias=False)
            self.time_embedding = TimeEmbedding(model.cond_dim)
            self.blocks = nn.ModuleList(Block(model, layer, causal=False) for layer in range(model.num_layers))
            self.token_head = TokenHead(model.width, vocab_size, model.cond_dim)
        self.materialise(device, seed)
        if model.compile:
            for block in self.blocks:
                block.compile()

    def initial_rule(self, name: str, shape: torch.Size) -> float | None:
        return {"embedding.raw": 1.0, "estimate_input.weight": 0.0}.get(name)

    def initial_values(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        values = super().initial_values(name, shape, seed)
        return unit_rows(values) if name == "embedding.raw" else values

    def forward(
        self,
        inputs_BLD: Tensor,
        estimates_BLD: Tensor,
        level_B: Tensor,
        dropout: DropoutKey | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """What the head's linear layer reads, [B, L, W]; under the caller's autocast.

        `inputs` are noisy embeddings scaled to unit variance per coordinate; `estimates` are embeddings of length up to
        1, and zero where there is no estimate; `level` is what the time embedding reads (gamma, or the time).
        `segments` (int [B, L]): only positions of the same number see each other.
        """
        c_BC = self.region.condition(self.time_embedding(level_B))
        x_BLW = self.trunk(inputs_BLD, estimates_BLD, c_BC, dropout, segments)
        if not self.stage.at_end:
            return x_BLW
        return self.token_head(x_BLW, c_BC)

    def say(self, hidden_BLW: Tensor) -> TokenLogits:
        return self.token_logits(hidden_BLW, "token_head.linear")

    def trunk(
        self,
        inputs_BLD: Tensor,
        estimates_BLD: Tensor,
        c_BC: Tensor,
        dropout: DropoutKey | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """The hidden states [B, L, W], float32, after the last block that runs, before the head."""
        x_BLW = self.embed(inputs_BLD, estimates_BLD) if self.stage.at_start else self.stage.incoming
        blocks = self.stage.pick(self.blocks)
        return run_blocks(blocks, self.config, x_BLW, c_BC, dropout, region=self.region, segments=segments)

    def embed(self, inputs_BLD: Tensor, estimates_BLD: Tensor) -> Tensor:
        """The state before the first block."""
        inputs_BLD, estimates_BLD = self.region.enter(inputs_BLD), self.region.enter(estimates_BLD)
        return (self.input(inputs_BLD) + self.estimate_input(self.num_dims**0.5 * estimates_BLD)).float()

    def probe(self, tokens_BL: Tensor) -> Tensor:
        inputs_BLD = self.num_dims**0.5 * self.embedding()[tokens_BL]
        level_B = torch.zeros(len(tokens_BL), device=tokens_BL.device)  # gamma = 0: as much signal as noise
        c_BC = self.region.condition(self.time_embedding(level_B))
        return self.probed(self.trunk(inputs_BLD, torch.zeros_like(inputs_BLD), c_BC))

    def training_flops(self, sequence_length: int) -> TrainingFlops:
        """The backbone's, with both input layers, and with the two products of the vocabulary with the embeddings (what
        z says of a token, and the mean embedding of a prediction) counted in the head."""
        plain = training_flops(self.config, vocab_size=self.vocab_size, sequence_length=sequence_length)
        return TrainingFlops(
            linear=plain.linear + 6 * 2 * self.num_dims * self.config.width,
            attention=plain.attention,
            conditioning=plain.conditioning,
            head=plain.head + 6 * 2 * self.num_dims * self.vocab_size,
        )
