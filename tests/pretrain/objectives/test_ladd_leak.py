"""The leak test of LADD with encoders that read their neighbours: a hidden token reaches no slot."""

import pytest
import torch

from . import ladd_cases
from .ccdd_cases import CONTEXTUAL, encoder
from .conftest import LENGTH, VOCAB, batch_and_noise
from .test_ladd_training import changed_where

POOLINGS = {"last_layer": LENGTH, "adaptive_chunk_mean": 4, "adaptive_chunk_mean_eos": 4}


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", ["co_ladd", "di_ladd"])
@pytest.mark.parametrize("kind", CONTEXTUAL)
def test_hidden_tokens_do_not_reach_the_network(kind, name, pooling):
    """Change every masked token, keep all randomness: where a sequence's masked tokens are hidden from the encoder, all
    that the network is given and what it is to say of the slots stay bit for bit; elsewhere they change."""
    reader = encoder(kind)
    objective = ladd_cases.build(
        name, table=torch.zeros(VOCAB, reader.latent_dim), hidden_max=1.0, latent_dropout=0.0, latent_schedule="linear",
        pooling=pooling, num_slots=POOLINGS[pooling],
    )  # fmt: skip
    objective.encoder = reader
    batch, noise = batch_and_noise(64)
    corrupted = objective.corrupt(batch, noise)
    hidden = objective.hidden_tokens(corrupted.masked, noise)
    protected, open_ = hidden.any(1), corrupted.masked.any(1) & ~hidden.any(1)
    assert int(protected.sum()) > 10 and int(open_.sum()) > 10
    changed = changed_where(batch, corrupted.masked)
    other = objective.corrupt(changed, noise)
    assert torch.equal(corrupted.tokens, other.tokens)
    assert torch.equal(corrupted.latents[protected], other.latents[protected])
    assert torch.equal(corrupted.latent_targets[protected], other.latent_targets[protected])
    assert not torch.equal(corrupted.latents[open_], other.latents[open_])
    # The encoder does look at its neighbours: what it says at visible places knows the masked ones that it is shown.
    seen, others = (reader.represent(each.tokens, torch.zeros_like(hidden)) for each in (batch, changed))
    visible = ~corrupted.masked & (corrupted.masked.cumsum(1) > 0)
    assert (seen[visible] != others[visible]).any(-1).all()
