"""Networks of two strands, tokens and latents beside them: what all have in common, and MDiT, the plainest of them.

The networks of CCDD (arXiv 2510.03206) differ in where the strands meet: added at the input of one transformer (MDiT,
here), by cross-attention (MMDiT, two_stream.py), or by joint attention with experts (MoEDiT, mixture_of_experts.py).
Shape suffixes: as in conditioning.py, and S strands: index 0 is the tokens' strand, 1 the latents'.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from braid.kernels.random import fold_key
from braid.parallel.layers import ALONE, Columns, Region, Rows
from braid.pretrain.config.schema import ModelConfig
from braid.pretrain.model.blocks import Block, DropoutKey, run_blocks
from braid.pretrain.model.conditioning import ModulatedLinear, TimeEmbedding, TokenHead
from braid.pretrain.model.flops import SINUSOID_DIM, TrainingFlops
from braid.pretrain.model.network import Network
from braid.pretrain.model.token_logits import TokenLogits


class Routing(NamedTuple):
    """Where N layers sent their positions; E experts."""

    probabilities: Tensor
    """Of the router, float32 [B, L, S, N, E]."""
    chosen: Tensor
    """The experts that answered, bool [B, L, S, N, E]."""
    layers: tuple[int, ...]
    """Numbers of the N layers in the network: of all, or of the piece of it that runs."""
    num_layers: int
    """Of the whole network."""


class JointPrediction(NamedTuple):
    """What a network of two strands says about the clean sequence."""

    tokens: TokenLogits
    latents: Tensor
    """Predicted clean latents [B, L, D], float32."""
    routing: Routing | None = None
    """Where there are experts."""

    @property
    def logits(self) -> Tensor:
        """All of them, as `TokenLogits.whole`."""
        return self.tokens.whole


class BlockCosts(NamedTuple):
    """What the blocks use for one position of the text, both strands together."""

    linear: int
    """Parameters of per-position linear layers, as often as they are used."""
    attention: int
    """Queries times width times (keys / L)."""
    adaln: int
    """Weights of adaLN, as often as they are used for one sequence."""


class JointNetwork(Network):
    """Tokens [B, L], latents [B, L, D] and times [B] to a `JointPrediction`. Base of the three networks.

    Always time-conditioned. With `separate_times` the latents have a time and a time embedding of their own, which
    condition the latent input, the latents' strand of the blocks where there is one, and the latent head.
    Built on torch's default device, as `Backbone`; `seed` is the run key of the initial values.
    """

    parts: ClassVar[dict[str, str]] = {
        "blocks": "blocks",
        "token_embedding": "embedding",
        "token_head": "heads",
        "latent_head": "heads",
    }
    divided: ClassVar = {"token_embedding": Rows(), "token_head.linear": Columns()}
    inside: ClassVar = ("blocks", "token_head", "latent_input", "latent_head")
    at_start: ClassVar = ("token_embedding", "latent_input")
    at_end: ClassVar = ("token_head", "latent_head")

    def __init__(
        self,
        model: ModelConfig,
        *,
        vocab_size: int,
        latent_dim: int,
        separate_times: bool = False,
        seed: int,
        region: Region = ALONE,
    ) -> None:
        super().__init__()
        assert model.width % (2 * model.num_heads) == 0, "RoPE rotates pairs within a head"
        self.config, self.vocab_size, self.latent_dim, self.region = model, vocab_size, latent_dim, region
        device = torch.get_default_device()
        with torch.device("meta"):  # no values yet: torch's own initialisation draws from the global generator
            self.token_embedding = nn.Embedding(vocab_size, model.width)
            self.time_embedding = TimeEmbedding(model.cond_dim)
            self.latent_time_embedding = TimeEmbedding(model.cond_dim) if separate_times else None
            self.blocks = nn.ModuleList(self.make_blocks())
            self.token_head = TokenHead(model.width, vocab_size, model.cond_dim)
            self.latent_input = ModulatedLinear(latent_dim, model.width, model.cond_dim)
            self.latent_head = ModulatedLinear(model.width, latent_dim, model.cond_dim)
        self.materialise(device, seed)
        if model.compile:
            for block in self.blocks:
                block.compile()

    def make_blocks(self) -> Iterable[nn.Module]:
        raise NotImplementedError

    def trunk(
        self, x_BLSW: Tensor, c_BSC: Tensor, dropout: DropoutKey | None, segments: Tensor | None
    ) -> tuple[Tensor, Routing | None]:
        """From the state before the first block that runs, as `embed` makes it, to that after the last, float32, and
        the routing of all positions in those blocks."""
        raise NotImplementedError

    def block_costs(self) -> BlockCosts:
        raise NotImplementedError

    def forward(
        self,
        tokens: Tensor,
        times: Tensor,
        latents: Tensor,
        dropout: DropoutKey | None = None,
        latent_times: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Routing | None]:
        """Tokens int64 [B, L], latents [B, L, D], times in [0, 1] [B]; runs under the caller's autocast.

        `latent_times` [B] are given to a network of separate times and to no other. `dropout` is required in training
        where the configured probability is not 0, and ignored otherwise. `segments` (int [B, L]): only positions of
        the same number see each other, in both strands. Returns what the token head's linear layer reads [B, L, W], the
        predicted latents and the routing; a call of the network makes a `JointPrediction` of them.
        """
        c_BSC = self.condition(times, latent_times)
        x_BLSW = self.embed(tokens, latents, c_BSC) if self.stage.at_start else self.stage.incoming
        x_BLSW, routing = self.trunk(x_BLSW, c_BSC, dropout, segments)
        if not self.stage.at_end:
            self.stage.aside = routing
            return x_BLSW
        x_BLW, z_BLW = self.strands(x_BLSW)
        latents_BLD = self.region.leave(self.latent_head(z_BLW, c_BSC[:, 1]))
        return self.token_head(x_BLW, c_BSC[:, 0]), latents_BLD.float(), routing

    def say(self, output: tuple[Tensor, Tensor, Routing | None]) -> JointPrediction:
        hidden_BLW, latents_BLD, routing = output
        return JointPrediction(self.token_logits(hidden_BLW, "token_head.linear"), latents_BLD, routing)

    def condition(self, times_B: Tensor, latent_times_B: Tensor | None) -> Tensor:
        """The conditioning vector of each strand, [B, S, C]."""
        separate = self.latent_time_embedding is not None
        assert (latent_times_B is not None) == separate, "the latents' own times go with a network of separate times"
        c_BC = self.time_embedding(times_B)
        c_BSC = torch.stack([c_BC, self.latent_time_embedding(latent_times_B) if separate else c_BC], 1)
        return self.region.condition(c_BSC)

    def embed(self, tokens_BL: Tensor, latents_BLD: Tensor, c_BSC: Tensor) -> Tensor:
        """Both strands before the first block, [B, L, S, W]."""
        z_BLW = self.latent_input(self.region.enter(latents_BLD), c_BSC[:, 1])
        return torch.stack([self.token_embedding(tokens_BL), z_BLW], 2)

    def strands(self, x_BLSW: Tensor) -> tuple[Tensor, Tensor]:
        """What the token head and the latent head see of the state after the last block, [B, L, W] each."""
        return x_BLSW.unbind(2)

    def probe(self, tokens_BL: Tensor) -> Tensor:
        times_B = torch.full((len(tokens_BL),), 0.5, device=tokens_BL.device)
        latents_BLD = tokens_BL.new_zeros(*tokens_BL.shape, self.latent_dim, dtype=torch.float32)
        c_BSC = self.condition(times_B, times_B if self.latent_time_embedding is not None else None)
        x_BLSW = self.embed(tokens_BL, latents_BLD, c_BSC) if self.stage.at_start else self.stage.incoming
        x_BLSW, _ = self.trunk(x_BLSW, c_BSC, None, None)
        return self.probed(self.strands(x_BLSW)[0] if self.stage.at_end else x_BLSW)

    def training_flops(self, sequence_length: int) -> TrainingFlops:
        width, cond, latent_dim = self.config.width, self.config.cond_dim, self.latent_dim
        blocks = self.block_costs()
        adaln = blocks.adaln + cond * (2 * width + 2 * latent_dim + 2 * width)
        num_embeddings = 1 if self.latent_time_embedding is None else 2
        # The first linear layer of a time embedding needs no gradient for its input: 4 FLOPs a parameter, not 6.
        per_sequence = 6 * adaln + num_embeddings * (6 * cond**2 + 4 * SINUSOID_DIM * cond)
        return TrainingFlops(
            linear=6 * (blocks.linear + 2 * latent_dim * width),
            attention=12 * blocks.attention * sequence_length,
            conditioning=per_sequence / sequence_length,
            head=6 * self.vocab_size * width,
        )


class MDiT(JointNetwork):
    """Both strands added at the input of one transformer, two heads on its end: the state is [B, L, W]. The blocks
    follow the tokens' time."""

    def make_blocks(self) -> Iterable[nn.Module]:
        return (Block(self.config, layer, causal=False) for layer in range(self.config.num_layers))

    def embed(self, tokens_BL: Tensor, latents_BLD: Tensor, c_BSC: Tensor) -> Tensor:
        return super().embed(tokens_BL, latents_BLD, c_BSC).sum(2)

    def trunk(
        self, x_BLW: Tensor, c_BSC: Tensor, dropout: DropoutKey | None, segments: Tensor | None
    ) -> tuple[Tensor, Routing | None]:
        blocks = self.stage.pick(self.blocks)
        c_BC = c_BSC[:, 0]
        return run_blocks(blocks, self.config, x_BLW, c_BC, dropout, region=self.region, segments=segments), None

    def strands(self, x_BLW: Tensor) -> tuple[Tensor, Tensor]:
        return x_BLW, x_BLW

    def block_costs(self) -> BlockCosts:
        layers, width = self.config.num_layers, self.config.width
        return BlockCosts(
            layers * (attention_weights(width) + mlp_weights(self.config)),
            layers * width,
            layers * 6 * width * self.config.cond_dim,
        )


