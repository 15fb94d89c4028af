"""A small real training: the learned schedule makes the diffusion loss constant over time, a frozen one does not."""

import pytest
import torch

from braid.data_pipeline.loader import Batch
from braid.kernels.random import fold_key
from braid.parallel.engine import clip_gradients, gradient_norm
from braid.pretrain.config.schema import ModelConfig, OptimizerConfig
from braid.pretrain.objectives.base import Noise
from braid.pretrain.training.optimizer import build_optimizer

from .conftest import MASK
from .replaid_reference import build_replaid

STEPS, SIZE, LENGTH = 1500, 32, 16
MODEL = ModelConfig(width=32, num_layers=2, num_heads=2, cond_dim=16)


def markov_text(num: int, generator: torch.Generator) -> torch.Tensor:
    """Sequences of a random first-order chain over the 16 tokens."""
    law = (2 * torch.randn(MASK, MASK, generator=torch.Generator().manual_seed(7))).softmax(-1)
    tokens = [torch.randint(0, MASK, (num,), generator=generator)]
    for _ in range(LENGTH - 1):
        tokens.append(torch.multinomial(law[tokens[-1]], 1, generator=generator)[:, 0])
    return torch.stack(tokens, 1)


def loss_over_time(schedule: str) -> torch.Tensor:
    """Mean diffusion loss in ten intervals of time over the last fifth of a run."""
    objective = build_replaid(randomise=False, model=MODEL, gamma_schedule=schedule)
    optimizer = build_optimizer(objective, OptimizerConfig(lr=3e-3))
    generator, key = torch.Generator().manual_seed(0), fold_key(0, "train")
    sums, counts = torch.zeros(10, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)
    for step in range(STEPS):
        objective.begin_step(step, STEPS)
        tokens, ordinals = markov_text(SIZE, generator), step * SIZE + torch.arange(SIZE)
        batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.bool), ordinals)
        corrupted = objective.corrupt(batch, Noise.training(key, step * SIZE, SIZE, ordinals))
        terms = objective.loss(objective.predict(corrupted), corrupted)
        (terms.total / terms.count).backward()
        parameters = [parameter for parameter in objective.parameters() if parameter.grad is not None]
        clip_gradients(parameters, gradient_norm(parameters), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        objective.update_state(terms.statistics)
        if step >= 0.8 * STEPS:
            sums, counts = sums + terms.bucket_sums, counts + terms.bucket_counts
    return sums / counts


@pytest.mark.slow
def test_the_learned_schedule_flattens_the_loss_over_time():
    """Deviation over mean, of ten intervals: the first nine, because the last one waits for gamma' to grow there."""
    learned, frozen = loss_over_time("learned"), loss_over_time("frozen")
    unevenness = [float(curve[:9].std() / curve[:9].mean()) for curve in (learned, frozen)]
    assert unevenness[0] < 0.35 and 0.8 < unevenness[1], (learned, frozen)
