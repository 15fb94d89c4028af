"""A size that systems without adaLN have no use for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from braid.pretrain.config.check import Check

if TYPE_CHECKING:
    from braid.pretrain.config.schema import Config


def check_cond_dim(check: Check, config: Config) -> None:
    """For an objective whose network has no adaLN: `model.cond_dim` must be what it is by default."""
    default = type(config.model).cond_dim
    if config.model.cond_dim != default:
        check.add(
            f"model.cond_dim = {config.model.cond_dim} is ignored by objective.name = {config.objective.name!r}",
            found="its network has no adaLN",
            change=f"model.cond_dim={default}",
        )
