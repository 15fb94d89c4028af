"""MoEDiT: joint attention over both strands, then a mixture of experts for every position of each (CCDD, 2510.03206).

Tokens and latents share the projections and the RoPE positions of one attention over 2 L positions; each strand has its
own adaLN, or both share one. A router sees a position's hidden state and is not told which strand it belongs to.
All gates start at zero. Shape suffixes: as in joint.py; E experts, M rows to be dispatched.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from braid.kernels.random import dropout_keep, fold_key
from braid.parallel.context import UNDIVIDED, Context
from braid.parallel.layers import ALONE, Region
from braid.pretrain.config.objectives.ccdd import ExpertsConfig
from braid.pretrain.config.schema import ModelConfig
from braid.pretrain.model.blocks import MLP, Attention, DropoutKey, block_runner
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

TILES = 8
"""The rows for the experts fill this many tiles, and E - 1 more are needed where experts meet (see `Experts`)."""


class MoEDiT(TwoStrandNetwork):
    """`num_layers` blocks of joint attention and experts: 8 in the paper's model, 12 in the released configuration."""

    def __init__(self, model: ModelConfig, experts: ExpertsConfig, **settings) -> None:
        self.experts = experts
        super().__init__(model, **settings)

    def make_blocks(self) -> Iterable[nn.Module]:
        return (MixtureBlock(self.config, self.experts, layer, self.region) for layer in range(self.config.num_layers))

    def trunk(
        self, x_BLSW: Tensor, c_BSC: Tensor, dropout: DropoutKey | None, segments: Tensor | None
    ) -> tuple[Tensor, Routing | None]:
        blocks, routings = self.stage.pick(self.blocks), []
        run = block_runner(blocks, self.config, x_BLSW, c_BSC, dropout, region=self.region, segments=segments)
        for block in blocks:
            x_BLSW, *routing = run(block, x_BLSW)
            routings.append(routing)
        probabilities, chosen = zip(*routings, strict=True)
        routing = (self.region.leave(torch.stack(of_blocks, -2)) for of_blocks in (probabilities, chosen))
        return x_BLSW, Routing(*routing, tuple(block.layer for block in blocks), self.config.num_layers)

    def block_costs(self) -> BlockCosts:
        layers, width, experts = self.config.num_layers, self.config.width, self.experts
        per_strand = attention_weights(width) + experts.per_token * mlp_weights(self.config) + experts.num * width
        return BlockCosts(
            layers * 2 * per_strand,
            layers * 2 * 2 * width,
            layers * 2 * 6 * width * self.config.cond_dim,
        )


