"""What can be wrong with the settings of a sampler, for a configuration and for the options of a command alike."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import fields

from braid.kernels.errors import ConfigError
from braid.pretrain.config.check import Check
from braid.pretrain.config.objectives import SAMPLERS, SAMPLING_FIELDS, ObjectiveConfig
from braid.pretrain.config.objectives.elf import GRIDS
from braid.pretrain.config.schema import SamplingConfig

COMMON_FIELDS = ("steps", "sampler", "temperature", "top_p")
READ_BY_SAMPLER: dict[str, Callable[[str], bool]] = {
    "latent_steps": lambda sampler: sampler.startswith("sequential"),
    "noise_scale": lambda sampler: sampler != "ode",
}
"""Fields that only some samplers of an objective read."""


def sampler_name(sampling: SamplingConfig, objective: ObjectiveConfig) -> str:
    """The sampler in use: the one asked for, or the objective's default. Raises ConfigError where there is none."""
    require_sampler(objective)
    return sampling.sampler or samplers(objective)[0]


def samplers(objective: ObjectiveConfig) -> tuple[str, ...]:
    """Those that such a model can be sampled by, its default first."""
    known = SAMPLERS[objective.name]
    if getattr(objective, "latent_denoiser", False):  # which is never trained beside noised tokens
        known = tuple(name for name in known if name.startswith("sequential"))
    return known


def require_sampler(objective: ObjectiveConfig) -> None:
    """Raise ConfigError for an objective whose models write no text."""
    if not SAMPLERS[objective.name]:
        raise ConfigError(
            "this model cannot be sampled: it is trained to be an encoder",
            found=f"objective.name = {objective.name!r}",
            change="sample a model that was trained on it (objective.encoder.kind=trained, this run its path)",
        )


def read_fields(objective: ObjectiveConfig) -> tuple[str, ...]:
    """The fields of `sampling` that such a model's sampler reads."""
    if not SAMPLERS[objective.name]:
        return ()
    common = [name for name in COMMON_FIELDS if not (objective.name == "ar" and name == "steps")]
    return (*common, *SAMPLING_FIELDS[objective.name])


def check_sampling(
    check: Check,
    sampling: SamplingConfig,
    objective: ObjectiveConfig,
    named: Callable[[str], str] = "sampling.{}".format,
    given: Collection[str] = (),
) -> None:
    """Values out of range, a sampler the objective does not know, and fields it would ignore: those of another value
    than the default and those the user has `given`. `named` says what a field is called where the user set it."""
    check.at_least(named("steps"), sampling.steps, 1)
    check.positive(named("temperature"), sampling.temperature)
    check.within(named("top_p"), sampling.top_p, "(]", 0, 1)
    check.at_least(named("guidance"), sampling.guidance, 0)
    check.positive(named("score_temperature"), sampling.score_temperature)
    check.at_least(named("token_guidance"), sampling.token_guidance, 0)
    check.at_least(named("latent_steps"), sampling.latent_steps, 0)
    check.at_least(named("noise_scale"), sampling.noise_scale, 0)
    check.at_least(named("input_guidance"), sampling.input_guidance, 0)
    if objective.name not in SAMPLERS:
        return  # said elsewhere
    if "grid" in SAMPLING_FIELDS[objective.name]:
        check.one_of(named("grid"), sampling.grid, GRIDS)
    if sampling.sampler and not SAMPLERS[objective.name]:
        what = f"{named('sampler')} = {sampling.sampler!r} is ignored by objective.name = {objective.name!r}"
        check.add(what, change=f"leave out {named('sampler')}")
    elif sampling.sampler:
        check.one_of(named("sampler"), sampling.sampler, samplers(objective))
    for field in fields(SamplingConfig):
        value = getattr(sampling, field.name)
        unread = field.name not in read_fields(objective)
        # A recipe that several objectives share may set the steps of those that have any.
        if unread and (field.name in given or (value != field.default and field.name not in COMMON_FIELDS)):
            check.add(
                f"{named(field.name)} = {value} is ignored by objective.name = {objective.name!r}",
                change=f"leave out {named(field.name)}"
                if field.name in given
                else f"{named(field.name)}={str(field.default).lower()}",
            )
    used = sampler_name(sampling, objective) if SAMPLERS[objective.name] else ""
    for name, reads in READ_BY_SAMPLER.items():
        value, default = getattr(sampling, name), getattr(SamplingConfig, name)
        set_by_user = name in given or (not given and value != default)
        if name in SAMPLING_FIELDS[objective.name] and set_by_user and not reads(used):
            check.add(f"{named(name)} = {value} is ignored by the sampler {used}", change=f"{named(name)}={default}")
    unguided = why_unguided(objective)
    if "guidance" in SAMPLING_FIELDS[objective.name] and sampling.guidance != 1 and unguided:
        check.add(
            f"there is nothing to guide: {unguided}",
            f"{named('guidance')} = {sampling.guidance}",
            f"{named('guidance')}=1",
        )


def why_unguided(objective: ObjectiveConfig) -> str:
    """Why the latents of such a model cannot guide it; empty when they can."""
    if getattr(objective, "latent_dropout", None) == 0:
        return "with objective.latent_dropout = 0 the model never learns to predict without latents"
    return ""
