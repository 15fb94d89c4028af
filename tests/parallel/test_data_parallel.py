"""The world of ranks in real processes: equal to one process, the same bits every time, no waiting for the dead."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ports import free_port
from rank_bodies import die_or_wait, reduce_odd_gradients, sleep_or_wait, talk, train
from torch import nn

from braid.kernels.errors import ConfigError, TrainingFailed
from braid.parallel import data_parallel
from braid.parallel.data_parallel import World, init_world, pick_device, reduce_gradients


@pytest.mark.parametrize("size", [2, 4])
def test_training_equals_one_process_and_repeats_bit_for_bit(ranks, size: int) -> None:
    alone, _ = train(World.single(), 2**25)
    first = ranks(train, size, 1000)  # buckets that cut parameters in two
    again = ranks(train, size, 1000)
    whole = ranks(train, size, 2**25)
    digests = {digest for _, digest in [*first, *again]}
    assert len(digests) == 1, "the same bits on every rank and in every run"
    for weights, _ in [*first, *whole]:
        for expected, found in zip(alone, weights, strict=True):
            torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)


def test_missing_odd_and_frozen_gradients(ranks) -> None:
    alone = reduce_odd_gradients(World.single())
    assert alone[0] == [[1.0] * 5] * 3 and alone[3] == [0.0] * 4 and alone[5] is None
    for found in ranks(reduce_odd_gradients, 4):
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


@pytest.mark.parametrize("size", [1, 3])
def test_collectives(ranks, size: int) -> None:
    flags = [True] * size + [False]
    for rank, found in enumerate(ranks(talk, size)):
        last = size - 1
        expected = (rank, size, rank, "cpu", flags, {"dir": "run", "rank": 0}, last, [float(size), 2.0**size - 1])
        assert found == expected
    if size == 1:
        assert talk(World.single()) == (0, 1, 0, "cpu", flags, {"dir": "run", "rank": 0}, 0, [1.0, 1.0])


def test_a_dead_rank_ends_the_others_at_once(ranks) -> None:
    first, _, last = ranks(die_or_wait, 3, lost={1})
    for text, seconds in (first, last):
        assert "another rank died or is stuck" in text and "on rank" in text and seconds < 30


def test_a_stuck_rank_ends_the_others_after_the_timeout(ranks) -> None:
    (text, seconds), _ = ranks(sleep_or_wait, 2, patience_s=2.0, lost={1})
    assert "a sum over 2 ranks did not complete" in text and "on rank 0" in text and 2.0 <= seconds < 30


def test_a_rank_that_never_comes(monkeypatch) -> None:
    port = free_port()
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
        "import os; os._exit(0)  # as braid.pretrain ends under torchrun, and for its reason\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == ["0 2 3.0", "1 2 3.0"]


@pytest.mark.gpu
def test_nccl_world_of_one(monkeypatch) -> None:
    """CUDA tensors over NCCL, host values over gloo, in one process group."""
    port = free_port()
    for name, value in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items():
        monkeypatch.setenv(name, str(value))
    world = init_world("cuda", 60)
    try:
        assert world.device == torch.device("cuda", 0) and world.grouped
        assert world.any(True) and not world.any(False) and world.broadcast_object({"a": 1}) == {"a": 1}
        assert world.all_gather_object({"a": 1}) == [{"a": 1}]
        parameters = [nn.Parameter(torch.zeros(5, device=world.device)) for _ in range(2)]
        parameters[0].grad = torch.arange(5.0, device=world.device)
        reduce_gradients(parameters, world)
        assert parameters[0].grad.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0] and parameters[1].grad.tolist() == [0.0] * 5
        assert world.all_reduce_sum(torch.ones(3, dtype=torch.float64, device=world.device)).tolist() == [1.0] * 3
        world.barrier()
    finally:
        world.close()
