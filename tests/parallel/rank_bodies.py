"""What runs on ranks in the tests beside it, and how ranks are started. A module of its own because the children import
it by name."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from braid.kernels.errors import TrainingFailed
from braid.parallel import data_parallel
from braid.parallel.data_parallel import World, init_world, reduce_gradients

# The children come from a server process that has imported torch and done nothing with it: starting one takes
# milliseconds, and no thread of this process is lost in the fork.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["torch", "torch.distributed", "braid.parallel.data_parallel"])


def _rank(body: Callable, rank: int, size: int, port: int, timeout_s: float, results: Any, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    started = time.monotonic()
    try:
        world = init_world("cpu", timeout_s)
        result = body(world, *args)
        world.close()
    except TrainingFailed as error:
        result = (str(error), time.monotonic() - started)
    results.put((rank, result))


def on_ranks(size: int, body: Callable, *args: Any, timeout_s: float = 60.0, answers: int | None = None) -> list[Any]:
    """What `body(world, *args)` returns on each of `size` ranks, each a process; TrainingFailed as (text, seconds)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = processes.SimpleQueue()
    children = [
        processes.Process(target=_rank, args=(body, rank, size, port, timeout_s, results, args)) for rank in range(size)
    ]
    for child in children:
        child.start()
    answers = size if answers is None else answers
    collected = []
    deadline = time.monotonic() + 90
    while len(collected) < answers:
        if not results.empty():
            collected.append(results.get())
            continue
        assert time.monotonic() < deadline, "ranks did not answer"
        ended = sum(child.exitcode is not None for child in children)
        assert ended < size or len(collected) >= answers or not results.empty(), "a rank ended without an answer"
        time.sleep(0.005)
    for child in children:
        child.join(30) if answers == size else child.kill()
    return [result for _, result in sorted(collected)]


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
    total = world.all_reduce_sum(torch.tensor([1.0, 2.0**world.rank], dtype=torch.float64))
    return (world.rank, world.size, world.local_rank, str(world.device), flags, config, last, total.tolist())


def die_or_wait(world: World) -> None:
    world.barrier()
    if world.rank == 1:
        os._exit(1)
    world.any(False)


def sleep_or_wait(world: World) -> None:
    world.barrier()
    if world.rank == 1:
        time.sleep(60)
    reduce_gradients(network().parameters(), world)
