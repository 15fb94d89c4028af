"""Losses that make logits a chunk at a time, divided over every axis and engine, are those of one process that makes
all at once."""

from __future__ import annotations

import pytest
import test_deepspeed_engine
import test_megatron_engine
import test_pipeline
import test_tensor_parallel
from chunk_bodies import CHUNK_LOGITS, in_chunks
from deepspeed_bodies import ADAMW
from pipeline_bodies import num_blocks
from tensor_cases import VOCAB

from braid.kernels import linear_loss
from braid.parallel.plan import ParallelConfig

NAMES = ["replaid", "replaid-auxiliary", "co_ladd-own-denoiser"]
PATIENCE_S = 300


def test_the_vocabulary_is_one_alignment():
    """So that a chunk has the rows that it is to have."""
    assert VOCAB <= linear_loss.ALIGNMENT


@pytest.mark.parametrize("sequence", [True, False])
def test_on_the_tensor_axis(ranks, sequence):
    results = ranks(in_chunks, 2, "tensor", NAMES, sequence, "fp32", {}, timeout_s=PATIENCE_S)
    for name in NAMES:
        terms, gradients = test_tensor_parallel.expected(name)
        of_ranks = [of_rank[name] for of_rank in results]
        assert all(result.terms == pytest.approx(terms, rel=1e-6, abs=1e-6) for result in of_ranks)
        for key, gradient in gradients.items():
            found = test_tensor_parallel.joined(of_ranks, "after", key)
            assert test_tensor_parallel.largest_error(found, gradient) < 1e-5, (name, key)


def test_in_a_pipeline(ranks):
    fields = {"pipeline": 2}
    [name, *_] = NAMES
    results = ranks(in_chunks, 2, "pipeline", [name], fields, 2, "fp32", {}, timeout_s=PATIENCE_S)
    wanted = test_pipeline.expected(name, num_blocks(name, ParallelConfig(**fields)), 2)
    test_pipeline.assert_equal_steps([of_rank[name] for of_rank in results], wanted, name)


@pytest.mark.parametrize("zero", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_under_deepspeed(ranks, zero):
    plan = test_deepspeed_engine.plan(zero)
    for of_rank in ranks(in_chunks, 2, "deepspeed", NAMES, plan, 2, "fp32", 32, ADAMW, timeout_s=PATIENCE_S):
        for name, found in of_rank.items():
            test_deepspeed_engine.assert_same(found, test_deepspeed_engine.expected(name), name)


def test_bf16_under_megatron_is_that_of_autocast(ranks, monkeypatch):
    """Gradients of chunks are added up in float32, though the weights are bfloat16: those of float32 weights that
    autocast casts, added in another order."""
    plan, steps = ParallelConfig(engine="megatron"), test_megatron_engine.STEPS
    bucket = test_megatron_engine.BUCKET
    (runs,) = ranks(in_chunks, 1, "engine", NAMES, plan, "bf16", steps, bucket, timeout_s=PATIENCE_S)
    monkeypatch.setattr(linear_loss, "CHUNK_LOGITS", CHUNK_LOGITS)
    for name in NAMES:
        found, wanted = runs[name], test_megatron_engine.plainly(name, "bf16")
        assert found.losses[0] == wanted.losses[0] and found.losses == pytest.approx(wanted.losses, rel=1e-5)
        test_megatron_engine.assert_near(found.gradients, wanted.gradients, 1e-6)
