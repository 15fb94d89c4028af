"""From a configuration, a tokenizer and (for joint models) a frozen encoder to an objective with its network."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.tokenizers import Tokenizer
from braid.kernels.random import fold_key
from braid.parallel.context import UNDIVIDED, Context
from braid.parallel.data_parallel import World
from braid.parallel.layers import Region, Store, keep_whole
from braid.parallel.mesh import Axis, Mesh
from braid.parallel.pipeline import ONE_PIECE, Stage, mark_replicated
from braid.parallel.plan import deal_blocks
from braid.pretrain.config.schema import Config
from braid.pretrain.model.encoders import Encoder, TableEncoder, build_encoder
from braid.pretrain.planning.facts import plan_facts

from .base import Objective


def build_objective(
    config: Config,
    tokenizer: Tokenizer,
    encoder: Encoder | None,
    device: torch.device,
    tensor: Axis | None = None,
    sequence: bool = False,
    context: Context = UNDIVIDED,
    stage: Stage = ONE_PIECE,
    store: Store = keep_whole,
) -> Objective:
    """The objective of `config.objective` on `device`; its initial weights depend on (seed, parameter name) alone.

    Every system is one module of this package, named as its objective, with a function `build`. Where the axis `tensor`
    has several processes, its networks' layers are divided among them, and with `sequence` their hidden states too
    (parallel/layers.py). `context` says how sequences may be divided, and `stage` which of the network's blocks are
    here (parallel/pipeline.py); `store` says what this process keeps of a network's parameters, from their first values
    on. Raises ConfigError where layers do not divide.
    """
    module = import_module(f"braid.pretrain.objectives.{config.objective.name}")
    objective = module.build(config, tokenizer, encoder, Region(tensor, sequence, context, stage, store)).to(device)
    if stage.divided:
        network = objective.network
        mark_replicated(objective, [f"network.{name}" for name in ("blocks", *network.at_start, *network.at_end)])
    return objective


def build_stage(config: Config, mesh: Mesh) -> Stage:
    """The blocks that a process of the mesh holds."""
    plan, facts = config.parallel, plan_facts(config)
    pieces = deal_blocks(facts.num_layers, plan.pipeline, plan.virtual, alternates=facts.alternates)
    return Stage(mesh.pipeline, pieces[mesh.pipeline.rank], mesh.world.device)


def needs_encoder(config: Config) -> bool:
    """Whether the objective reads what a frozen encoder says of the text."""
    encoder = getattr(config.objective, "encoder", None)
    return encoder is not None and encoder.kind != "learned"


def training_encoder(config: Config, corpus: TokenCorpus, world: World) -> Encoder | None:
    """The encoder a run trains with, or None. Rank 0 builds a missing table before the others look for it."""
    if not needs_encoder(config):
        return None
    encoder = _encoder(config, corpus.folder, corpus.tokenizer, world.device) if world.rank == 0 else None
    world.barrier()
    return encoder or _encoder(config, corpus.folder, corpus.tokenizer, world.device)


def saved_encoder(
    config: Config, tokenizer: Tokenizer, tensors: dict[str, Tensor] | None, checkpoint: Path, device: torch.device
) -> Encoder | None:
    """The encoder of a checkpoint: its table where it has one, else found again by its path."""
    if not needs_encoder(config):
        return None
    if tensors:
        floor = config.objective.encoder.variance_floor
        return TableEncoder(tensors["table"].to(device), mask_id=tokenizer.mask_id, variance_floor=floor)
    return _encoder(config, checkpoint, tokenizer, device)


def _encoder(config: Config, folder: Path, tokenizer: Tokenizer, device: torch.device) -> Encoder:
    return build_encoder(
        config.objective.encoder,
        corpus_folder=folder,
        vocab_size=tokenizer.vocab_size,
        mask_id=tokenizer.mask_id,
        key=fold_key(config.run.seed, "encoder"),
        leaky=getattr(config.objective, "leaky_encoder", False),
        device=device,
    )
