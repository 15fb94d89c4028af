"""Small checkpoints, saved by one process as a run does it, and what must be read back of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from braid.parallel.mesh import Mesh
from braid.pretrain.checkpoint.folder import load_checkpoint
from braid.pretrain.checkpoint.pieces import local_tensor
from braid.pretrain.checkpoint.saver import Saver
from braid.pretrain.checkpoint.store import CheckpointStore

FILES = {"config.yaml": b"run:\n  seed: 7\n", "tokenizer/braid_tokenizer.json": b'{"kind": "bytes"}'}


def groups_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    weight, bias = torch.randn(17, 9, generator=generator), torch.randn(5, generator=generator)
    return {
        "weights": {"token_embedding.weight": weight, "transposed": weight.T, "bias": bias},
        "optimizer": {
            "exp_avg": torch.randn(17, 9, generator=generator, dtype=torch.float64),
            "step": torch.tensor(step),
            "half": torch.randn(3, generator=generator).bfloat16(),
            "flags": torch.rand(3, generator=generator) < 0.5,
            "none": torch.empty(0, 4),
            "bytes": torch.arange(7, dtype=torch.uint8),
        },
        "ema": {},
    }


def state_of(step: int) -> dict:
    return {"step": step, "consumed": step * 32, "data": {"fingerprint": "ab", "window": [1, 2]}, "rate": 0.1 + step}


def save(store: CheckpointStore, step: int, *, asynchronous: bool = False) -> Path:
    """The checkpoint of `step`."""
    return save_these(store, step, groups_of(step), state_of(step), FILES, asynchronous=asynchronous)


def save_these(
    store: CheckpointStore,
    step: int,
    groups: Mapping[str, Mapping[str, torch.Tensor]],
    state: dict[str, Any],
    files: Mapping[str, bytes | Path] | None = None,
    *,
    asynchronous: bool = False,
) -> Path:
    """Save, and wait for it. Raises SaveFailed."""
    saver = Saver(store, Mesh.single(), asynchronous=asynchronous)
    named = {group: {key: local_tensor(tensor, None) for key, tensor in groups[group].items()} for group in groups}
    saver.start(step, named, state, files)
    ended = saver.settle(wait=True)
    assert ended.step == step and saver.settle(wait=True) is None
    if ended.problem:
        raise ended.problem
    return store.path(step)


def assert_is(path: Path, step: int) -> None:
    """The checkpoint at `path` is, bit for bit, the one of `step`."""
    checkpoint = load_checkpoint(path)
    assert checkpoint.step == step and checkpoint.state == state_of(step)
    expected = groups_of(step)
    assert {g: set(t) for g, t in checkpoint.groups.items()} == {g: set(t) for g, t in expected.items()}
    for group, tensors in expected.items():
        for name, tensor in tensors.items():
            read = checkpoint.groups[group][name]
            assert read.dtype == tensor.dtype and torch.equal(read, tensor), (group, name)
    for name, content in FILES.items():
        assert (path / name).read_bytes() == content
