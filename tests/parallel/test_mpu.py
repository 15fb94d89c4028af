"""DeepSpeed over the mesh: what its mpu answers, and ZeRO with tensor parallelism against plain torch."""

from __future__ import annotations

import pytest
import torch
from megatron_bodies import train_plainly
from mesh_bodies import ask_mpu, train_with_deepspeed

from braid.parallel.plan import ParallelConfig


def test_the_mpu_answers_for_every_axis(ranks) -> None:
    """Eight ranks as tensor 2 x context 2 x pipeline 2."""
    plan = ParallelConfig(tensor=2, context=2, pipeline=2, engine="deepspeed")
    for rank, answers in enumerate(ranks(ask_mpu, 8, plan)):
        tensor, context, stage = rank % 2, rank // 2 % 2, rank // 4
        pair, stages = [rank - tensor, rank - tensor + 1], [rank % 4, rank % 4 + 4]
        same_weights = [4 * stage + tensor, 4 * stage + tensor + 2]
        assert answers == {
            "get_model_parallel_group": [2 * context, 2 * context + 1, 2 * context + 4, 2 * context + 5],
            "get_model_parallel_rank": tensor + 2 * stage,
            "get_model_parallel_world_size": 4,
            "get_tensor_model_parallel_group": pair,
            "get_tensor_model_parallel_rank": tensor,
            "get_tensor_model_parallel_world_size": 2,
            "get_tensor_model_parallel_src_rank": pair[0],
            "get_pipeline_model_parallel_group": stages,
            "get_pipeline_model_parallel_rank": stage,
            "get_pipeline_model_parallel_world_size": 2,
            "get_data_parallel_group": same_weights,
            "get_data_parallel_group_ranks": same_weights,
            "get_data_parallel_rank": context,
            "get_data_parallel_world_size": 2,
        }


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_over_tensor_and_data_equals_plain_torch(ranks, stage: int) -> None:
    expected_norms, expected = train_plainly(3)
    assert min(expected_norms) > 0.1, "clipping must be at work"
    plan = ParallelConfig(tensor=2, engine="deepspeed", zero=stage)
    for norms, weights in ranks(train_with_deepspeed, 4, plan, 3):
        assert norms == pytest.approx(expected_norms, rel=1e-6)
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-6)
