"""The backbone: a diffusion transformer over tokens, causal for the autoregressive baseline.

"DiT small" of the masked-diffusion line (methods of MDLM, arXiv 2406.07524, and Duo, 2506.10892).
Shape suffixes: B sequences, L positions, W model width, C conditioning width, V vocabulary.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from braid.parallel.layers import ALONE, Columns, Region, Rows
from braid.pretrain.config.schema import ModelConfig
from braid.pretrain.model.blocks import Block, DropoutKey, KeyValueCache, run_blocks
from braid.pretrain.model.conditioning import TimeEmbedding, TokenHead
from braid.pretrain.model.flops import TrainingFlops, training_flops
from braid.pretrain.model.network import Network
from braid.pretrain.model.token_logits import TokenLogits


class Prediction(NamedTuple):
    """What the network says about the clean sequence."""

    tokens: TokenLogits

    @property
    def logits(self) -> Tensor:
        """All of them, as `TokenLogits.whole`."""
        return self.tokens.whole


class Backbone(Network):
    """Tokens [B, L] and times [B] to a `Prediction`.

    Built where torch's default device says (`with torch.device("cuda"):`); on `meta` it stays without values, for
    counting. `seed` is the run key of the initial values.
    """

    parts: ClassVar[dict[str, str]] = {"blocks": "blocks", "token_embedding": "embedding", "token_head": "heads"}
    divided: ClassVar = {"token_embedding": Rows(), "token_head.linear": Columns()}
    inside: ClassVar = ("blocks", "token_head")
    at_start: ClassVar = ("token_embedding",)
    at_end: ClassVar = ("token_head",)

    def __init__(
        self,
        model: ModelConfig,
        *,
        vocab_size: int,
        causal: bool,
        time_conditioned: bool,
        seed: int,
        region: Region = ALONE,
    ) -> None:
        super().__init__()
        assert model.width % (2 * model.num_heads) == 0, "RoPE rotates pairs within a head"
        self.config, self.vocab_size, self.region = model, vocab_size, region
        self.causal, self.time_conditioned = causal, time_conditioned
        device = torch.get_default_device()
        with torch.device("meta"):  # no values yet: torch's own initialisation draws from the global generator
            self.token_embedding = nn.Embedding(vocab_size, model.width)
            self.time_embedding = TimeEmbedding(model.cond_dim)
            self.blocks = nn.ModuleList(Block(model, layer, causal) for layer in range(model.num_layers))
            self.token_head = TokenHead(model.width, vocab_size, model.cond_dim)
        self.materialise(device, seed)
        if model.compile:
            for block in self.blocks:
                block.compile()

    def forward(
        self,
        tokens: Tensor,
        times: Tensor | None,
        dropout: DropoutKey | None = None,
        cache: KeyValueCache | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Tokens int64 [B, L] (or soft ones: weights over the vocabulary [B, L, V]), times in [0, 1] [B]; runs under
        the caller's autocast.

        `times` is ignored (0 is fed) unless the model is time-conditioned; `dropout` is required in training where the
        configured probability is not 0, and ignored otherwise. `cache` (causal models): the tokens follow those whose
        keys and values it holds; theirs are added to it. `segments` (int [B, L]): only
        positions of the same number see each other. Returns what the head's linear layer reads, [B, L, W]; a call
        of the network makes a `Prediction` of it.
        """
        c_BC = self.condition(tokens, times)
        x_BLW = self.trunk(tokens, c_BC, dropout, cache, segments)
        if not self.stage.at_end:
            return x_BLW
        return self.token_head(x_BLW, c_BC)

    def say(self, hidden_BLW: Tensor) -> Prediction:
        return Prediction(self.token_logits(hidden_BLW, "token_head.linear"))

    def condition(self, tokens_BL: Tensor, times_B: Tensor | None) -> Tensor:
        """The conditioning vector [B, C] of every sequence."""
        if not self.time_conditioned:
            times_B = torch.zeros(len(tokens_BL), device=tokens_BL.device)
        assert times_B is not None, "a time-conditioned model needs the times"
        return self.region.condition(self.time_embedding(times_B))

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, L] or soft [B, L, V] to [B, L, W]."""
        if tokens.is_floating_point():
            return self.region.collect(self.vocabulary.columns(tokens) @ self.token_embedding.weight).float()
        return self.token_embedding(tokens)

    def trunk(
        self,
        tokens_BL: Tensor,
        c_BC: Tensor,
        dropout: DropoutKey | None = None,
        cache: KeyValueCache | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """The hidden states [B, L, W], float32, after the last block that runs, before the head."""
        assert cache is None or self.causal, "only a causal model can leave earlier positions as they were"
        x_BLW = self.embed(tokens_BL) if self.stage.at_start else self.stage.incoming
        blocks = self.stage.pick(self.blocks)
        return run_blocks(blocks, self.config, x_BLW, c_BC, dropout, cache, self.region, segments)

    def probe(self, tokens_BL: Tensor) -> Tensor:
        times_B = torch.full((len(tokens_BL),), 0.5, device=tokens_BL.device)
        return self.probed(self.trunk(tokens_BL, self.condition(tokens_BL, times_B)))

    def training_flops(self, sequence_length: int) -> TrainingFlops:
        return training_flops(self.config, vocab_size=self.vocab_size, sequence_length=sequence_length)
