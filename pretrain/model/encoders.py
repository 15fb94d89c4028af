"""The frozen encoder of a joint model's continuous strand: a vector per token, of text with some positions hidden.

CCDD (arXiv 2510.03206) diffuses the representations a frozen encoder gives of the text, beside the text itself. A
likelihood bound then needs that the representations hold nothing of the tokens the model has to predict. The published
code runs a causal encoder over the clean text and zeroes its outputs at hidden positions: a visible position still
carries what the encoder read to its left, hidden tokens included. Here hidden tokens never reach the encoder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor

from braid.kernels.errors import ConfigError
from braid.kernels.random import initial_normal
from braid.pretrain.config.objectives.encoder import EncoderConfig
from braid.pretrain.model.table_encoder import load_or_build_table

UNKNOWN_KEY = 0x5EED0F7AB1E
TABLE_FLOOR = 1e-12
"""Variance floor of a table that is standardised whole: short rows keep the length that all have."""


class Encoder(ABC):
    """Text to standardised per-token representations. No nn.Module: nothing of it is trained or saved with the model;
    `fingerprint` (16 hex digits over parameters and settings) lets a checkpoint check that it is the same encoder."""

    fingerprint: str
    num_parameters: int
    """Frozen numbers it holds; no published size of a joint model counts them."""
    leaky = False
    """Whether a representation may depend on hidden tokens; then no number computed with it is a bound."""

    def __init__(self, *, latent_dim: int, mask_id: int, variance_floor: float) -> None:
        self.latent_dim, self.mask_id, self.variance_floor = latent_dim, mask_id, variance_floor

    @torch.no_grad()
    def encode(self, tokens: Tensor, hidden: Tensor, segments: Tensor | None = None) -> Tensor:
        """Representations [B, L, D], float32, of clean tokens [B, L] (int64) whose `hidden` positions (bool) are not
        seen, nor those where `segments` (int [B, L]) is 0, the padding. Segments beyond 1 are for encoders that read
        one token at a time; the others are never given any (config/packing.py).

        Every vector has mean 0 and variance 1 over its D dimensions; it is 0 at hidden positions and wherever the token
        is the mask, which is nobody's text. With nothing hidden this is the clean target z_0.
        """
        hidden_BL = hidden | (tokens == self.mask_id)
        z_BLD = standardise(self.represent(tokens, hidden_BL, segments), self.variance_floor)
        return z_BLD.masked_fill(hidden_BL[..., None], 0.0)

    @abstractmethod
    def represent(self, tokens_BL: Tensor, hidden_BL: Tensor, segments_BL: Tensor | None = None) -> Tensor:
        """Raw representations [B, L, latent_dim], float32; any finite value at hidden positions."""


class TableEncoder(Encoder):
    """One fixed vector per token, [V, D]; a token's vector knows nothing of the text around it."""

    def __init__(self, table_VD: Tensor, *, mask_id: int, variance_floor: float) -> None:
        super().__init__(latent_dim=table_VD.shape[1], mask_id=mask_id, variance_floor=variance_floor)
        self.table, self.num_parameters = table_VD, table_VD.numel()
        self.fingerprint = fingerprint({"table": table_VD}, f"floor={variance_floor}")

    def represent(self, tokens_BL: Tensor, hidden_BL: Tensor, segments_BL: Tensor | None = None) -> Tensor:
        return F.embedding(tokens_BL, self.table)


def standardise(x: Tensor, variance_floor: float) -> Tensor:
    """(x - mean) / sqrt(variance + floor) over the last dimension, with the variance about the mean of all its D
    entries (the published code divides by D - 1), so that the squared length is D."""
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + variance_floor)


def fingerprint(tensors: dict[str, Tensor], settings: str) -> str:
    """16 hex digits over names, dtypes, shapes and bytes of the tensors, and the settings."""
    digest = xxhash.xxh3_64(settings.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def corpus_table(config: EncoderConfig, corpus_folder: Path, vocab_size: int) -> Tensor:
    """The PPMI table of the training corpus [V, D], standardised. Tokens it knows nothing about (special tokens, tokens
    that never occur) get random rows, the same for every run: a zero row is the sign of a hidden position."""
    table = load_or_build_table(
        corpus_folder, latent_dim=config.latent_dim, window=config.window, vocab_size=vocab_size, path=config.path
    )
    table_VD = torch.from_numpy(table)
    unknown_V1 = (table_VD == 0).all(dim=-1, keepdim=True)
    filled_VD = torch.where(unknown_V1, initial_normal(UNKNOWN_KEY, "encoder.unknown", table_VD.shape), table_VD)
    # Rare tokens have short rows; scaled here, the variance floor of `encode` does not shorten them further.
    return standardise(filled_VD, TABLE_FLOOR)


def build_encoder(
    config: EncoderConfig,
    *,
    corpus_folder: str | Path,
    vocab_size: int,
    mask_id: int,
    key: int,
    leaky: bool = False,
    device: torch.device | str = "cpu",
) -> Encoder:
    """The encoder `config` describes, on `device`. `vocab_size` and `mask_id` are the corpus's; `key` is the run's and
    is used where something is random: the table of `random`, the weights of `random_weights`. `leaky` asks for the
    published code's encoding and is refused where that would not differ.

    Raises ConfigError or InputError when it cannot be had or does not fit the corpus.
    """
    corpus_folder = Path(corpus_folder)
    if config.kind == "huggingface":
        from braid.pretrain.model.huggingface_encoder import load_huggingface_encoder  # needs the extra `hf`

        return load_huggingface_encoder(
            config, corpus_folder=corpus_folder, mask_id=mask_id, key=key, leaky=leaky, device=torch.device(device)
        )
    if config.kind == "trained":
        from braid.pretrain.model.trained_encoder import load_trained_encoder  # needs the extra `hf`

        return load_trained_encoder(
            config, corpus_folder=corpus_folder, mask_id=mask_id, leaky=leaky, device=torch.device(device)
        )
    if leaky:
        raise ConfigError(
            "This encoder sees one token at a time, so there is no leaky form of it",
            found=f"objective.leaky_encoder=true with objective.encoder.kind={config.kind}",
            change="objective.leaky_encoder=false, or a causal `huggingface` encoder",
        )
    if config.kind == "table":
        table_VD = corpus_table(config, corpus_folder, vocab_size)
    elif config.kind == "random":
        table_VD = initial_normal(key, "encoder.random", (vocab_size, config.latent_dim))
    elif config.kind == "embeddings":
        from braid.pretrain.model.embedding_table import load_embedding_table  # which loads models, and their encoders

        table_VD = standardise(load_embedding_table(config, corpus_folder=corpus_folder), TABLE_FLOOR)
    else:
        raise ConfigError(
            "Unknown encoder",
            found=f"objective.encoder.kind={config.kind}",
            change="table, random, embeddings, huggingface or trained",
        )
    return TableEncoder(table_VD.to(device), mask_id=mask_id, variance_floor=config.variance_floor)
