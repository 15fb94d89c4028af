"""Settings of CCDD."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from braid.pretrain.config.check import Check

from .encoder import EncoderConfig, check_encoder
from .gidd import check_uniform_noise

if TYPE_CHECKING:
    from braid.pretrain.config.schema import Config


ARCHITECTURES = ("mdit", "mmdit", "moedit")
CONTINUOUS_WEIGHTS = ("uniform", "snr", "min_snr", "inv_snr", "sqrt_snr", "ddpm_x", "karras", "elbo")


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """The mixture of experts of MoEDiT."""

    num: int = 2
    """Experts in each block."""
    per_token: int = 2
    """How many of them answer at a position (published: 1 on LM1B, 2 on OpenWebText)."""
    gate: str = "auto"
    """Weight of an answer: `probability` of the router; `renormalised` over the experts that answer (published; with
    one of them it is always 1 and the router learns nothing); `auto` is `probability` with one, `renormalised` else."""
    shared_adaln: bool = False
    """One adaLN for tokens and latents (the released configuration) instead of one each (the paper's size)."""
    balance: float = 0.0
    """Weight of the load-balancing loss E sum_e f_e p_e (arXiv 2101.03961), taken over both strands of each sequence,
    averaged over the blocks. 0 is published; 0.01 is usual where `per_token` is 1."""


@dataclass(frozen=True, kw_only=True)
class CCDDConfig:
    """Joint continuous-discrete diffusion (CCDD, arXiv 2510.03206), leak-free."""

    name: str = "ccdd"
    """`ccdd`"""
    architecture: str = "mdit"
    """`mdit`: both strands added at the input of one transformer of `model.num_layers` blocks. `mmdit`: two streams;
    `model.num_layers` counts two-stream and private blocks, which alternate, so it is even (published: 12, that is 6 of
    each). `moedit`: `model.num_layers` blocks of joint attention and experts (8 in the paper's, 12 in the released)."""
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    """For `moedit`: the experts."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """The frozen encoder of the continuous strand."""
    latent_mode: str = "diffused"
    """`diffused`, or `features` (a control): the encoder's representations of the visible tokens are an input, clean;
    they are neither noised nor predicted. Always p_r = 1, so the fields about p_r stay at their defaults."""
    latent_times: str = "shared"
    """Time of the latents: `shared` with the tokens; `independent`, drawn by itself (sampled and evaluated at the
    tokens' time); `clean`, always 0, so that latents are predicted but never noised (sampled from visible tokens, as
    `features`). The last two give the network a second time embedding."""
    schedule: str = "vp_linear"
    """Continuous schedule: `vp_linear` (sqrt(1-t), sqrt(t)) or `flow_linear` (1-t, t)."""
    p_uniform: float = 0.0
    """Share of uniform noise among all tokens at t = 1/2, as in GIDD: tokens are masked, replaced or left, and samples
    can be revised. The encoder at p_r = 1 then reads replaced tokens as they are. 0 is published: masks alone."""
    gamma: float = 1.0
    """With uniform noise: its odds are proportional to (t (1-t))^(gamma/2). (The release's 4 is no process: some of its
    rates are negative.)"""
    token_weight: str = "dynamic"
    """Training weight of a masked token's cross-entropy: `dynamic` (2 (1-t), the published one), `elbo` (1/t) or
    `uniform` (1). With uniform noise, of the divergence at every token: GIDD's `dynamic`, `elbo`, or 1."""
    continuous_weight: str = "ddpm_x"
    """Weight of the latent error by the latents' time: `uniform`, `snr`, `min_snr`, `inv_snr`, `sqrt_snr`, `ddpm_x`,
    `karras` (for vp_linear; clipped as published) or `elbo` (the Gaussian bound's own)."""
    continuous_scale: float = 1.0
    """Factor of the latent term in the training loss."""
    full_visibility_probability: float = 0.5
    """Probability that a sequence trains at p_r = 1 (the encoder sees visible tokens only, the case the bound is
    about); otherwise p_r is uniform on [0, p_r_max]. The release has 0."""
    p_r_max: float = 1.0
    """Upper end of p_r, the probability that a masked token is hidden from the encoder. The release has 1 and names 0.9
    and, with no likelihood in view, 0: the encoder reads the whole text."""
    p_r_per: str = "sequence"
    """What a p_r is drawn for, full visibility included: each `sequence`, or each global `batch` (the release)."""
    latent_dropout: float = 0.1
    """Probability that a sequence trains without latents (z = 0), for guidance at sampling."""
    token_dropout: float = 0.0
    """Probability that a sequence trains without its visible tokens (x_t all masks); what is predicted stays."""
    time_eps: float = 1e-4
    """Training times are mapped to [eps, 1 - eps]."""
    latent_sigma: float = 0.1
    """Standard deviation s of q(z_0|x) = N(E(x), s^2 I), for the true joint bound and the sampler it is about,
    `joint_nelbo`."""
    leaky_encoder: bool = False
    """The released code's encoding (encode the clean text, zero outputs afterwards). It lets hidden tokens leak, so no
    number of such a run is called a bound. For reproduction only."""


def check(check: Check, config: Config) -> None:
    """What is wrong with the objective's settings."""
    ccdd = config.objective
    check.one_of("objective.architecture", ccdd.architecture, ARCHITECTURES)
    check.one_of("objective.latent_mode", ccdd.latent_mode, ("diffused", "features"))
    check.one_of("objective.latent_times", ccdd.latent_times, ("shared", "independent", "clean"))
    check.one_of("objective.schedule", ccdd.schedule, ("vp_linear", "flow_linear"))
    check_uniform_noise(check, ccdd)
    check.one_of("objective.token_weight", ccdd.token_weight, ("dynamic", "elbo", "uniform"))
    # The published weights are functions of t alone, so each is defined for either schedule.
    check.one_of("objective.continuous_weight", ccdd.continuous_weight, CONTINUOUS_WEIGHTS)
    check.at_least("objective.continuous_scale", ccdd.continuous_scale, 0)
    check.within("objective.full_visibility_probability", ccdd.full_visibility_probability, "[]", 0, 1)
    check.within("objective.p_r_max", ccdd.p_r_max, "[]", 0, 1)
    check.one_of("objective.p_r_per", ccdd.p_r_per, ("sequence", "batch"))
    if ccdd.full_visibility_probability == 1 and ccdd.p_r_max != CCDDConfig.p_r_max:
        found = "objective.full_visibility_probability = 1: p_r is always 1"
        check.add(f"objective.p_r_max = {ccdd.p_r_max} is ignored", found, f"objective.p_r_max={CCDDConfig.p_r_max}")
    check.within("objective.latent_dropout", ccdd.latent_dropout, "[)", 0, 1)
    check.within("objective.token_dropout", ccdd.token_dropout, "[)", 0, 1)
    if ccdd.token_dropout > 0 and ccdd.p_uniform > 0:
        check.add(
            "with uniform noise the loss is about what x_t shows, which token dropout hides from the network",
            found=f"objective.token_dropout = {ccdd.token_dropout}, objective.p_uniform = {ccdd.p_uniform}",
            change="objective.token_dropout=0, or objective.p_uniform=0",
        )
    check.within("objective.time_eps", ccdd.time_eps, "()", 0, 0.5)
    check.positive("objective.latent_sigma", ccdd.latent_sigma)
    _check_architecture(check, config)
    _check_undiffused(check, config)
    if ccdd.leaky_encoder and ccdd.encoder.kind != "huggingface":
        check.add(
            "objective.leaky_encoder = true reproduces a pretrained encoder that reads the clean text",
            found=f"objective.encoder.kind = {ccdd.encoder.kind!r}, which looks at one token at a time and cannot leak",
            change="objective.leaky_encoder=false, or objective.encoder.kind=huggingface",
        )
    check_encoder(check, ccdd.encoder)
    if ccdd.encoder.latent_dim == 1:
        check.add(
            "objective.encoder.latent_dim = 1 leaves no latents: standardised over one dimension they are all 0",
            change="objective.encoder.latent_dim=32",
        )


def _check_architecture(check: Check, config: Config) -> None:
    ccdd, experts, path = config.objective, config.objective.experts, "objective.experts"
    if ccdd.architecture == "mmdit" and config.model.num_layers % 2:
        check.add(
            "the layers of mmdit come in pairs, a two-stream block and a private one of each stream",
            found=f"model.num_layers = {config.model.num_layers}",
            change=f"model.num_layers={config.model.num_layers + 1}",
        )
    if ccdd.architecture != "moedit":
        _check_ignored(check, path, experts, f"objective.architecture = {ccdd.architecture!r} has no experts")
        return
    check.one_of(f"{path}.gate", experts.gate, ("auto", "probability", "renormalised"))
    check.at_least(f"{path}.balance", experts.balance, 0)
    if not check.at_least(f"{path}.num", experts.num, 2):
        return
    if check.at_least(f"{path}.per_token", experts.per_token, 1) and experts.per_token > experts.num:
        found = f"{path}.per_token = {experts.per_token}, {path}.num = {experts.num}"
        check.add("more experts are to answer than there are", found, f"{path}.per_token={experts.num}")
    if experts.balance and experts.per_token == experts.num:
        found = f"{path}.per_token = {path}.num = {experts.num}"
        check.add(
            f"{path}.balance = {experts.balance} is ignored: all experts answer everywhere", found, f"{path}.balance=0"
        )


def _check_undiffused(check: Check, config: Config) -> None:
    """Options that latents which are not diffused make inert."""
    ccdd = config.objective
    ignored: dict[str, object] = {}
    if ccdd.latent_mode == "features":
        why = "objective.latent_mode = 'features' neither noises nor predicts the latents"
        ignored = {
            "latent_times": "shared",
            "schedule": "vp_linear",
            "continuous_weight": "ddpm_x",
            "continuous_scale": 1.0,
            "latent_sigma": 0.1,
            "full_visibility_probability": 0.5,
            "p_r_max": 1.0,
            "p_r_per": "sequence",
        }
    elif ccdd.latent_times == "clean":
        why = "objective.latent_times = 'clean' does not noise the latents"
        ignored = {"schedule": "vp_linear", "latent_sigma": 0.1}
        if ccdd.continuous_weight == "inv_snr":
            check.add(
                "the latents would not be learnt: the weight t / (1 - t) is 0 at their time 0",
                found="objective.continuous_weight = 'inv_snr', objective.latent_times = 'clean'",
                change="objective.continuous_weight=uniform",
            )
    if ccdd.latent_mode != "features" and ccdd.continuous_scale == 0 and ccdd.continuous_weight != "ddpm_x":
        check.add(
            f"objective.continuous_weight = {ccdd.continuous_weight!r} is ignored: the latents have no loss",
            found="objective.continuous_scale = 0",
            change="objective.continuous_weight=ddpm_x, or a continuous_scale above 0",
        )
    for name, neutral in ignored.items():
        if (value := getattr(ccdd, name)) != neutral:
            check.add(f"objective.{name} = {value!r} is ignored", why, f"objective.{name}={neutral}")
    if ignored and config.sampling.sampler:
        found = f"sampling.sampler = {config.sampling.sampler!r}"
        check.add(f"{why}, so no sampler takes steps with them", found, "sampling.sampler=")


def _check_ignored(check: Check, path: str, settings: ExpertsConfig, why: str) -> None:
    for option in fields(settings):
        value = getattr(settings, option.name)
        if value != option.default:
            check.add(f"{path}.{option.name} = {value!r} is ignored", why, f"{path}.{option.name}={option.default}")
