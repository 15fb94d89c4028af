"""What runs on the ranks of test_data_parallel.py and test_rank_processes.py, which import it by name."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from braid.kernels.errors import TrainingFailed
from braid.parallel import data_parallel
from braid.parallel.data_parallel import World, reduce_gradients


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 24), nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 50))


def sum_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, dims=1).flatten(), reduction="sum")


def train(world: World, bucket_bytes: int) -> tuple[list[torch.Tensor], str]:
    """Five steps on this rank's slice of each global batch: the weights, and the hash of all gradients' bits."""
    data_parallel.BUCKET_BYTES = bucket_bytes
    model = network()
    digest = hashlib.sha256()
    for step in range(5):
        tokens = torch.randint(0, 50, (16, 12), generator=torch.Generator().manual_seed(step))
        share = 16 // world.size
        loss = sum_loss(model, tokens[world.rank * share : (world.rank + 1) * share]) / tokens.numel()
        loss.backward()
        reduce_gradients(model.parameters(), world)
        for parameter in model.parameters():
            digest.update(parameter.grad.numpy().tobytes())
            parameter.data.sub_(parameter.grad)
            parameter.grad = None
    return [parameter.detach().numpy() for parameter in model.parameters()], digest.hexdigest()


def reduce_odd_gradients(world: World) -> list[list]:
    data_parallel.BUCKET_BYTES = 40  # ten elements
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 5), (7,), (2,), (4,), ())]
    parameters.append(nn.Parameter(torch.zeros(3), requires_grad=False))
    parameters.append(nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)))
    if world.rank == 0:
        parameters[1].grad = torch.arange(7.0)  # None on the others
    parameters[0].grad = torch.full((5, 3), float(world.rank + 1)).T  # not contiguous
    parameters[2].grad = torch.tensor([float("nan") if world.rank == 1 else 1.0, float(world.rank)])
    parameters[4].grad = torch.tensor(10.0**world.rank)
    parameters[6].grad = torch.full((3,), 2.0**world.rank, dtype=torch.bfloat16)
    reduce_gradients(iter(parameters), world)
    return [None if p.grad is None else p.grad.float().tolist() for p in parameters]


def talk(world: World) -> tuple:
    world.barrier()
    flags = [world.any(world.rank == lifted) for lifted in (*range(world.size), -1)]
    config = world.broadcast_object({"dir": "run", "rank": world.rank})
    last = world.broadcast_object(world.rank, source=world.size - 1)
    assert world.all_gather_object((world.rank, "x")) == [(rank, "x") for rank in range(world.size)]
    total = world.all_reduce_sum(torch.tensor([1.0, 2.0**world.rank], dtype=torch.float64))
    return (world.rank, world.size, world.local_rank, str(world.device), flags, config, last, total.tolist())


def die_or_wait(world: World) -> tuple[str, float]:
    world.barrier()
    if world.rank == 1:
        os._exit(1)
    return _wait_in_vain(lambda: world.any(False))


def sleep_or_wait(world: World) -> tuple[str, float]:
    world.barrier()
    if world.rank == 1:
        time.sleep(60)
    return _wait_in_vain(lambda: reduce_gradients(network().parameters(), world))


def _wait_in_vain(collective: Callable[[], object]) -> tuple[str, float]:
    """The error of a collective, and the seconds until it came."""
    started = time.monotonic()
    with pytest.raises(TrainingFailed) as caught:
        collective()
    return str(caught.value), time.monotonic() - started


def introduce(world: World, argument: object) -> dict[str, object]:
    return {
        "rank": world.rank,
        "pid": os.getpid(),
        "argument": argument,
        "threads": torch.get_num_threads(),
        "gpus": torch.cuda.device_count(),
        "omp": os.environ["OMP_NUM_THREADS"],
    }


def fail_on_one(world: World, folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    world.barrier()
    if world.rank == 1:
        raise ValueError("it broke")
    time.sleep(60)


def hang(world: World, folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    if world.rank == 1:
        time.sleep(60)
    world.barrier()


def leave_one_behind(world: World) -> int:
    world.barrier()
    if world.rank == 2:
        time.sleep(60)
    return world.rank


def vanish(world: World) -> None:
    os._exit(7)
