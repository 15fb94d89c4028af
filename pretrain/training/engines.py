"""From a configuration to the engine that holds the optimizer state."""

from __future__ import annotations

from braid.parallel.deepspeed_engine import Shares, build_deepspeed_engine
from braid.parallel.divided_engine import DividedEngine
from braid.parallel.engine import Engine, PlainEngine
from braid.parallel.layers import Store, keep_whole
from braid.parallel.megatron_engine import MegatronEngine
from braid.parallel.mesh import Mesh
from braid.parallel.plan import ParallelConfig
from braid.pretrain.config.schema import Config
from braid.pretrain.objectives.base import Objective

from .muon import Muon
from .optimizer import build_optimizer
from .precision import cast_by_autocast


def build_store(plan: ParallelConfig, mesh: Mesh) -> Store:
    """What a process keeps of a network's parameters while it is built for the engine."""
    return Shares(mesh, plan) if plan.zero == 3 else keep_whole


def build_engine(config: Config, objective: Objective, mesh: Mesh) -> Engine:
    """The engine of `parallel.engine` around the objective's parameters."""
    engine = config.parallel.engine
    # The other engines divide the optimizer's state, and take its step counters on the CPU.
    fused = engine == "plain" and mesh.world.device.type == "cuda"
    library = config.accelerators.optimizer
    optimizer = build_optimizer(objective, config.optimizer, mesh.tensor, library, fused=fused)
    half = cast_by_autocast(objective) if config.run.precision == "bf16" else ()
    built: Engine
    match engine:
        case "plain":
            built = PlainEngine(objective, optimizer, mesh)
        case "megatron":
            plan = config.parallel
            built = MegatronEngine(
                objective, optimizer, mesh, half=half, overlap=plan.overlap, fused=plan.fused_accumulation
            )
        case "deepspeed":
            built = build_deepspeed_engine(objective, optimizer, mesh, config.parallel, half)
        case _:
            raise AssertionError(engine)
    if isinstance(optimizer, Muon) and isinstance(built, DividedEngine):
        optimizer.change_whole = built.change_whole
    return built
