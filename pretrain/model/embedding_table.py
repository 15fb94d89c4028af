"""The token embeddings that a run of Braid has learnt, as the frozen table of a joint model's continuous strand.

A control for pretrained encoders (arXiv 2510.03206 was asked for it): what a model of this corpus knows of its tokens
one by one, without context and without anybody else's text.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from braid.kernels.errors import ConfigError
from braid.pretrain.config.objectives.encoder import EncoderConfig
from braid.pretrain.model.embedding_network import UnitEmbedding
from braid.pretrain.model.frozen_run import load_frozen_run, require_width
from braid.pretrain.model.network import Network


def load_embedding_table(config: EncoderConfig, *, corpus_folder: Path) -> Tensor:
    """The first `latent_dim` dimensions of the token embeddings [V, D] of the run `config.path`, float32, on the CPU.

    Raises what `load_frozen_run` does, and ConfigError for a model that embeds no tokens or in fewer dimensions.
    """
    model = load_frozen_run(config, corpus_folder=corpus_folder, device=torch.device("cpu"))
    table_VW = token_embeddings(model.objective.network)
    if table_VW is None:
        raise ConfigError(
            "The model embeds no tokens",
            found=f"objective.name = {model.config.objective.name!r} in {config.path}",
            change="objective.encoder.path: a run of any system but ELF",
        )
    require_width(config.latent_dim, table_VW.shape[1])
    # The sentinels of a T5 come after the corpus's tokens.
    return table_VW[: model.tokenizer.vocab_size, : config.latent_dim].detach().float().clone()


def token_embeddings(network: Network) -> Tensor | None:
    """The table [V, W] by which a network, on one process, embeds its tokens; None where it does not."""
    for name in ("token_embedding", "embedding"):
        match getattr(network, name, None):
            case nn.Embedding() as embedding:
                return embedding.weight
            case UnitEmbedding() as embedding:
                return embedding()
    return None
