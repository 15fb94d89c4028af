"""From a configuration to the engine that holds the optimizer state."""

from __future__ import annotations

from braid.parallel.engine import Engine, PlainEngine
from braid.parallel.mesh import Mesh
from braid.pretrain.config.schema import Config
from braid.pretrain.objectives.base import Objective

from .optimizer import build_optimizer


def build_engine(config: Config, objective: Objective, mesh: Mesh) -> Engine:
    """The engine of `parallel.engine` around the objective's parameters."""
    optimizer = build_optimizer(objective, config.optimizer, mesh.tensor, config.accelerators.optimizer)
    match config.parallel.engine:
        case "plain":
            return PlainEngine(objective, optimizer, mesh)
    raise AssertionError(config.parallel.engine)
