"""Every objective over 18 tokens and a mask, tiny, with random weights that are nowhere zero; divided or not.

Sizes are chosen to be awkward: the vocabulary divides by no number of processes, ELF's hidden units by 2 and not by 4.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from braid.data_pipeline.loader import Batch
from braid.kernels.random import fold_key, initial_normal
from braid.parallel.context import UNDIVIDED, Context
from braid.parallel.layers import Store, keep_whole, set_whole, whole_shape
from braid.parallel.mesh import Axis
from braid.parallel.pipeline import ONE_PIECE, Stage
from braid.pretrain.config.objectives.ar import ARConfig
from braid.pretrain.config.objectives.ccdd import CCDDConfig, ExpertsConfig
from braid.pretrain.config.objectives.co_ladd import CoLADDConfig
from braid.pretrain.config.objectives.di_ladd import DiLADDConfig
from braid.pretrain.config.objectives.duo import DuoConfig
from braid.pretrain.config.objectives.elf import ELFConfig
from braid.pretrain.config.objectives.encoder import EncoderConfig
from braid.pretrain.config.objectives.gidd import GIDDConfig
from braid.pretrain.config.objectives.mdlm import MDLMConfig
from braid.pretrain.config.objectives.replaid import RePlaidConfig
from braid.pretrain.config.schema import Config, ModelConfig
from braid.pretrain.model.encoders import TableEncoder
from braid.pretrain.objectives.base import Noise, Objective
from braid.pretrain.objectives.build import build_objective
from braid.pretrain.training.precision import autocast

VOCAB, LENGTH, LATENT_DIM, NUM_SLOTS, BATCH = 19, 12, 6, 8, 4
TOKENIZER = SimpleNamespace(vocab_size=VOCAB, mask_id=VOCAB - 2, bos_id=0, eos_id=VOCAB - 1)
MODEL = ModelConfig(width=32, num_layers=2, num_heads=4, cond_dim=16, mlp_ratio=2.5)
ENCODER = EncoderConfig(latent_dim=LATENT_DIM)
LEARNED = EncoderConfig(kind="learned", latent_dim=LATENT_DIM)
DROPOUT = {"dropout": 0.1}
RECOMPUTED = {"activation_checkpointing": "block"}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "ar": (ARConfig(), DROPOUT),
    "mdlm": (MDLMConfig(time_conditioning=True), DROPOUT | RECOMPUTED),
    "duo": (DuoConfig(), {}),
    "duo-curriculum": (DuoConfig(curriculum_steps=10, curriculum_tau=0.5), {}),
    "gidd": (GIDDConfig(), {}),
    "gidd-masks": (GIDDConfig(p_uniform=0.0), {}),
    "ccdd-mdit": (CCDDConfig(encoder=ENCODER, latent_times="independent"), DROPOUT),
    "ccdd-mmdit": (CCDDConfig(encoder=ENCODER, architecture="mmdit"), DROPOUT | RECOMPUTED),
    "ccdd-moedit-1": (
        CCDDConfig(encoder=ENCODER, architecture="moedit", experts=ExpertsConfig(per_token=1, balance=0.1)),
        DROPOUT,
    ),
    "ccdd-moedit-2": (CCDDConfig(encoder=ENCODER, architecture="moedit", experts=ExpertsConfig(per_token=2)), {}),
    "ccdd-moedit-2-of-3": (
        CCDDConfig(encoder=ENCODER, architecture="moedit", experts=ExpertsConfig(num=3, per_token=2)),
        RECOMPUTED,
    ),
    "replaid": (RePlaidConfig(embedding_dim=8), {}),
    "replaid-fixed": (RePlaidConfig(embedding_dim=8, fixed_embeddings=True), {}),
    "replaid-auxiliary": (RePlaidConfig(embedding_dim=8, time_input="time", auxiliary_weight=0.3), RECOMPUTED),
    "co_ladd": (CoLADDConfig(encoder=ENCODER, num_slots=NUM_SLOTS), DROPOUT | RECOMPUTED),
    "co_ladd-learned": (
        CoLADDConfig(encoder=ENCODER, num_slots=NUM_SLOTS, latent_positions="learned", independent_times=True),
        DROPOUT,
    ),
    "co_ladd-own-denoiser": (
        CoLADDConfig(
            encoder=LEARNED,
            num_slots=NUM_SLOTS,
            latent_denoiser=True,
            latent_norm="none",
            latent_prior_scale=0.1,
            independence_scale=0.5,
        ),
        DROPOUT,
    ),
    "di_ladd": (DiLADDConfig(encoder=ENCODER, num_slots=NUM_SLOTS, codebook_size=8), {}),
    "di_ladd-learned": (
        DiLADDConfig(encoder=LEARNED, num_slots=NUM_SLOTS, codebook_size=8),
        DROPOUT | RECOMPUTED,
    ),
    "di_ladd-gumbel": (
        DiLADDConfig(encoder=LEARNED, num_slots=NUM_SLOTS, codebook_size=8, quantiser="gumbel", encoder_masking=0.2),
        RECOMPUTED,
    ),
    "elf": (ELFConfig(encoder=ENCODER, decode_probability=0.5, bottleneck=4), RECOMPUTED),
}


def build(
    name: str,
    tensor: Axis | None = None,
    sequence: bool = False,
    context: Context = UNDIVIDED,
    *,
    stage: Stage = ONE_PIECE,
    store: Store = keep_whole,
    randomise: bool = True,
    **model,
) -> Objective:
    """The objective of a case, in training mode, at the first step."""
    settings, own = CASES[name]
    config = Config(objective=settings, model=replace(MODEL, **own | model))
    table = initial_normal(11, "table", (VOCAB, LATENT_DIM))
    encoder = TableEncoder(table, mask_id=TOKENIZER.mask_id, variance_floor=1e-6)
    kind = getattr(settings, "encoder", LEARNED).kind
    objective = build_objective(
        config,
        TOKENIZER,
        None if kind == "learned" else encoder,
        torch.device("cpu"),
        tensor,
        sequence,
        context,
        stage,
        store,
    )
    if randomise:
        for key, parameter in objective.named_parameters():
            start = 1.0 if key.endswith("norm.weight") else 0.0
            set_whole(parameter, start + 0.15 * initial_normal(5, key, whole_shape(parameter)))
    objective.begin_step(1, 100)
    return objective.train()


def batch_and_noise(*, packed: bool = False) -> tuple[Batch, Noise]:
    """Random rows; the first token is given, the last two are padding in some of them. `packed`: in them all, and the
    others are documents that end where nothing else does."""
    tokens = torch.randint(0, VOCAB - 2, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    condition, loss_mask = torch.zeros(2, BATCH, LENGTH, dtype=torch.bool)
    condition[:, 0] = True
    loss_mask[:] = ~condition
    loss_mask[::2, -2:] = False
    segments = None
    if packed:
        ends = torch.tensor([[3, 8], [5, 6], [1, 10], [7, 9]])
        segments = 1 + (torch.arange(LENGTH)[None, :, None] >= ends[:, None]).sum(-1)
        segments[:, -2:] = 0
        loss_mask = (segments > 0) & ~condition
    ordinals = torch.arange(BATCH)
    batch = Batch(tokens, loss_mask, ordinals, condition, segments)
    return batch, Noise.training(fold_key(1, "train"), 0, BATCH, ordinals)


def step(
    objective: Objective, precision: str = "fp32", *, packed: bool = False
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Forward and backward pass: the terms of the loss, and the gradients as they come."""
    batch, noise = batch_and_noise(packed=packed)
    corrupted = objective.corrupt(batch, noise)
    with objective.context.dividing():
        corrupted = corrupted.part(objective.context)
        with autocast(precision, torch.device("cpu")):
            prediction = objective.predict(corrupted)
        loss = objective.loss(prediction, corrupted)
        loss.total.backward()
    terms = {name: float(value) for name, value in loss.terms.items()} | {"total": float(loss.total.detach())}
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in objective.named_parameters()
        if parameter.requires_grad
    }
    return terms, gradients
