"""What an engine costs: a training step with DeepSpeed's and Megatron-core's optimizers beside torch's own.

All contenders are `braid_step` of step.py on one recipe, in one process that is its own only peer (NCCL on a GPU, gloo
on a CPU). Such a process divides nothing, so that what they take longer is what an engine does beside the step.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from braid.kernels.attention import use_attention
from braid.kernels.bench.measure import as_json, interleaved, machine
from braid.kernels.capabilities import report
from braid.parallel.data_parallel import World, init_world
from braid.parallel.mesh import build_mesh
from braid.parallel.plan import ParallelConfig

from .step import braid_step, sized, sizes

ENGINES = {
    "Megatron": ParallelConfig(engine="megatron"),
    "ZeRO-1": ParallelConfig(engine="deepspeed", zero=1),
    "ZeRO-2": ParallelConfig(engine="deepspeed", zero=2),
    "ZeRO-3": ParallelConfig(engine="deepspeed", zero=3),
}
LIBRARIES = {"megatron": {"megatron-core"}, "deepspeed": {"megatron-core", "deepspeed"}}
"""What an engine is made of."""


def run(
    device: str = "cpu",
    *,
    recipe: str = "mdlm_small",
    overrides: tuple[str, ...] = (),
    vocab: int = 0,
    rows: int = 0,
    rounds: int = 20,
    seconds: float = 60.0,
) -> dict[str, Any]:
    """Timings of every engine, and their ratio to the plain one's; the arguments are those of the step benchmark. An
    engine whose library is not there is named in `left_out`.

    Raises ConfigError for a recipe that is not masked diffusion.
    """
    on = torch.device(device)
    # Eager: in graphs of its own each engine would have another share.
    config, tokens, vocab = sized(recipe, overrides, on, vocab, rows, compile_blocks=False)
    absent = {capability.name for capability in report(probe=False) if capability.status == "missing"}
    without = {name: ", ".join(sorted(LIBRARIES[plan.engine] & absent)) for name, plan in ENGINES.items()}
    left_out = {name: f"not installed: {libraries}" for name, libraries in without.items() if libraries}
    engines = {"plain": ParallelConfig()} | {name: plan for name, plan in ENGINES.items() if name not in left_out}
    with _only_peer(on.type) as world:
        mesh = build_mesh(world, list(engines.values())[-1])  # the plain engine takes that of another
        contenders = {
            name: braid_step(replace(config, parallel=plan), tokens, vocab, mesh)[0] for name, plan in engines.items()
        }
        timings = interleaved(contenders, on, rounds=rounds, warmup=3, seconds=seconds)
        mesh.close()
    use_attention("torch")
    return {
        "machine": machine(on),
        "sizes": {"recipe": recipe, "overrides": list(overrides), **sizes(config, tokens, vocab)},
        "timings": as_json(timings),
        "times_plain": {
            name: timing.median_ms / timings["plain"].median_ms for name, timing in timings.items() if name != "plain"
        },
        "left_out": left_out,
    }


@contextmanager
def _only_peer(device: str) -> Iterator[World]:
    """A process group of this process alone, as torchrun would make it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in names.items()})
    world = init_world(device)
    try:
        yield world
    finally:
        world.close()
        os.environ.clear()
        os.environ.update(before)