class MixtureBlock(nn.Module):
    """x + gate * attention(modulate(norm(x))) over both strands at once, then the same with the experts."""

    def __init__(self, model: ModelConfig, experts: ExpertsConfig, layer: int, region: Region) -> None:
        super().__init__()
        self.layer, self.dropout = layer, model.dropout
        self.adaln = Modulation(model.cond_dim, model.width, 6)
        self.latent_adaln = None if experts.shared_adaln else Modulation(model.cond_dim, model.width, 6)
        self.attention_norm = LayerNorm(model.width)
        self.attention = Attention(model.width, model.num_heads, causal=False)
        self.mlp_norm = LayerNorm(model.width)
        self.experts = Experts(model, experts, region)

    def forward(
        self,
        x_BLSW: Tensor,
        c_BSC: Tensor,
        rope: tuple[Tensor, Tensor],
        keep: tuple[Tensor, Tensor] | None = None,
        cache: None = None,
        visible: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The new state, and of the router the probabilities and the choice [B, L, S, E]. `keep` is what
        `dropout_masks` gives, or None for no dropout; a bidirectional block has nothing to cache.
        `visible` is what `Context.visible` gives of the positions."""
        latent_adaln = self.adaln if self.latent_adaln is None else self.latent_adaln
        vectors = zip(self.adaln(c_BSC[:, 0]), latent_adaln(c_BSC[:, 1]), strict=True)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (torch.stack(pair, 2) for pair in vectors)  # [B, 1, S, W]
        # The strands lie side by side, x_1 z_1 x_2 z_2 ...: attention does not care, each pair shares its position.
        num_strands = x_BLSW.shape[2]
        rope = tuple(table_LK.repeat_interleave(num_strands, 0) for table_LK in rope)
        if visible is not None:
            visible = visible.repeat_interleave(num_strands, 2).repeat_interleave(num_strands, 3)
        joint_BLW = modulate(self.attention_norm(x_BLSW), shift, scale).flatten(1, 2)
        update_BLSW = self.attention(joint_BLW, rope, visible=visible).unflatten(1, x_BLSW.shape[1:3])
        x_BLSW = x_BLSW + gate * drop(update_BLSW, keep and keep[0], self.dropout)
        update_BLSW, probabilities, chosen = self.experts(modulate(self.mlp_norm(x_BLSW), mlp_shift, mlp_scale))
        return x_BLSW + mlp_gate * drop(update_BLSW, keep and keep[1], self.dropout), probabilities, chosen

    def dropout_masks(self, dropout: DropoutKey, width: int) -> tuple[Tensor, Tensor]:
        """What is kept after the attention and after the experts, bool [B, L, S, W]; see `Block.dropout_masks`."""
        first, second = (
            torch.stack(
                [
                    dropout_keep(
                        fold_key(k.key, "dropout", self.layer, site), k.ordinals, k.positions, width, self.dropout
                    )
                    for k in strand_keys(dropout)
                ],
                2,
            )
            for site in ("attention", "mlp")
        )
        return first, second


class Experts(nn.Module):
    """Several MLPs, of which a softmax router picks `per_token` for every position and weighs their answers.

    The weights are the router's probabilities, renormalised over those picked if there are several. With one picked
    that would make the weight 1 whatever the router says, which then learns nothing (the published code does so:
    `gate = "renormalised"`); here it is the probability itself, as in Switch (arXiv 2101.03961).

    Where only some experts answer, the rows are laid out by expert in tiles of one size, each tile wholly one expert's,
    so that every shape is known beforehand: nothing is dropped, nothing is asked back from the device. At most
    TILES + E - 1 tiles are begun; rows of a tile that stay empty are computed in vain (an eighth for two experts).

    Where the experts' hidden units are divided among processes, each lays out the rows of all positions and computes
    its part of their answers; the router sees the positions that are here.
    """

    in_float32: ClassVar = ("router",)

    def __init__(self, model: ModelConfig, experts: ExpertsConfig, region: Region = ALONE) -> None:
        super().__init__()
        self.region = region
        self.num, self.per_token = experts.num, experts.per_token
        self.renormalised = experts.gate == "renormalised" or (experts.gate == "auto" and experts.per_token > 1)
        self.router = nn.Linear(model.width, experts.num, bias=False)
        self.mlps = nn.ModuleList(MLP(model.width, hidden_width(model)) for _ in range(experts.num))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., W] to the same, beside the router's probabilities [..., E] (float32) and choice (bool)."""
        with torch.autocast(x.device.type, enabled=False):  # what is picked must not hang on bfloat16's rounding
            probabilities = self.router(x.float()).softmax(-1)
        gates, picked = probabilities.topk(self.per_token, dim=-1)
        if self.renormalised:
            gates = gates / gates.sum(-1, keepdim=True)
        chosen = torch.zeros_like(probabilities, dtype=torch.bool).scatter(-1, picked, True)
        if self.per_token == self.num:
            weights = torch.zeros_like(gates).scatter(-1, picked, gates)
            answers = (weights[..., e, None] * mlp(x) for e, mlp in enumerate(self.mlps))
            return sum(answers), probabilities, chosen
        rows_MW = self.region.spread(x).flatten(0, -2).repeat_interleave(self.per_token, 0)
        everywhere = self.region.leave(picked)
        answers = self.dispatch(rows_MW, everywhere.flatten()).view(*everywhere.shape, -1)
        if self.region.size > 1:
            biases_EW = torch.stack([mlp.output.bias for mlp in self.mlps])
            answers = self.region.collect(answers) + biases_EW.to(answers.dtype)[picked]
        return (gates[..., None] * answers).sum(-2), probabilities, chosen

    def dispatch(self, rows_MW: Tensor, expert_M: Tensor) -> Tensor:
        """Each row's answer [M, W] by its expert (int64 [M]); of divided experts this process's part of it, without the
        bias, which belongs to the sum."""
        num_rows, width = rows_MW.shape
        size, num_tiles = -(-num_rows // TILES), TILES + self.num - 1
        experts_E = torch.arange(self.num, device=rows_MW.device)
        belongs_ME = (expert_M[:, None] == experts_E).long()
        tiles_E = (belongs_ME.sum(0) + size - 1) // size
        last_E = tiles_E.cumsum(0)
        rank_M = (belongs_ME.cumsum(0) - 1).gather(1, expert_M[:, None])[:, 0]  # among the rows of its expert
        place_M = (last_E - tiles_E)[expert_M] * size + rank_M
        tile_expert = torch.searchsorted(last_E, torch.arange(num_tiles, device=rows_MW.device), right=True)
        tile_expert = tile_expert.clamp(max=self.num - 1)  # tiles that nobody began

        tiles = rows_MW.new_zeros(num_tiles * size, width).index_copy(0, place_M, rows_MW).view(num_tiles, size, width)
        hidden = F.gelu(self._linear(tiles, tile_expert, "input"), approximate="tanh")
        return self._linear(hidden, tile_expert, "output").flatten(0, 1)[place_M]

    def _linear(self, tiles: Tensor, tile_expert: Tensor, name: str) -> Tensor:
        """The linear layer `name` of each tile's expert."""
        layers = [getattr(mlp, name) for mlp in self.mlps]
        # Float32, for the gradients of an expert's tiles are summed up here.
        weight = torch.stack([layer.weight.float() for layer in layers])[tile_expert]
        if name == "output" and self.region.size > 1:
            return torch.bmm(tiles, weight.transpose(1, 2))
        bias = torch.stack([layer.bias for layer in layers])[tile_expert]
        return torch.baddbmm(bias[:, None], tiles, weight.transpose(1, 2))


def balance_loss(routing: Routing, counted_BL: Tensor, context: Context = UNDIVIDED) -> Tensor:
    """E sum_e f_e p_e for every sequence, float32 [B], averaged over the layers: 1 where the load is even, E where one
    expert gets all (Switch, arXiv 2101.03961). f_e is the share of choices that fell on expert e and p_e its mean
    probability, over the positions that count (bool [B, L]) of both strands. By sequence, so that micro-batches do not
    matter; over both strands, so that each may have an expert of its own. Of a piece of the network, its layers' share
    of the average."""
    weight_BL = counted_BL.float() / context.sum(counted_BL.sum(1, keepdim=True)).clamp(min=1)
    share_BNE = context.sum(torch.einsum("bl,blsne->bne", weight_BL, routing.chosen.float()))
    probability_BNE = context.sum(torch.einsum("bl,blsne->bne", weight_BL, routing.probabilities))
    share_BNE = share_BNE / share_BNE.sum(-1, keepdim=True).clamp(min=1e-9)
    num_strands, num_experts = routing.probabilities.shape[2], routing.probabilities.shape[-1]
    of_layers_B = num_experts * (share_BNE * probability_BNE / num_strands).sum(-1).mean(-1)
    return of_layers_B * (len(routing.layers) / routing.num_layers)


@torch.no_grad()
def routing_metrics(routing: Routing) -> dict[str, Tensor]:
    """At each position, float32 [B, L]: for every layer and expert (from 0) the share of the strands' choices that fell
    on it, `layer0_expert1_share`; and `router_entropy` in nats, averaged over layers and strands. What a piece of the
    network knows: those of all pieces add up."""
    chosen_BLSNE = routing.chosen.float()
    shares_BLNE = (chosen_BLSNE / chosen_BLSNE.sum(-1, keepdim=True)).mean(2)
    elsewhere_BLE = torch.zeros_like(shares_BLNE[:, :, 0])
    of_layer = dict(zip(routing.layers, shares_BLNE.unbind(2), strict=True))
    places = itertools.product(range(routing.num_layers), range(elsewhere_BLE.shape[-1]))
    metrics = {f"layer{n}_expert{e}_share": of_layer.get(n, elsewhere_BLE)[..., e] for n, e in places}
    entropy_BL = torch.special.entr(routing.probabilities).sum(-1).mean((2, 3))
    return metrics | {"router_entropy": entropy_BL * (len(routing.layers) / routing.num_layers)}
