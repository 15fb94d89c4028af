"""Small objectives with values, on the CPU, and a batch for them."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import torch

from braid.data_pipeline.loader import Batch
from braid.pretrain.config.load import load_config
from braid.pretrain.config.schema import Config
from braid.pretrain.model.encoders import TableEncoder
from braid.pretrain.objectives.base import Noise, Objective
from braid.pretrain.objectives.build import needs_encoder

SMALL = ("model.width=128", "model.num_heads=4", "model.num_layers=2", "model.dropout=0")


def build(recipe: str, *overrides: str, vocab_size: int = 96) -> tuple[Config, Objective]:
    """A recipe's objective at a small size, no parameter zero."""
    config = load_config(recipe, [*SMALL, *overrides])
    tokenizer = SimpleNamespace(vocab_size=vocab_size, mask_id=vocab_size - 1, bos_id=0, eos_id=0)
    encoder = None
    if needs_encoder(config):
        table = torch.randn(vocab_size, config.objective.encoder.latent_dim)
        encoder = TableEncoder(table, mask_id=vocab_size - 1, variance_floor=1e-6)
    module = import_module(f"braid.pretrain.objectives.{config.objective.name}")
    objective = module.build(config, tokenizer, encoder)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return config, objective.train()


def batch_of(sequences: int, length: int) -> tuple[Batch, Noise]:
    """Random tokens, and the noise of a training step."""
    tokens, ordinals = torch.randint(0, 90, (sequences, length)), torch.arange(sequences)
    batch = Batch(tokens=tokens, loss_mask=torch.ones_like(tokens, dtype=torch.bool), ordinals=ordinals)
    return batch, Noise.training(1, 0, sequences, ordinals)
