"""The probe of a run's start: the passes that it will make, on the weights that its engine shows."""

from __future__ import annotations

from braid.parallel.engine import Engine
from braid.pretrain.model.probe import PROBE_LENGTH, check_direction
from braid.pretrain.objectives.base import Objective

from .precision import autocast


def check_passes(objective: Objective, engine: Engine, precision: str, length: int) -> None:
    """See that information flows as it should (model/probe.py) where the network samples, and where it trains: there
    with `length` tokens, if processes divide positions, for which any other number may not do. Collective.

    Raises BraidError with what was measured.
    """
    network, context = objective.network, objective.context
    divided = context.divides or network.region.sequence

    def check() -> None:
        with autocast(precision, next(network.parameters()).device):
            check_direction(network)
            with context.dividing():
                check_direction(network, length=length if divided else PROBE_LENGTH, as_trained=True)

    engine.forward(check)
