"""Documents packed into one row are to each objective what they are in rows of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from braid.data_pipeline.loader import Batch
from braid.data_pipeline.tokenizers import load_tokenizer
from braid.kernels.random import initial_normal
from braid.pretrain.config.load import load_config
from braid.pretrain.model.encoders import TableEncoder
from braid.pretrain.objectives.base import Noise, Objective
from braid.pretrain.objectives.build import build_objective, needs_encoder

BACKBONES = ("tiny_ar", "tiny_mdlm", "tiny_duo", "tiny_gidd")
RECIPES = (*BACKBONES, "tiny_replaid", "tiny_ccdd", "tiny_ccdd_mmdit", "tiny_ccdd_moedit")
DIM = 16
LENGTH, SIZES, LETTERS = 12, (3, 5, 2), 256
SMALL = ["model.width=32", "model.num_layers=2", "model.num_heads=2", f"data.sequence_length={LENGTH}"]


def build(recipe: str, *settings: str) -> Objective:
    """A tiny objective in evaluation mode, random non-zero weights everywhere."""
    config = load_config(recipe, [*SMALL, *settings])
    tokenizer = load_tokenizer("bytes")
    table = initial_normal(11, "table", (tokenizer.vocab_size, DIM))
    encoder = TableEncoder(table, mask_id=tokenizer.mask_id, variance_floor=1e-6) if needs_encoder(config) else None
    objective = build_objective(config, tokenizer, encoder, torch.device("cpu")).eval()
    with torch.no_grad():
        for key, parameter in objective.network.named_parameters():
            parameter.add_(0.2 * initial_normal(5, key, tuple(parameter.shape)))
    return objective


def packed(seed: int = 0) -> Batch:
    """Two rows of three documents each, and padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, LETTERS, (2, LENGTH), generator=generator)
    segments = torch.repeat_interleave(torch.tensor([1, 2, 3, 0]), torch.tensor([*SIZES, LENGTH - sum(SIZES)])).int()
    segments = segments.expand(2, -1).contiguous()
    return Batch(tokens, segments > 0, torch.arange(2), None, segments)


def spans() -> list[slice]:
    ends = torch.tensor(SIZES).cumsum(0).tolist()
    return [slice(end - size, end) for size, end in zip(SIZES, ends, strict=True)]


def moved(x, span: slice):
    """A tensor [B, L, ...] with what is in `span` at the front, and the front of the rest behind."""
    size = span.stop - span.start
    rest = torch.full_like(x, 1) if x.dtype != torch.bool else torch.zeros_like(x)
    return torch.cat([x[:, span], rest[:, size:]], 1)


def alone(corrupted, span: slice):
    """The same corruption with one document in a row of its own, padded with something else."""
    here = {
        name: moved(value, span)
        for name in corrupted.by_position
        if (value := getattr(corrupted, name)) is not None and name != "segments"
    }
    segments = torch.zeros_like(corrupted.segments)
    segments[:, : span.stop - span.start] = 1
    return replace(corrupted, **here, segments=segments)


def said(objective, corrupted) -> torch.Tensor:
    """All that the network says, position by position, [B, L, numbers]."""
    prediction = objective.predict(corrupted)
    if isinstance(prediction, torch.Tensor):
        return prediction
    parts = [prediction.logits, getattr(prediction, "latents", None)]
    return torch.cat([part for part in parts if part is not None], -1)


@pytest.fixture(scope="module", params=RECIPES)
def objective(request):
    return build(request.param)


@torch.no_grad()
def test_a_document_is_seen_alone(objective):
    noise = Noise.training(3, 0, 2, torch.arange(2))
    corrupted = objective.corrupt(packed(), noise)
    together = said(objective, corrupted)
    assert together[:, : sum(SIZES)][..., :-1].std() > 0.1
    for span in spans():
        by_itself = said(objective, alone(corrupted, span))[:, : span.stop - span.start]
        torch.testing.assert_close(together[:, span], by_itself, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_nothing_of_other_documents_or_padding_is_seen(objective):
    """Bit for bit, whatever stands there."""
    noise = Noise.training(3, 0, 2, torch.arange(2))
    batch = packed()
    before = said(objective, objective.corrupt(batch, noise))
    for n, span in enumerate(spans()):
        other = batch.segments != n + 1
        changed = replace(batch, tokens=torch.where(other, (batch.tokens + 1) % LETTERS, batch.tokens))
        after = said(objective, objective.corrupt(changed, noise))
        assert torch.equal(before[:, span], after[:, span])
        assert not torch.equal(before, after)
        if n > 0 or not objective.causal:
            merged = replace(changed, segments=(batch.segments > 0).int())
            assert not torch.equal(before[:, span], said(objective, objective.corrupt(merged, noise))[:, span])


@torch.no_grad()
def test_the_likelihood_of_a_row_is_that_of_its_documents():
    objective, batch = build("tiny_ar"), packed()
    noise = Noise.evaluation(3, batch.ordinals, 0, 1)
    total = torch.zeros(2, dtype=torch.float64)
    for span in spans():
        size = span.stop - span.start
        segments = torch.zeros_like(batch.segments)
        segments[:, :size] = 1
        one = Batch(moved(batch.tokens, span), segments > 0, batch.ordinals, None, segments)
        short = Batch(batch.tokens[:, span], torch.ones(2, size, dtype=torch.bool), batch.ordinals)
        nll = objective.evaluate(one, noise)["nll"]
        torch.testing.assert_close(nll, objective.evaluate(short, noise)["nll"])
        total += nll
    torch.testing.assert_close(objective.evaluate(batch, noise)["nll"], total)


def test_the_losses_count_what_is_no_padding(objective):
    batch, noise = packed(), Noise.training(3, 0, 2, torch.arange(2))
    loss = objective.loss(objective.predict(objective.corrupt(batch, noise)), objective.corrupt(batch, noise))
    assert loss.count == 2 * sum(SIZES) == objective.num_scored(batch, noise)
