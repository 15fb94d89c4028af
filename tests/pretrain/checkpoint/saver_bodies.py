"""What runs on the ranks of test_saver.py."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from deepspeed_bodies import ADAMW, one_step
from tensor_cases import build

from braid.kernels.errors import CheckpointError
from braid.parallel.data_parallel import World
from braid.parallel.engine import Engine
from braid.parallel.layers import Shard
from braid.parallel.mesh import Axis, Mesh, build_mesh
from braid.parallel.plan import ParallelConfig
from braid.pretrain.checkpoint import saver as saver_module
from braid.pretrain.checkpoint import store as store_module
from braid.pretrain.checkpoint import tensor_files
from braid.pretrain.checkpoint.folder import open_checkpoint
from braid.pretrain.checkpoint.layout import Layout, build_layout
from braid.pretrain.checkpoint.pieces import local_tensor
from braid.pretrain.checkpoint.saver import Saver
from braid.pretrain.checkpoint.snapshot import saved_part, tensors_to_save
from braid.pretrain.checkpoint.store import CheckpointStore
from braid.pretrain.config.load import load_config
from braid.pretrain.config.schema import Config
from braid.pretrain.objectives.base import Objective
from braid.pretrain.training.ema import EMA
from braid.pretrain.training.engines import build_engine
from braid.pretrain.training.loop import Trainer
from braid.pretrain.training.optimizer import set_learning_rate


def save_values(saver: Saver, step: int, weights: Mapping[str, torch.Tensor]) -> str | None:
    """Save whole tensors, which this rank writes; what went wrong."""
    saver.start(step, {"weights": {key: local_tensor(value, None) for key, value in weights.items()}}, {"step": step})
    ended = saver.settle(wait=True)
    assert ended.step == step
    return None if ended.problem is None else str(ended.problem)


def two_writers(world: World, folder: Path, asynchronous: bool) -> tuple[Mesh, CheckpointStore, Saver]:
    mesh = build_mesh(world, ParallelConfig(tensor=2))
    store = CheckpointStore(folder)
    if world.rank == 0:
        store.__enter__()
    world.barrier()
    return mesh, store, Saver(store, mesh, asynchronous=asynchronous)


def save_more_than_there_is(world: World, folder: Path, asynchronous: bool) -> list[str | None]:
    """On a disk of 4 MiB rank 1 writes 5, as if the space went while it does. Problems of this save and the next."""
    store_module.SPACE_MARGIN = -(2**24)
    mesh, _, saver = two_writers(world, folder, asynchronous)
    problems = []
    for step, size in ((1, 5 * 2**18), (2, 2**10)):
        values = {f"of rank {world.rank}": torch.full((size if world.rank else 10,), float(world.rank))}
        problems.append(save_values(saver, step, values))
        world.barrier()
        if world.rank == 0:
            assert not list(folder.glob(".tmp-*")), "what was written of it is gone"
    mesh.close()
    return problems


def save_without_seeing(world: World, folder: Path, asynchronous: bool) -> tuple[str | None, str] | None:
    """Rank 1 has another file system where rank 0 has the checkpoints: problems of a save, and of a resume."""
    mesh, store, saver = two_writers(world, folder, asynchronous)
    assert save_values(saver, 1, {f"of rank {world.rank}": torch.ones(3)}) is None
    saver_module.FOLDER_TIMEOUT_S = 0.3
    unseen = False
    if world.rank == 1 and ctypes.CDLL(None).unshare(0x00020000) == 0:  # CLONE_NEWNS: mounts of its own
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        unseen = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder]).returncode == 0
    if not world.any(unseen):
        return None
    problem = save_values(saver, 2, {f"of rank {world.rank}": torch.ones(3)})
    try:
        store.latest_valid(world=world)
    except CheckpointError as error:
        return problem, str(error)
    raise AssertionError("a resume on what rank 1 does not see")


def resave(world: World, words: list[str], aside: Path) -> int:
    """Resume a run whose steps are done under a plan, put its checkpoint aside, and save again. How many processes have
    written."""
    config = load_config("tiny_ccdd", words)
    torch.use_deterministic_algorithms(True)
    mesh = build_mesh(world, config.parallel)
    store = CheckpointStore(Path(config.run.dir) / "checkpoints")
    if world.rank == 0:
        store.__enter__()
    world.barrier()
    trainer = Trainer(config, mesh, store)
    assert trainer.step > 0
    world.barrier()  # all have read it
    if world.rank == 0:
        os.rename(store.path(trainer.step), aside)
    world.barrier()
    trainer._save(last=True)
    trainer.close(failed=False)
    if world.rank == 0:
        store.__exit__()
        written = len(list(store.path(trainer.step).glob("weights*.safetensors")))
    mesh.close()
    return written if world.rank == 0 else 0


def train_while_saving(world: World, folder: Path) -> bool:
    """An asynchronous save whose second writer is slow: steps (here sums) go on, on all axes; was it in flight then?"""
    mesh, store, saver = two_writers(world, folder, True)
    if world.rank == 1:
        store.fault = lambda phase: time.sleep(0.5)
    values = torch.arange(100.0)
    saver.start(1, {"weights": {f"of rank {world.rank}": local_tensor(values, None)}}, {})
    values.fill_(-1)  # the next step of training
    went_on = 0
    while (ended := saver.settle(wait=False)) is None:
        assert float(mesh.tensor.all_reduce_sum(torch.ones(()))) == 2
        went_on += 1
    assert ended.problem is None and saver.settle(wait=False) is None
    mesh.close()
    return went_on > 5


def values_of(name: str) -> torch.Tensor:
    """Whole, of a parameter of `save_stages`; 7 rows divide by nothing."""
    return torch.randn(7, 3, generator=torch.Generator().manual_seed(len(name)))


def save_stages(world: World, folder: Path) -> tuple[frozenset[str], frozenset[str], list[str]]:
    """Two stages of two processes each: a table on both stages and a norm on both, divided and not, and one of each by
    itself. What this rank owns, what it has, and the names of the whole model."""
    mesh = build_mesh(world, ParallelConfig(tensor=2, pipeline=2))
    store = CheckpointStore(folder)
    if world.rank == 0:
        store.__enter__()
    world.barrier()
    module = torch.nn.ParameterDict()
    for name in ("table", "norm", f"matrix_of_{mesh.pipeline.rank}", f"bias_of_stage_{mesh.pipeline.rank}"):
        shard = Shard(0, 1, mesh.tensor.rank, 2, 7) if name.startswith(("table", "matrix")) else None
        whole = values_of(name)
        module[name] = torch.nn.Parameter(whole if shard is None else shard.cut(whole))
        if shard is not None:
            module[name].shard = shard
    layout = build_layout(module, mesh)
    saver = Saver(store, mesh, asynchronous=False)
    mine = {key: layout.local(key, held) for key, held in module.items() if layout.writes(key, held.ndim)}
    saver.start(1, {"weights": mine}, {})
    assert saver.settle(wait=True).problem is None
    mesh.close()
    return layout.owned, layout.here, sorted(layout.shapes)


def save_and_load_shared(world: World, folder: Path, plan: ParallelConfig) -> tuple[int, int, int, int]:
    """A trained engine is saved, and loaded into another. Bytes of tensors that this rank has written, that it was
    given for that, that it has read, and that it holds."""
    mesh = build_mesh(world, plan)
    store = CheckpointStore(folder)
    if world.rank == 0:
        store.__enter__()
    world.barrier()
    objective, engine, ema, layout = _trained(mesh, plan)
    saver, given = Saver(store, mesh, asynchronous=False), []

    def counted() -> Iterator[tuple[str, str, torch.Tensor]]:
        for group, name, tensor in values:
            given.append(tensor.nbytes)
            yield group, name, tensor

    with pytest.MonkeyPatch.context() as patch:
        groups, values = tensors_to_save(objective, engine, ema, layout)
        patch.setattr(Axis, "broadcast", lambda *_: 1 / 0)  # to those who do not write it
        saver.start(1, groups, {}, values=counted())
        assert saver.settle(wait=True).problem is None
    world.barrier()
    _, fresh, averages, _ = _trained(mesh, plan, steps=0)
    with open_checkpoint(store.path(1)) as reader, pytest.MonkeyPatch.context() as patch:
        count, preadv = [], tensor_files.os.preadv
        weights, optimizer, ema_part = (saved_part(reader, group, layout) for group in ("weights", "optimizer", "ema"))
        for files in reader.index.values():
            for entry in files.values():
                reader._open(entry.pieces[0].file)  # their headers are not counted
        patch.setattr(
            tensor_files.os, "preadv", lambda file, to, at: (count.append(len(to[0])), preadv(file, to, at))[1]
        )
        with fresh.writing() as held:
            fresh.fill(held, weights)
        fresh.load_optimizer_state(list(reader.index["optimizer"]), optimizer)
        fresh.fill(averages.averages, ema_part)
    for found, wanted in (
        (fresh.named(fresh.held), engine.named(engine.held)),
        (fresh.optimizer_state(), engine.optimizer_state()),
        (fresh.named(averages.averages), engine.named(ema.averages)),
    ):
        for (name, value), (other, expected) in zip(found, wanted, strict=True):
            assert name == other and torch.equal(value, expected), name
    written = sum(each.values.nbytes for tensors in groups.values() for each in tensors.values())
    mesh.close()
    return written, sum(given), sum(count), 4 * 4 * sum(tensor.numel() for tensor in engine.held)


def _trained(mesh: Mesh, plan: ParallelConfig, steps: int = 1) -> tuple[Objective, Engine, EMA, Layout]:
    objective = build("mdlm", width=64)
    layout = build_layout(objective, mesh)
    engine = build_engine(Config(optimizer=ADAMW, parallel=plan), objective, mesh)
    set_learning_rate(engine.optimizer, 1.0)
    ema = EMA(engine, 0.5)
    for step in range(steps):
        one_step(objective, engine, mesh)
        ema.update(step + 1)
    return objective, engine, ema, layout
