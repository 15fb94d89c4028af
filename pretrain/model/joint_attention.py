"""The joint denoiser of LADD: two streams, tokens and latent slots, that meet in every block's attention.

The multimodal DiT of Stable Diffusion 3 (arXiv 2403.03206) as LADD (arXiv 2510.18114, B7) uses it: each stream has its
own norms, QKV, output projection, MLP and adaLN; one softmax runs over [tokens; slots]. A stream of a block is a
`Block` whose attention is taken apart, so a 12 x 768 network has twice the 92.13M of a plain one in its blocks.
Shape suffixes: B sequences, L positions, S slots, W width, C conditioning width, V vocabulary, D latent dimension.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from braid.parallel.context import CoreAttention
from braid.parallel.layers import ALONE, Columns, Region, Rows
from braid.pretrain.config.schema import ModelConfig
from braid.pretrain.model.blocks import Block, DropoutKey, rope_tables, rotate
from braid.pretrain.model.conditioning import ModulatedLinear, TimeEmbedding, TokenHead, modulate, sinusoid
from braid.pretrain.model.flops import SINUSOID_DIM, TrainingFlops
from braid.pretrain.model.network import Network
from braid.pretrain.model.token_logits import TokenLogits


class SlotPrediction(NamedTuple):
    """What the network says about the clean text and its latent slots."""

    tokens: TokenLogits
    latents: Tensor
    """About every slot [B, S, O], float32: the clean latent, or logits of its code (the mask's column included)."""
    without_tokens: TokenLogits | None = None
    """Of a second call that saw the slots alone; for LADD's independence loss."""

    @property
    def logits(self) -> Tensor:
        """All of them, as `TokenLogits.whole`."""
        return self.tokens.whole


Masks = tuple[Tensor, Tensor]
"""What dropout keeps after a stream's attention and after its MLP."""


class JointBlock(nn.Module):
    """Both streams one block further: h + gate * attention over both, then h + gate * MLP of each."""

    def __init__(self, model: ModelConfig, layer: int) -> None:
        super().__init__()
        self.tokens = Block(model, layer, causal=False)
        self.latents = Block(model, layer, causal=False)
        self.core = CoreAttention()

    def forward(
        self,
        x_BLW: Tensor,
        y_BSW: Tensor,
        c_BC: Tensor,
        rope: tuple[Tensor, Tensor],
        keep: tuple[Masks, Masks] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`rope` has L + S positions; `keep` is what `dropout_masks` gives, or None for no dropout."""
        blocks, states = (self.tokens, self.latents), (x_BLW, y_BSW)
        modulations = [block.adaln(c_BC) for block in blocks]
        qkv = [
            block.attention.qkv(modulate(block.attention_norm(h), shift, scale))
            for block, h, (shift, scale, *_) in zip(blocks, states, modulations, strict=True)
        ]
        head_dim = self.tokens.attention.head_dim
        q_BHNK, k_BHNK, v_BHNK = torch.cat(qkv, dim=1).unflatten(-1, (3, -1, head_dim)).permute(2, 0, 3, 1, 4)
        mixed_BHNK = self.core(rotate(q_BHNK, *rope), rotate(k_BHNK, *rope), v_BHNK)
        updates = mixed_BHNK.transpose(1, 2).flatten(2).split([h.shape[1] for h in qkv], dim=1)
        x_BLW, y_BSW = (
            _advance(*stream) for stream in zip(blocks, states, updates, modulations, keep or (None, None), strict=True)
        )
        return x_BLW, y_BSW

    def dropout_masks(
        self, dropout: DropoutKey, width: int, num_slots: int, region: Region = ALONE
    ) -> tuple[Masks, Masks]:
        """The masks of both streams: slots are the positions after the tokens. Where sequences are divided, `dropout`
        and `num_slots` are about those that are here, and `region` may divide them again."""
        here, context = dropout.positions, region.context
        first = len(here) * context.size + context.start(num_slots)
        after = torch.arange(first, first + num_slots, device=here.device)
        tokens, slots = (replace(dropout, positions=region.positions(at)) for at in (here, after))
        return self.tokens.dropout_masks(tokens, width), self.latents.dropout_masks(slots, width)


def _advance(block: Block, h: Tensor, update: Tensor, modulation: tuple[Tensor, ...], keep: Masks | None) -> Tensor:
    """A stream after its attention, of which `update` is the mix of values."""
    _, _, gate, mlp_shift, mlp_scale, mlp_gate = modulation
    h = h + gate * block.drop(block.attention.out(update), keep and keep[0])
    return h + mlp_gate * block.drop(block.mlp(modulate(block.mlp_norm(h), mlp_shift, mlp_scale)), keep and keep[1])


class LatentInput(nn.Module):
    """Linear, SiLU, Linear, four times the width between. With one linear layer the first norm would discard the
    length of a latent, which tells its noise."""

    def __init__(self, latent_dim: int, width: int) -> None:
        super().__init__()
        self.input = nn.Linear(latent_dim, 4 * width)
        self.output = nn.Linear(4 * width, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.output(F.silu(self.input(y)))


class JointDenoiser(Network):
    """Tokens [B, L] and latent slots [B, S, D] to a `SlotPrediction`.

    `latent_positions`: `rope` puts the slots at positions L to L + S - 1 of one rotary sequence; `learned` leaves them
    unrotated and adds an embedding of each slot. `times`: which times the network is told, `none`, `latents` or
    `both`; one that is not told is fed 0. With `masked_latents` it owns the vector a masked slot shows, `latent_mask`.
    Built where torch's default device says; on `meta` it stays without values. `seed` is the run key of the values.
    """

    parts: ClassVar[dict[str, str]] = {
        "blocks": "blocks",
        "token_embedding": "embedding",
        "token_head": "heads",
        "latent_head": "heads",
    }
    divided: ClassVar = {"token_embedding": Rows(), "token_head.linear": Columns()}
    inside: ClassVar = ("blocks", "token_head", "latent_input", "latent_head")
    at_start: ClassVar = ("token_embedding", "latent_input", "slot_embedding")
    at_end: ClassVar = ("token_head", "latent_head")

    def __init__(
        self,
        model: ModelConfig,
        *,
        vocab_size: int,
        num_slots: int,
        latent_dim: int,
        latent_outputs: int,
        latent_positions: str,
        times: str,
        masked_latents: bool,
        seed: int,
        region: Region = ALONE,
    ) -> None:
        super().__init__()
        self.region = region
        assert model.width % (2 * model.num_heads) == 0, "RoPE rotates pairs within a head"
        assert latent_positions in ("rope", "learned") and times in ("none", "latents", "both")
        self.config, self.vocab_size, self.num_slots, self.latent_dim = model, vocab_size, num_slots, latent_dim
        self.latent_outputs, self.latent_positions, self.times = latent_outputs, latent_positions, times
        device = torch.get_default_device()
        with torch.device("meta"):
            self.token_embedding = nn.Embedding(vocab_size, model.width)
            self.latent_input = LatentInput(latent_dim, model.width)
            if latent_positions == "learned":
                self.slot_embedding = nn.Parameter(torch.empty(num_slots, model.width))
            if masked_latents:
                self.latent_mask = nn.Parameter(torch.empty(latent_dim))
            self.token_time = TimeEmbedding(model.cond_dim)
            self.latent_time = TimeEmbedding(model.cond_dim)
            self.blocks = nn.ModuleList(JointBlock(model, layer) for layer in range(model.num_layers))
            self.token_head = TokenHead(model.width, vocab_size, model.cond_dim)
            self.latent_head = ModulatedLinear(model.width, latent_outputs, model.cond_dim)
        self.materialise(device, seed)
        if model.compile:
            for block in self.blocks:
                block.compile()

    @property
    def slots_here(self) -> int:
        """How many slots the network is given: all, or a part where sequences are divided."""
        return self.num_slots // self.region.context.size

    def initial_rule(self, name: str, shape: torch.Size) -> float | None:
        return {"slot_embedding": 0.02, "latent_mask": 0.0}.get(name)

    def forward(
        self,
        tokens: Tensor,
        latents: Tensor,
        token_times: Tensor,
        latent_times: Tensor,
        dropout: DropoutKey | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens int64 [B, L], latents [B, S, D], times in [0, 1] [B] of each; runs under the caller's autocast.

        Returns what the token head's linear layer reads [B, L, W], and what is said about the slots; a call of the
        network makes a `SlotPrediction` of them.
        """
        c_BC = self.condition(token_times, latent_times)
        x_BLW, y_BSW = self.trunk(tokens, latents, c_BC, dropout)
        if not self.stage.at_end:
            return torch.cat([x_BLW, y_BSW], 1)
        latents_BSO = self.region.leave(self.latent_head(y_BSW, c_BC))
        return self.token_head(x_BLW, c_BC), latents_BSO.float()

    def say(self, output: tuple[Tensor, Tensor]) -> SlotPrediction:
        hidden_BLW, latents_BSO = output
        return SlotPrediction(self.token_logits(hidden_BLW, "token_head.linear"), latents_BSO)

    def condition(self, token_times_B: Tensor, latent_times_B: Tensor) -> Tensor:
        """c = SiLU(E(t_x) + E'(t_y)) [B, C], in float32 even under autocast, as `TimeEmbedding` is."""
        told = {"none": (False, False), "latents": (False, True), "both": (True, True)}[self.times]
        with torch.autocast(token_times_B.device.type, enabled=False):
            token, latent = (
                embedding.output(F.silu(embedding.input(sinusoid(times if is_told else torch.zeros_like(times)))))
                for embedding, times, is_told in zip(
                    (self.token_time, self.latent_time), (token_times_B, latent_times_B), told, strict=True
                )
            )
            return self.region.condition(F.silu(token + latent))

    def trunk(
        self, tokens_BL: Tensor, latents_BSD: Tensor, c_BC: Tensor, dropout: DropoutKey | None = None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states of both streams after the last block that runs, float32."""
        assert latents_BSD.shape[1:] == (self.slots_here, self.latent_dim), "the latents do not fit the network"
        config, incoming = self.config, self.stage.incoming
        if self.stage.at_start:
            x_BLW, y_BSW = self.embed(tokens_BL, latents_BSD)
        else:
            num_slots = self.region.share(self.num_slots)
            x_BLW, y_BSW = incoming.split([incoming.shape[1] - num_slots, num_slots], 1)
        rope = self.rope(tokens_BL.shape[1], tokens_BL.device)
        if self.training and config.dropout > 0:
            assert dropout is not None, "dropout in training needs its key"
        else:
            dropout = None
        recompute = config.activation_checkpointing == "block" and torch.is_grad_enabled()
        for block in self.stage.pick(self.blocks):
            if recompute:
                flags = {"use_reentrant": False, "preserve_rng_state": False}
                x_BLW, y_BSW = checkpoint(self._run, block, x_BLW, y_BSW, c_BC, rope, dropout, **flags)
            else:
                x_BLW, y_BSW = self._run(block, x_BLW, y_BSW, c_BC, rope, dropout)
        return x_BLW, y_BSW

    def embed(self, tokens_BL: Tensor, latents_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Both streams before the first block."""
        y_BSW = self.latent_input(self.region.enter(latents_BSD)).float()
        if self.latent_positions == "learned":
            y_BSW = y_BSW + self.region.enter(self.region.context.part(self.slot_embedding[None]))
        return self.token_embedding(tokens_BL), y_BSW

    def hidden_shape(self, num_rows: int, length: int) -> tuple[int, ...]:
        """Both streams, one after the other."""
        share = self.region.share
        return num_rows, share(length) + share(self.num_slots), self.config.width

    def _run(
        self,
        block: JointBlock,
        x_BLW: Tensor,
        y_BSW: Tensor,
        c_BC: Tensor,
        rope: tuple[Tensor, Tensor],
        dropout: DropoutKey | None,
    ) -> tuple[Tensor, Tensor]:
        """One block with its dropout; what activation checkpointing runs again, masks included."""
        width, region = self.config.width, self.region
        keep = block.dropout_masks(dropout, width, self.slots_here, region) if dropout else None
        return block(x_BLW, y_BSW, c_BC, rope, keep)

    def rope(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rotary tables of `length` tokens and of the slots beside them, [L + S, K/2] each."""
        context, head_dim, base = self.region.context, self.config.width // self.config.num_heads, self.config.rope_base
        num_slots = self.slots_here
        tokens = rope_tables(length, head_dim, base, device, start=context.start(length))
        if self.latent_positions == "learned":
            return F.pad(tokens[0], (0, 0, 0, num_slots), value=1.0), F.pad(tokens[1], (0, 0, 0, num_slots))
        first = length * context.size + context.start(num_slots)
        slots = rope_tables(num_slots, head_dim, base, device, start=first)
        cos, sin = (torch.cat(pair) for pair in zip(tokens, slots, strict=True))
        return cos, sin

    def probe(self, tokens_BL: Tensor) -> Tensor:
        times_B = torch.full((len(tokens_BL),), 0.5, device=tokens_BL.device)
        latents_BSD = torch.zeros(len(tokens_BL), self.slots_here, self.latent_dim, device=tokens_BL.device)
        streams = self.trunk(tokens_BL, latents_BSD, self.condition(times_B, times_B))
        return self.probed(streams[0] if self.stage.at_end else torch.cat(streams, 1))

    def training_flops(self, sequence_length: int) -> TrainingFlops:
        """As model/flops.py counts: the slots' linear layers and head are spread over the tokens, and every one of the
        L + S queries sees every key."""
        model, slots_per_token = self.config, self.num_slots / sequence_length
        width, cond, layers = model.width, model.cond_dim, model.num_layers
        blocks = layers * (4 * width**2 + 2 * width * round(width * model.mlp_ratio))
        # The first linear layer of the latent input needs no gradient for its input: 4 FLOPs a parameter, not 6.
        latent_port = 16 * width * self.latent_dim + 6 * (4 * width**2 + width * self.latent_outputs)
        adaln = cond * (2 * 6 * width * layers + 2 * 2 * width)
        per_sequence = 6 * (adaln + 2 * cond**2) + 2 * 4 * SINUSOID_DIM * cond
        return TrainingFlops(
            linear=6 * blocks * (1 + slots_per_token) + latent_port * slots_per_token,
            attention=12 * layers * width * (sequence_length + self.num_slots) * (1 + slots_per_token),
            conditioning=per_sequence / sequence_length,
            head=6 * self.vocab_size * width,
        )
