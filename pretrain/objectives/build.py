"""From a configuration, a tokenizer and (for joint models) a frozen encoder to an objective with its network."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.tokenizers import Tokenizer
from braid.kernels.random import fold_key
from braid.parallel.data_parallel import World
from braid.pretrain.config.schema import CCDDConfig, Config
from braid.pretrain.model.backbone import Backbone
from braid.pretrain.model.encoders import Encoder, TableEncoder, build_encoder

from .ar import AR
from .base import Objective
from .ccdd import CCDD
from .mdlm import MDLM


def build_objective(config: Config, tokenizer: Tokenizer, encoder: Encoder | None, device: torch.device) -> Objective:
    """The objective of `config.objective` on `device`; its initial weights depend on (seed, parameter name) alone."""
    ids = {"mask_id": tokenizer.mask_id, "bos_id": tokenizer.bos_id}
    objective = config.objective

    def network(*, time_conditioned: bool, causal: bool = False, latent_dim: int = 0) -> Backbone:
        return Backbone(
            config.model,
            vocab_size=tokenizer.vocab_size,
            causal=causal,
            time_conditioned=time_conditioned,
            latent_dim=latent_dim,
            seed=config.run.seed,
        )

    match objective.name:
        case "ar":
            built: Objective = AR(objective, network(causal=True, time_conditioned=False), **ids)
        case "mdlm":
            built = MDLM(objective, network(time_conditioned=objective.time_conditioning), **ids)
        case "ccdd":
            assert encoder is not None, "a joint objective needs an encoder"
            backbone = network(time_conditioned=True, latent_dim=encoder.latent_dim)
            built = CCDD(objective, backbone, encoder, **ids)
        case name:
            raise AssertionError(f"no objective {name}")
    return built.to(device)


def training_encoder(config: Config, corpus: TokenCorpus, world: World) -> Encoder | None:
    """The encoder a run trains with, or None. Rank 0 builds a missing table before the others look for it."""
    if not isinstance(config.objective, CCDDConfig):
        return None
    encoder = _encoder(config, corpus.folder, corpus.tokenizer, world.device) if world.rank == 0 else None
    world.barrier()
    return encoder or _encoder(config, corpus.folder, corpus.tokenizer, world.device)


def saved_encoder(
    config: Config, tokenizer: Tokenizer, tensors: dict[str, Tensor] | None, checkpoint: Path, device: torch.device
) -> Encoder | None:
    """The encoder of a checkpoint: its table where it has one, else found again by its path."""
    if not isinstance(config.objective, CCDDConfig):
        return None
    if tensors:
        floor = config.objective.encoder.variance_floor
        return TableEncoder(tensors["table"].to(device), mask_id=tokenizer.mask_id, variance_floor=floor)
    return _encoder(config, checkpoint, tokenizer, device)


def _encoder(config: Config, folder: Path, tokenizer: Tokenizer, device: torch.device) -> Encoder:
    assert isinstance(config.objective, CCDDConfig)
    return build_encoder(
        config.objective.encoder,
        corpus_folder=folder,
        vocab_size=tokenizer.vocab_size,
        mask_id=tokenizer.mask_id,
        key=fold_key(config.run.seed, "encoder"),
        leaky=config.objective.leaky_encoder,
        device=device,
    )
