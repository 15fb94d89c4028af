"""Settings of RePlaid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from braid.pretrain.config.check import Check

if TYPE_CHECKING:
    from braid.pretrain.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class RePlaidConfig:
    """RePlaid (arXiv 2605.18530): Gaussian diffusion of learned token embeddings with a likelihood bound."""

    name: str = "replaid"
    """`replaid`"""
    embedding_dim: int = 16
    """Dimensions of a token's embedding, which has length 1."""
    embedding_lr: float = 1e-2
    """Peak learning rate of the embeddings; they are never decayed."""
    fixed_embeddings: bool = False
    """Leave the embeddings at their random directions (ablation)."""
    gamma_schedule: str = "learned"
    """gamma(t) = -log SNR: `learned` (interior for a constant loss over time, endpoints for the bound), `frozen` (the
    learned form at its random start; ablation) or `linear` (in t, between fixed endpoints)."""
    gamma_0: float = -3.0
    """Initial gamma at t = 0, the clean end."""
    gamma_1: float = 6.0
    """Initial gamma at t = 1, the noise end."""
    schedule_lr: float = 1e-2
    """Peak learning rate of the schedule's interior; never decayed."""
    bounds_lr: float = 1e-2
    """Peak learning rate of gamma_0 and gamma_1; never decayed."""
    self_conditioning: bool = True
    """Show the network its own estimate: a quarter of the training sequences, and all in the bound and in sampling."""
    output_prior: bool = True
    """Add to a token's logit what z alone says of it, the log-likelihood of its embedding."""
    output_prior_warmup_steps: int = 5000
    """Steps over which the output prior's factor rises from 0 to 1, or a twentieth of the run where that is less. The
    bound and sampling always use 1."""
    time_input: str = "gamma"
    """What the time embedding reads: `gamma`, or the `time` t. (The paper does not say.)"""
    auxiliary_weight: float = 0.0
    """Weight of the tokens' cross-entropy at t > 0, added to the loss (ablation: it makes the bound worse)."""


def check(check: Check, config: Config) -> None:
    """What is wrong with the objective's settings."""
    replaid, path = config.objective, "objective"
    check.at_least(f"{path}.embedding_dim", replaid.embedding_dim, 2)
    check.positive(f"{path}.embedding_lr", replaid.embedding_lr)
    check.one_of(f"{path}.gamma_schedule", replaid.gamma_schedule, ("learned", "frozen", "linear"))
    if not replaid.gamma_0 < replaid.gamma_1:
        check.add(
            f"{path}.gamma_0 must lie below {path}.gamma_1: noise grows with time",
            found=f"{replaid.gamma_0} and {replaid.gamma_1}",
            change=f"{path}.gamma_0=-3 {path}.gamma_1=6",
        )
    check.positive(f"{path}.schedule_lr", replaid.schedule_lr)
    check.positive(f"{path}.bounds_lr", replaid.bounds_lr)
    check.at_least(f"{path}.output_prior_warmup_steps", replaid.output_prior_warmup_steps, 0)
    check.one_of(f"{path}.time_input", replaid.time_input, ("gamma", "time"))
    check.at_least(f"{path}.auxiliary_weight", replaid.auxiliary_weight, 0)
    size = config.training.global_batch_size
    if size == 1:
        check.add(
            "RePlaid splits the global batch between reconstruction and diffusion",
            found=f"training.global_batch_size = {size}",
            change="training.global_batch_size=2 or more",
        )
    guidance, pipeline = config.sampling.token_guidance, config.parallel.pipeline
    if guidance > 0 and pipeline > 1 and config.training.sample_every:
        check.add(
            "token guidance takes a gradient through the whole network, which in a pipeline no process has",
            found=f"sampling.token_guidance = {guidance}, parallel.pipeline = {pipeline}",
            change="sampling.token_guidance=0 or training.sample_every=0; `braid sample` can do it afterwards",
        )
    inert = {"fixed_embeddings = true": ["embedding_lr"] if replaid.fixed_embeddings else []}
    if replaid.gamma_schedule in ("frozen", "linear"):
        inert[f"gamma_schedule = {replaid.gamma_schedule!r}"] = ["schedule_lr", "bounds_lr"]
    if not replaid.output_prior:
        inert["output_prior = false"] = ["output_prior_warmup_steps"]
    for option, fields in inert.items():
        for field in fields:
            value, default = getattr(replaid, field), getattr(RePlaidConfig, field)
            if value != default:
                check.add(f"{path}.{field} = {value} is ignored by {path}.{option}", change=f"{path}.{field}={default}")
