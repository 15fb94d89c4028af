"""ELF's network (Embedded Language Flows, arXiv 2605.10938): a transformer with in-context conditioning and two heads.

It sees noisy latents, an earlier estimate of the clean ones (self-conditioning), the flow time, the scale of guidance,
and whether it is to denoise or to decode. Nothing is modulated: the three scalars are twelve tokens before the text,

    [4 time tokens][4 guidance tokens][4 mode tokens][text]

Pre-norm blocks with RMSNorm, SwiGLU, normalised queries and keys, biases everywhere. One trunk, two heads: `denoise`
predicts the clean latents, `decode` the tokens. Flow time tau = 1 - t runs from noise (0) to data (1), see
diffusion/flow.py. Shape suffixes: B sequences, L positions of text, W width, D latent dimension, V vocabulary, H heads,
K head dimension, N tokens in the transformer (12 + L).
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from braid.kernels import random
from braid.kernels.norms import rms_norm
from braid.parallel.context import CoreAttention
from braid.parallel.layers import ALONE, Columns, OutputLinear, Region, Rows
from braid.pretrain.config.schema import ModelConfig
from braid.pretrain.model.blocks import rope_tables
from braid.pretrain.model.conditioning import SINUSOID_DIM, sinusoid
from braid.pretrain.model.flops import TrainingFlops
from braid.pretrain.model.network import Network
from braid.pretrain.model.token_logits import TokenLogits

TOKENS_EACH = 4
NUM_PREFIX = 3 * TOKENS_EACH
EMBEDDING_STD = 0.02
PROBE_KEY = 0xE1F


class ELFPrediction(NamedTuple):
    """What the heads that were asked say; None where one was not."""

    latents: Tensor | None
    """Estimate of the clean latents [B, L, D], float32."""
    tokens: TokenLogits | None

    @property
    def logits(self) -> Tensor | None:
        """All of them, as `TokenLogits.whole`."""
        return None if self.tokens is None else self.tokens.whole


class ELFNetwork(Network):
    """Noisy latents [B, L, D] to an `ELFPrediction`. 104.59M, 342.55M and 652.12M parameters at the published sizes."""

    parts: ClassVar[dict[str, str]] = {"blocks": "blocks", "denoise_head": "heads", "decode_head": "heads"}
    inside: ClassVar = ("blocks",)
    in_float32: ClassVar = ("self_condition", "bottleneck", "input", "time_embedding", "guidance_embedding")
    at_start: ClassVar = (
        *("self_condition", "bottleneck", "input", "time_embedding", "guidance_embedding"),
        *("time_tokens", "guidance_tokens", "mode_tokens"),
    )
    at_end: ClassVar = ("denoise_head", "decode_head")

    def __init__(
        self,
        model: ModelConfig,
        *,
        vocab_size: int,
        latent_dim: int,
        bottleneck: int,
        seed: int,
        region: Region = ALONE,
    ) -> None:
        super().__init__()
        self.region = region
        assert model.width % (2 * model.num_heads) == 0, "RoPE rotates pairs within a head"
        self.config, self.vocab_size, self.latent_dim, self.bottleneck_dim = model, vocab_size, latent_dim, bottleneck
        width, device = model.width, torch.get_default_device()
        with torch.device("meta"):  # no values yet: torch's own initialisation draws from the global generator
            self.self_condition = nn.Linear(2 * latent_dim, latent_dim)
            self.bottleneck = nn.Linear(latent_dim, bottleneck, bias=False)
            self.input = nn.Linear(bottleneck, width)
            self.time_embedding, self.guidance_embedding = ScalarEmbedding(width), ScalarEmbedding(width)
            # Three axes, as in the released code, where the optimizer treats them as vectors and not as matrices.
            self.time_tokens = nn.Parameter(torch.empty(1, TOKENS_EACH, width))
            self.guidance_tokens = nn.Parameter(torch.empty(1, TOKENS_EACH, width))
            self.mode_tokens = nn.Parameter(torch.empty(1, TOKENS_EACH, width))
            self.blocks = nn.ModuleList(ELFBlock(model) for _ in range(model.num_layers))
            self.denoise_head = DenoiseHead(width, latent_dim)
            self.decode_head = DecodeHead(width, latent_dim, vocab_size)
        self.materialise(device, seed)
        if model.compile:
            for block in self.blocks:
                block.compile()

    def forward(
        self,
        z_BLD: Tensor,
        estimate_BLD: Tensor,
        tau_B: Tensor,
        guidance_B: Tensor,
        decode_B: Tensor,
        valid_BL: Tensor,
        *,
        heads: tuple[str, ...] = ("denoise", "decode"),
    ) -> tuple[Tensor | None, Tensor | None]:
        """Noisy latents and the estimate (zeros: none), flow times and guidance scales [B], which rows are in decode
        mode (bool [B]), and where text is (bool [B, L]; the rest is padding and is not attended to). Runs under the
        caller's autocast; inputs, conditioning and the denoise head stay float32.

        Returns the estimate of the clean latents [B, L, D], and what the last layer of the decode head reads; a call
        of the network makes an `ELFPrediction` of them.
        """
        x_BLW = self.trunk(z_BLD, estimate_BLD, tau_B, guidance_B, decode_B, valid_BL)
        if not self.stage.at_end:
            return x_BLW
        return (
            self.denoise_head(x_BLW) if "denoise" in heads else None,
            self.decode_head(x_BLW) if "decode" in heads else None,
        )

    def say(self, output: tuple[Tensor | None, Tensor | None]) -> ELFPrediction:
        latents_BLD, hidden_BLD = output
        if hidden_BLD is None:
            return ELFPrediction(latents_BLD, None)
        return ELFPrediction(latents_BLD, self.token_logits(hidden_BLD, "decode_head.unembedding"))

    def trunk(
        self, z_BLD: Tensor, estimate_BLD: Tensor, tau_B: Tensor, guidance_B: Tensor, decode_B: Tensor, valid_BL: Tensor
    ) -> Tensor:
        """Hidden states of the text [B, L, W] after the last block, float32; before another piece, with those of the
        tokens before it."""
        model, context, length = self.config, self.region.context, z_BLD.shape[1]
        x_BNW = self.stage.incoming
        if self.stage.at_start:
            x_BNW = self.embed(z_BLD, estimate_BLD, tau_B, guidance_B, decode_B)
        num_prefix = NUM_PREFIX // context.size
        head_dim, start = model.width // model.num_heads, context.start(length)
        rope = prefixed(rope_tables(length, head_dim, model.rope_base, z_BLD.device, start=start), num_prefix)
        keys_B11N = context.gather(F.pad(valid_BL, (num_prefix, 0), value=True))[:, None, None]
        recompute = model.activation_checkpointing == "block" and torch.is_grad_enabled()
        for block in self.stage.pick(self.blocks):
            if recompute:
                flags = {"use_reentrant": False, "preserve_rng_state": False}
                x_BNW = checkpoint(block, x_BNW, rope, keys_B11N, **flags)
            else:
                x_BNW = block(x_BNW, rope, keys_B11N)
        return self.region.leave(x_BNW)[:, num_prefix:] if self.stage.at_end else x_BNW

    def embed(self, z_BLD: Tensor, estimate_BLD: Tensor, tau_B: Tensor, guidance_B: Tensor, decode_B: Tensor) -> Tensor:
        """The state before the first block: this process's of the twelve tokens, and its text."""
        with torch.autocast(z_BLD.device.type, enabled=False):
            x_BLD = self.self_condition(torch.cat([z_BLD, estimate_BLD], dim=-1))
            x_BLW = self.input(self.bottleneck(x_BLD))
            prefix_B12W = torch.cat(
                [
                    self.time_tokens + self.time_embedding(tau_B)[:, None],
                    self.guidance_tokens + self.guidance_embedding(guidance_B)[:, None],
                    self.mode_tokens * decode_B[:, None, None],
                ],
                dim=1,
            )
            prefix_BPW = self.region.context.part(prefix_B12W)
            return self.region.enter(torch.cat([prefix_BPW, x_BLW], dim=1))

    def hidden_shape(self, num_rows: int, length: int) -> tuple[int, ...]:
        return super().hidden_shape(num_rows, NUM_PREFIX + length)

    def probe(self, tokens_BL: Tensor) -> Tensor:
        """There is no token table: each token gets a fixed random latent vector."""
        position = torch.zeros(1, dtype=torch.int64, device=tokens_BL.device)
        z_BLD = random.normal(PROBE_KEY, tokens_BL.flatten(), position, self.latent_dim).view(*tokens_BL.shape, -1)
        half_B = torch.full((len(tokens_BL),), 0.5, device=tokens_BL.device)
        everywhere_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
        return self.trunk(z_BLD, torch.zeros_like(z_BLD), half_B, 2 * half_B, half_B > 1, everywhere_BL)

    def training_flops(self, sequence_length: int) -> TrainingFlops:
        """One forward and backward pass; the twelve tokens before the text are spread over its tokens."""
        width, layers, dim = self.config.width, self.config.num_layers, self.latent_dim
        tokens = 1 + NUM_PREFIX / sequence_length
        block = 4 * width**2 + 3 * width * swiglu_width(self.config)
        ports = 2 * dim**2 + dim * self.bottleneck_dim + self.bottleneck_dim * width + width * dim
        # The first layer of an embedding of a scalar needs no gradient for its input: 4 FLOPs a parameter, not 6.
        per_sequence = 2 * (6 * width**2 + 4 * SINUSOID_DIM * width)
        return TrainingFlops(
            linear=6 * (layers * block * tokens + ports),
            attention=12 * layers * width * tokens**2 * sequence_length,
            conditioning=per_sequence / sequence_length,
            head=6 * dim * (width + self.vocab_size),
        )

    # -- initial values: Xavier-uniform matrices, normal(0.02) conditioning, a denoise head that starts at zero --------

    def initial_rule(self, name: str, shape: torch.Size) -> float | None:
        if name.endswith("_tokens") or (name.partition(".")[0].endswith("_embedding") and name.endswith("weight")):
            return EMBEDDING_STD
        return 0.0 if len(shape) == 2 else None  # `initial_values` has others for those that do not stay zero

    def initial_values(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        if self.initial_rule(name, shape) != 0.0 or name.startswith("denoise_head."):
            return super().initial_values(name, shape, seed)
        bound = math.sqrt(6 / sum(shape))
        return (2 * random.initial_uniform(seed, name, shape) - 1) * bound


class ELFBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). No time enters but through the tokens before the text."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(model.width)
        self.attention = NormedAttention(model.width, model.num_heads)
        self.mlp_norm = RMSNorm(model.width)
        self.mlp = SwiGLU(model.width, swiglu_width(model))

    def forward(self, x_BNW: Tensor, rope: tuple[Tensor, Tensor], keys_B11N: Tensor) -> Tensor:
        x_BNW = x_BNW + self.attention(self.attention_norm(x_BNW), rope, keys_B11N)
        return x_BNW + self.mlp(self.mlp_norm(x_BNW))


