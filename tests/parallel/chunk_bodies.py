"""What runs on the ranks of test_logits_in_chunks.py: bodies of other tests, where logits come in several chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import deepspeed_bodies
import engine_bodies
import pipeline_bodies
import tensor_bodies

from braid.kernels import linear_loss
from braid.parallel.data_parallel import World

T = TypeVar("T")
CHUNK_LOGITS = 5 * linear_loss.ALIGNMENT
BODIES: dict[str, Callable[..., Any]] = {
    "tensor": tensor_bodies.steps,
    "pipeline": pipeline_bodies.steps,
    "deepspeed": deepspeed_bodies.train,
    "engine": engine_bodies.train_on_ranks,
}


def in_chunks(world: World, body: str, *arguments: Any) -> Any:
    """With five rows at a time."""
    before, linear_loss.CHUNK_LOGITS = linear_loss.CHUNK_LOGITS, CHUNK_LOGITS
    try:
        return BODIES[body](world, *arguments)
    finally:
        linear_loss.CHUNK_LOGITS = before
