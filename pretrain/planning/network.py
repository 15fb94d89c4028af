"""The recipe's network on the meta device: all of its shapes, none of its values, no data and no encoder needed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from braid.parallel.layers import whole_shape
from braid.parallel.mesh import Axis
from braid.pretrain.config.schema import Config
from braid.pretrain.model.encoders import Encoder, TableEncoder
from braid.pretrain.model.network import Network
from braid.pretrain.objectives.base import Objective
from braid.pretrain.objectives.build import build_objective, needs_encoder
from braid.pretrain.training.optimizer import parameter_kinds
from braid.pretrain.training.precision import cast_by_autocast

PARTS = ("blocks", "embedding", "heads", "other", "objective")
"""What a parameter belongs to; the last is what an objective owns beside its network."""
TABLES = ("table", "random", "embeddings")
"""Kinds of encoder that are a vector for every token."""


@dataclass(frozen=True)
class PlannedParameter:
    """One parameter as a process of the tensor axis holds it."""

    name: str
    part: str
    """One of PARTS."""
    place: int | str
    """The block it belongs to, or `first`, `last` or `every` process of the pipeline."""
    whole: int
    """Its elements."""
    held: int
    """Those of them that one process holds, padding included."""
    trained: bool
    moments: int
    """Tensors of its shape that the optimizer keeps: Adam's two moments, or Muon's momentum."""
    is_matrix: bool
    """The weight of a linear layer, which autocast casts in every use."""


class _Shapes(TableEncoder):
    """An encoder of which only the shape is known."""

    fingerprint = ""

    def __init__(self, config: Config, vocab_size: int) -> None:
        encoder = config.objective.encoder
        Encoder.__init__(self, latent_dim=encoder.latent_dim, mask_id=0, variance_floor=encoder.variance_floor)
        self.leaky = getattr(config.objective, "leaky_encoder", False)
        self.table, self.num_parameters = torch.empty(vocab_size, encoder.latent_dim, device="meta"), 0


@dataclass(frozen=True)
class _Ids:
    """A tokenizer of which only the size is known."""

    vocab_size: int
    bos_id: int = 0
    eos_id: int = 0

    @property
    def mask_id(self) -> int:
        return self.vocab_size - 1


def planned_objective(config: Config, vocab_size: int) -> Objective:
    """The objective of `config` with its network, on the meta device. Its layers are divided as `parallel.tensor`
    says: these are the parts of one process."""
    plan, encoder = config.parallel, _Shapes(config, vocab_size) if needs_encoder(config) else None
    axis, meta = Axis("tensor", 0, plan.tensor, None), torch.device("meta")
    with meta:
        return build_objective(config, _Ids(vocab_size), encoder, meta, axis, plan.sequence)


def planned_parameters(objective: Objective, config: Config) -> list[PlannedParameter]:
    """The parameters of an objective on the meta device."""
    kinds, is_muon = parameter_kinds(objective), config.optimizer.name == "muon"
    cast = set(cast_by_autocast(objective))
    return [
        PlannedParameter(
            name=name,
            part=_part(name, objective.network),
            place=_place(name, objective.network),
            whole=whole_shape(parameter).numel(),
            held=parameter.numel(),
            trained=parameter.requires_grad,
            moments=1 if is_muon and kinds[name] in ("matrix", "table") else 2,
            is_matrix=name in cast,
        )
        for name, parameter in objective.named_parameters()
    ]


def frozen_encoder_bytes(config: Config, vocab_size: int) -> float | None:
    """Bytes of the frozen encoder on every process: 0 without one, None where it is a model that is not here."""
    if not needs_encoder(config):
        return 0.0
    encoder = config.objective.encoder
    return 4.0 * vocab_size * encoder.latent_dim if encoder.kind in TABLES else None


def _part(name: str, network: Network) -> str:
    owner, _, rest = name.partition(".")
    return network.parts.get(rest.partition(".")[0], "other") if owner == "network" else "objective"


def _place(name: str, network: Network) -> int | str:
    owner, _, rest = name.partition(".")
    module, _, below = rest.partition(".")
    if owner == "network" and module == "blocks":
        return int(below.partition(".")[0])
    if owner == "network" and module in network.at_start:
        return "first"
    if owner == "network" and module in network.at_end:
        return "last"
    return "every"  # conditioning, and what makes noise, times and targets


def padding_share(parameters: list[PlannedParameter], tensor: int) -> float:
    """Share of the elements that the processes of the tensor axis hold and that are padding or copies."""
    held = sum(parameter.held for parameter in parameters) * tensor
    return 1 - math.fsum(parameter.whole for parameter in parameters) / held
