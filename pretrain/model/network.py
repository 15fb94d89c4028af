"""What every network of the house offers beside its own `forward`: counts, FLOPs, and a way to look inside.

Networks differ in what they take (tokens, soft tokens, embeddings, latents beside tokens) and in what they give back;
an objective knows both. The training loop, the direction probe and the report know only what is here.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from braid.kernels.errors import ConfigError
from braid.parallel.context import divide_attention
from braid.parallel.layers import (
    ALONE,
    Columns,
    Region,
    Rows,
    mark_parameters,
    mark_shards,
    set_whole,
    shard_layers,
    whole_shape,
)
from braid.parallel.pipeline import Stage, counts_here
from braid.parallel.vocabulary import Vocabulary
from braid.pretrain.model.flops import TrainingFlops
from braid.pretrain.model.initialisation import initial_values
from braid.pretrain.model.token_logits import TokenLogits


class Network(nn.Module):
    """Base of all networks. A subclass makes its modules on the meta device and calls `materialise` last.

    Shapes: B sequences, L positions, W width, V vocabulary. Where the layers are divided among processes (`region`),
    the logits a network gives are those of this process's part of the vocabulary (`vocabulary`), in all modes. Where
    the blocks are in pieces on several processes, `forward` and `probe` are about the piece that runs (`stage`), and
    return hidden states unless that is the last one; a call of the network is about all of it. `forward` returns
    tensors, and `say` makes of them what a call returns.
    """

    causal = False
    """Whether position i may see positions above i."""
    vocab_size: int
    region: Region = ALONE
    """The processes that divide the work of this network, and its sequences, set before `materialise`."""
    parts: ClassVar[dict[str, str]] = {}
    """First component of a parameter's name -> `blocks`, `embedding` or `heads`; all else counts as `other`."""
    divided: ClassVar[dict[str, Columns | Rows]] = {}
    """Layers of the network's own that can be divided; those of its blocks say it themselves."""
    inside: ClassVar[tuple[str, ...]] = ()
    """First components of the names of what works on hidden states that may be divided along the positions."""
    in_float32: ClassVar[tuple[str, ...]] = ()
    """Layers of the network's own that compute in float32 whatever autocast says; other classes say it themselves."""
    at_start: ClassVar[tuple[str, ...]] = ()
    """Children and parameters that come before the blocks and are needed nowhere else."""
    at_end: ClassVar[tuple[str, ...]] = ()
    """Those that come after the blocks."""

    @property
    def vocabulary(self) -> Vocabulary:
        """What losses and samplers use the logits by."""
        return Vocabulary(self.vocab_size, self.region.axis)

    @property
    def stage(self) -> Stage:
        """Which of the blocks are on this process, and which run now."""
        return self.region.stage

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        output = self.stage.through(super().__call__, *arguments, **options)
        return self.say(output) if self.stage.at_end else output

    def say(self, output: Any) -> Any:
        """The network's prediction, from what `forward` returns at its end."""
        return output

    def token_logits(self, hidden_BLW: Tensor, linear: str) -> TokenLogits:
        """What the output layer of that name makes of hidden states, when it is asked."""
        layer = self.get_submodule(linear) if self.stage.holds_end else None
        return TokenLogits(hidden_BLW, layer, self.vocabulary, self.stage, self.config.z_loss)

    def hidden_shape(self, num_rows: int, length: int) -> tuple[int, ...]:
        """Shape of the hidden states between two blocks, of rows with that many tokens."""
        return num_rows, self.region.share(length), self.config.width

    def probe(self, tokens_BL: Tensor) -> Tensor:
        """Hidden states [B, L, W] after the last block, everything beside the tokens neutral (times 1/2, latents 0);
        of the positions that are here, where sequences are divided."""
        raise NotImplementedError

    def probed(self, hidden_BLW: Tensor) -> Tensor:
        """At the network's end all positions of the tensor axis; before another piece the state as it is."""
        return self.region.leave(hidden_BLW) if self.stage.at_end else hidden_BLW

    def training_flops(self, sequence_length: int) -> TrainingFlops:
        """Model FLOPs per token of one forward and backward pass."""
        raise NotImplementedError

    def initial_rule(self, name: str, shape: torch.Size) -> float | None:
        """Standard deviation of the parameter's initial values where the house's rules (initialisation.py) do not
        hold: 0.0 for zeros; None to keep to the rules. For other than normal values a network overrides
        `initial_values`."""
        return None

    def initial_values(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """Of the whole parameter, float32 on the CPU."""
        return initial_values(seed, name, shape, self.initial_rule(name, shape))

    def materialise(self, device: torch.device, seed: int) -> None:
        """Give parameters made on `meta` their storage on `device` and their initial values, a function of (seed,
        name). On `meta` nothing happens: a network without values serves for counting.

        Layers that are divided are so from here on, and this process never holds the whole of them, nor the blocks that
        are on others. Modules get their values one after the other, and what the region's `store` leaves of one is all
        that is held of it when the next begins. Raises ConfigError where the heads do not divide.
        """
        divide_attention(self, self.region.context)
        if self.region.size > 1:
            self._check_heads()
            shard_layers(self, self.region)
        self.stage.drop_elsewhere(self, self.at_start, self.at_end)
        if device.type != "meta":
            for prefix, owner in self.named_modules():
                owner.to_empty(device=device, recurse=False)
                mark_shards(owner)
                for name, parameter in owner.named_parameters(prefix, recurse=False):
                    set_whole(parameter, self.initial_values(name, whole_shape(parameter), seed))
                self.region.store(owner)
        if self.region.size > 1:
            mark_parameters(self, self.region, self.inside)

    def _check_heads(self) -> None:
        heads, size = self.config.num_heads, self.region.size
        if heads % size:
            raise ConfigError(
                "the attention heads do not divide among the processes of the tensor axis",
                found=f"model.num_heads={heads} / {size} processes = {heads / size:.2f}",
                change="parallel.tensor, or model.num_heads a multiple of it",
            )


def parameter_counts(network: Network) -> dict[str, int]:
    """Parameters by part: `blocks`, `embedding` (token table), `heads` (token and latent), `other` (time embedding,
    latent input, ...) and `total`, of the whole network where it is divided: collective over its pipeline. Published
    sizes of the DiT line ("92.1M") count the blocks alone."""
    count, stage = {"blocks": 0, "embedding": 0, "heads": 0, "other": 0}, network.stage
    for name, parameter in network.named_parameters():
        if counts_here(parameter, stage.axis):
            count[network.parts.get(name.partition(".")[0], "other")] += whole_shape(parameter).numel()
    count = dict(zip(count, stage.add_up(list(count.values())), strict=True))
    return count | {"total": sum(count.values())}
