"""The world of ranks in real processes: equal to one process, the same bits every time, no waiting for the dead."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from braid.kernels.errors import ConfigError, TrainingFailed
from braid.parallel import data_parallel
from braid.parallel.data_parallel import World, init_world, pick_device, reduce_gradients

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


@pytest.mark.parametrize("size", [2, 4])
def test_training_equals_one_process_and_repeats_bit_for_bit(size: int) -> None:
    alone, _ = train(World.single(), 2**25)
    first = on_ranks(size, train, 1000)  # buckets that cut parameters in two
    again = on_ranks(size, train, 1000)
    whole = on_ranks(size, train, 2**25)
    digests = {digest for _, digest in [*first, *again]}
    assert len(digests) == 1, "the same bits on every rank and in every run"
    for weights, _ in [*first, *whole]:
        for expected, found in zip(alone, weights, strict=True):
            torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)


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


def test_missing_odd_and_frozen_gradients() -> None:
    alone = reduce_odd_gradients(World.single())
    assert alone[0] == [[1.0] * 5] * 3 and alone[3] == [0.0] * 4 and alone[5] is None
    for found in on_ranks(4, reduce_odd_gradients):
        assert found[0] == [[10.0] * 5] * 3
        assert found[1] == list(map(float, range(7)))
        assert found[2][0] != found[2][0] and found[2][1] == 6.0, "a NaN reaches all ranks, and no neighbour"
        assert found[3] == [0.0] * 4, "no gradient on any rank: zeros, as in one process"
        assert found[4] == 1111.0 and found[5] is None and found[6] == [15.0] * 3


def test_buckets_cover_every_element_once() -> None:
    gradients = [torch.arange(float(n)) for n in (7, 0, 25, 1, 3)]
    buckets = list(data_parallel._buckets(gradients, 10))
    assert [sum(map(len, bucket)) for bucket in buckets] == [10, 10, 10, 6]
    assert torch.equal(torch.cat([piece for bucket in buckets for piece in bucket]), torch.cat(gradients))
    assert buckets[0][0].data_ptr() == gradients[0].data_ptr(), "views, not copies"


def talk(world: World) -> tuple:
    world.barrier()
    flags = [world.any(world.rank == lifted) for lifted in (*range(world.size), -1)]
    config = world.broadcast_object({"dir": "run", "rank": world.rank})
    last = world.broadcast_object(world.rank, source=world.size - 1)
    total = world.all_reduce_sum(torch.tensor([1.0, 2.0**world.rank], dtype=torch.float64))
    return (world.rank, world.size, world.local_rank, str(world.device), flags, config, last, total.tolist())


@pytest.mark.parametrize("size", [1, 3])
def test_collectives(size: int) -> None:
    flags = [True] * size + [False]
    for rank, found in enumerate(on_ranks(size, talk)):
        last = size - 1
        expected = (rank, size, rank, "cpu", flags, {"dir": "run", "rank": 0}, last, [float(size), 2.0**size - 1])
        assert found == expected
    if size == 1:
        assert talk(World.single()) == (0, 1, 0, "cpu", flags, {"dir": "run", "rank": 0}, 0, [1.0, 1.0])


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


def test_a_dead_rank_ends_the_others_at_once() -> None:
    for text, seconds in on_ranks(3, die_or_wait, answers=2):
        assert "another rank died or is stuck" in text and "on rank" in text and seconds < 30


def test_a_stuck_rank_ends_the_others_after_the_timeout() -> None:
    [(text, seconds)] = on_ranks(2, sleep_or_wait, timeout_s=2.0, answers=1)
    assert "a sum over 2 ranks did not complete" in text and "on rank 0" in text and 2.0 <= seconds < 30


def test_a_rank_that_never_comes(monkeypatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(TrainingFailed, match="a start over 2 ranks"):
        init_world("cpu", timeout_s=1.0)


def test_without_torchrun_there_is_no_process_group(monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    world = init_world("cpu")
    assert world == World.single("cpu") and not dist.is_initialized()
    world.close()
    world.close()
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="without WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        init_world("cpu")


def test_devices() -> None:
    assert pick_device("cpu", 3) == torch.device("cpu")
    with pytest.raises(ConfigError, match="tpu"):
        pick_device("tpu")
    if torch.cuda.is_available():
        assert pick_device("auto") == torch.device("cuda", 0)
        with pytest.raises(ConfigError, match="more processes than GPUs"):
            pick_device("cuda", torch.cuda.device_count())
    else:
        assert pick_device("auto") == torch.device("cpu")
        with pytest.raises(ConfigError, match="finds no GPU"):
            pick_device("cuda")


def test_under_torchrun(tmp_path: Path) -> None:
    """The real launcher, once: its environment is the one that is read."""
    script = tmp_path / "ranks.py"
    script.write_text(
        "import pathlib, sys, torch\n"
        "from braid.parallel.data_parallel import init_world\n"
        "world = init_world('cpu', 60)\n"
        "total = world.all_reduce_sum(torch.tensor(world.rank + 1.0)).item()\n"
        "path = pathlib.Path(sys.argv[1], f'rank-{world.rank}')\n"
        "path.write_text(f'{world.local_rank} {world.size} {total}')\n"
        "world.close()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == ["0 2 3.0", "1 2 3.0"]


@pytest.mark.gpu
def test_nccl_world_of_one(monkeypatch) -> None:
    """CUDA tensors over NCCL, host values over gloo, in one process group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items():
        monkeypatch.setenv(name, str(value))
    world = init_world("cuda", 60)
    try:
        assert world.device == torch.device("cuda", 0) and world.grouped
        assert world.any(True) and not world.any(False) and world.broadcast_object({"a": 1}) == {"a": 1}
        parameters = [nn.Parameter(torch.zeros(5, device=world.device)) for _ in range(2)]
        parameters[0].grad = torch.arange(5.0, device=world.device)
        reduce_gradients(parameters, world)
        assert parameters[0].grad.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0] and parameters[1].grad.tolist() == [0.0] * 5
        assert world.all_reduce_sum(torch.ones(3, dtype=torch.float64, device=world.device)).tolist() == [1.0] * 3
        world.barrier()
    finally:
        world.close()