class TwoStrandNetwork(JointNetwork):
    """Base of networks whose strands stay apart in the blocks.

    Their latent input starts as any linear layer (weight and bias with variance 1 / (3 D)), not at zero: a strand of
    zeros whose gates and head are zero too would get no gradient, ever. The first prediction ignores the latents all
    the same: gates and heads start at zero. The bias keeps the strand of dropped latents (z = 0) off the point where
    LayerNorm's gradient explodes.
    """

    def initial_rule(self, name: str, shape: torch.Size) -> float | None:
        return 1 / math.sqrt(3 * self.latent_dim) if name.startswith("latent_input.linear.") else None

    def hidden_shape(self, num_rows: int, length: int) -> tuple[int, ...]:
        return num_rows, self.region.share(length), 2, self.config.width


def drop(x: Tensor, keep: Tensor | None, probability: float) -> Tensor:
    """Inverted dropout; `keep` has the shape of x, or is None where nothing is dropped."""
    return x if keep is None else x * keep / (1 - probability)


def strand_keys(dropout: DropoutKey) -> tuple[DropoutKey, DropoutKey]:
    """Independent dropout for the tokens' strand and the latents'."""
    return dropout, replace(dropout, key=fold_key(dropout.key, "latents"))


def attention_weights(width: int) -> int:
    """Weights of the projections of one attention."""
    return 4 * width**2


def mlp_weights(model: ModelConfig) -> int:
    """Weights of one MLP, without biases."""
    return 2 * model.width * hidden_width(model)


def hidden_width(model: ModelConfig) -> int:
    """Width of an MLP's hidden layer."""
    return round(model.width * model.mlp_ratio)
