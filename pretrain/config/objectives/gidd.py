"""Settings of GIDD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from braid.pretrain.config.check import Check

if TYPE_CHECKING:
    from braid.pretrain.config.objectives.ccdd import CCDDConfig
    from braid.pretrain.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class GIDDConfig:
    """Masks and uniform noise mixed (GIDD, arXiv 2503.04482)."""

    name: str = "gidd"
    """`gidd`"""
    p_uniform: float = 0.1
    """Share of uniform noise among all tokens at t = 1/2. Published: 0 (masked diffusion), 0.1 and 0.2."""
    gamma: float = 1.0
    """The odds of uniform noise are proportional to (t (1-t))^(gamma/2). Published: 1."""
    token_weight: str = "dynamic"
    """Training weight of the divergence at a token: `dynamic` (2 at masks, 1 at wrong tokens, next to 0 at right ones;
    the published one) or `elbo` (the bound's own)."""
    time_eps: float = 1e-4
    """Training times are mapped to [eps, 1 - eps]. The bound goes further."""


def check(check: Check, config: Config) -> None:
    """What is wrong with the objective's settings."""
    gidd = config.objective
    check_uniform_noise(check, gidd)
    check.one_of("objective.token_weight", gidd.token_weight, ("dynamic", "elbo"))
    check.within("objective.time_eps", gidd.time_eps, "()", 0, 0.5)


def check_uniform_noise(check: Check, gidd: GIDDConfig | CCDDConfig) -> None:
    """What is wrong with `p_uniform` and `gamma`."""
    check.within("objective.p_uniform", gidd.p_uniform, "[)", 0, 1)
    if not 0.1 <= gidd.gamma <= 2:
        check.add(
            f"objective.gamma = {gidd.gamma} must lie in [0.1, 2]",
            found="above 2, uniform noise would have to disappear near t = 1 faster than tokens are masked: a process "
            "with negative jump rates; near 0 there would be noise at t = 0",
            change="objective.gamma=1",
        )
    if gidd.p_uniform == 0 and gidd.gamma != GIDDConfig.gamma:
        check.add(
            f"objective.gamma = {gidd.gamma} is ignored: objective.p_uniform = 0 means no uniform noise",
            change=f"objective.p_uniform=0.1, or leave gamma at {GIDDConfig.gamma}",
        )
