"""A run of Braid that another run reads, frozen: found by its path, and only where both have one tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from braid.data_pipeline.tokenizers import load_tokenizer
from braid.kernels.errors import ConfigError, InputError
from braid.pretrain.config.objectives.encoder import EncoderConfig

if TYPE_CHECKING:
    from braid.pretrain.checkpoint.snapshot import LoadedModel


def load_frozen_run(
    config: EncoderConfig, *, corpus_folder: Path, device: torch.device, wanted: str = "a training run"
) -> LoadedModel:
    """The model of the run directory or checkpoint `config.path`, with its averaged weights where it has any.

    Raises ConfigError (no path; `wanted` says of what), CheckpointError (nothing valid there) and InputError (another
    tokenizer than that of `corpus_folder`).
    """
    from braid.pretrain.checkpoint.snapshot import load_model  # which builds objectives, and these their encoders

    if not config.path:
        change = f"objective.encoder.path: the run directory, or a checkpoint, of {wanted}"
        raise ConfigError("No encoder is named", found="objective.encoder.path is empty", change=change)
    model = load_model(Path(config.path), device)
    ours = load_tokenizer(corpus_folder / "tokenizer")
    if ours.hash != model.tokenizer.hash:
        raise InputError(
            "The encoder's tokenizer is not the corpus's",
            found=f"encoder {model.tokenizer.hash[:16]} ({model.tokenizer.vocab_size} ids), "
            f"corpus {ours.hash[:16]} ({ours.vocab_size} ids)",
            change=f"prepare the corpus with --tokenizer {model.path / 'tokenizer'}, or train an encoder on this one",
        )
    return model


def require_width(latent_dim: int, width: int) -> None:
    """Raise ConfigError where a representation of `width` has fewer dimensions than are to be kept."""
    if latent_dim > width:
        raise ConfigError(
            "The encoder's representations are narrower than the latents",
            found=f"objective.encoder.latent_dim={latent_dim}, width {width}",
            change="objective.encoder.latent_dim",
        )