class NormedAttention(nn.Module):
    """Self-attention with biases whose queries and keys are RMS-normalised per head, before they are rotated."""

    divided: ClassVar = {"qkv": Columns(parts=3), "out": Rows()}
    per_head: ClassVar = ("query_norm", "key_norm")

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.head_dim = width // num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.query_norm, self.key_norm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)
        self.out = nn.Linear(width, width)
        self.core = CoreAttention()

    def forward(self, x_BNW: Tensor, rope: tuple[Tensor, Tensor], keys_B11N: Tensor) -> Tensor:
        q_BHNK, k_BHNK, v_BHNK = self.qkv(x_BNW).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        q_BHNK = rotate_pairs(self.query_norm(q_BHNK), *rope).to(v_BHNK.dtype)
        k_BHNK = rotate_pairs(self.key_norm(k_BHNK), *rope).to(v_BHNK.dtype)
        # Scores and softmax are float32 inside, whatever the dtype of the operands.
        x_BHNK = self.core(q_BHNK, k_BHNK, v_BHNK, keys=keys_B11N)
        return self.out(x_BHNK.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """output(SiLU(gate(x)) * value(x)), gate and value in one matrix, with biases."""

    divided: ClassVar = {"gate_value": Columns(parts=2), "output": Rows()}

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_value = nn.Linear(width, 2 * hidden)
        self.output = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate_value(x).chunk(2, dim=-1)
        return self.output(F.silu(gate) * value)


class RMSNorm(nn.Module):
    """x / rms(x) times a weight, computed in and returned as float32 whatever autocast says."""

    EPS = 1e-6

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.EPS)


class ScalarEmbedding(nn.Module):
    """[B] -> [B, W]: two linear layers with a SiLU between them on sinusoids of the raw scalar (never scaled up)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input = nn.Linear(SINUSOID_DIM, width)
        self.output = nn.Linear(width, width)

    def forward(self, scalars_B: Tensor) -> Tensor:
        return self.output(F.silu(self.input(sinusoid(scalars_B))))


class DenoiseHead(nn.Module):
    """RMSNorm and a linear layer to the clean latents, in float32: their rounding would be divided by 1 - tau."""

    in_float32: ClassVar = ("linear",)

    def __init__(self, width: int, latent_dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.linear = nn.Linear(width, latent_dim)

    def forward(self, x_BLW: Tensor) -> Tensor:
        with torch.autocast(x_BLW.device.type, enabled=False):
            return self.linear(self.norm(x_BLW))


class DecodeHead(nn.Module):
    """Two layers from the trunk's output, not normalised, to logits; the second is called by whoever needs those. The
    paper writes one matrix on the predicted
    latents; the released code and its parameter counts have this head, so the trunk is all the two branches share."""

    divided: ClassVar = {"unembedding": Columns(outside=True)}

    def __init__(self, width: int, latent_dim: int, vocab_size: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, latent_dim)
        self.unembedding = OutputLinear(latent_dim, vocab_size)

    def forward(self, x_BLW: Tensor) -> Tensor:
        return F.gelu(self.hidden(x_BLW), approximate="tanh")


def swiglu_width(model: ModelConfig) -> int:
    """Two thirds of the MLP's width, so that three matrices hold what two do: floor(2/3 mlp_ratio W)."""
    return int(model.width * model.mlp_ratio * 2 / 3)


def prefixed(text: tuple[Tensor, Tensor], num_prefix: int) -> tuple[Tensor, Tensor]:
    """cos and sin of the tokens before the text, which are not rotated, and of the text."""
    cos_LK, sin_LK = text
    return F.pad(cos_LK, (0, 0, num_prefix, 0), value=1.0), F.pad(sin_LK, (0, 0, num_prefix, 0))


def rotate_pairs(x_BHNK: Tensor, cos_NK: Tensor, sin_NK: Tensor) -> Tensor:
    """Rotate the neighbours (2i, 2i + 1) of every head by their position's angle (interleaved RoPE)."""
    first, second = x_BHNK[..., 0::2], x_BHNK[..., 1::2]
    return torch.stack([first * cos_NK - second * sin_NK, second * cos_NK + first * sin_NK], dim=-1).flatten(-2)
