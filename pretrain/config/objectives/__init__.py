"""The systems by name: their settings, what can be wrong with them, and how each can be sampled. No torch here."""

from __future__ import annotations

from collections.abc import Callable

from braid.pretrain.config.objectives import ar, ccdd, co_ladd, di_ladd, duo, elf, gidd, mdlm, replaid, t5

OBJECTIVES: dict[str, type] = {
    "ar": ar.ARConfig,
    "mdlm": mdlm.MDLMConfig,
    "duo": duo.DuoConfig,
    "gidd": gidd.GIDDConfig,
    "ccdd": ccdd.CCDDConfig,
    "replaid": replaid.RePlaidConfig,
    "co_ladd": co_ladd.CoLADDConfig,
    "di_ladd": di_ladd.DiLADDConfig,
    "elf": elf.ELFConfig,
    "t5": t5.T5Config,
}
"""The class of `objective` by its `name`."""

ObjectiveConfig = (
    ar.ARConfig
    | mdlm.MDLMConfig
    | duo.DuoConfig
    | gidd.GIDDConfig
    | ccdd.CCDDConfig
    | replaid.RePlaidConfig
    | co_ladd.CoLADDConfig
    | di_ladd.DiLADDConfig
    | elf.ELFConfig
    | t5.T5Config
)

CHECKS: dict[str, Callable] = {
    "ar": ar.check,
    "mdlm": mdlm.check,
    "duo": duo.check,
    "gidd": gidd.check,
    "ccdd": ccdd.check,
    "replaid": replaid.check,
    "co_ladd": co_ladd.check,
    "di_ladd": di_ladd.check,
    "elf": elf.check,
    "t5": t5.check,
}
"""What finds the problems of an objective's settings: check(check, config)."""

SAMPLERS: dict[str, tuple[str, ...]] = {
    "ar": ("autoregressive",),
    "mdlm": ("ancestral",),
    "duo": ("ancestral",),
    "gidd": ("ancestral",),
    "ccdd": ("ddim", "ddpm", "joint_nelbo"),
    "replaid": ("ddpm", "ddim", "dpm2m", "heun"),
    "co_ladd": ("joint", "joint_ddpm", "joint_nelbo", "sequential", "sequential_ddpm", "sequential_nelbo"),
    "di_ladd": ("joint", "sequential"),
    "elf": ("sde", "sde_paper", "sde_marginal", "ode"),
    "t5": (),
}
"""Values of `sampling.sampler` that an objective knows; the first is its default. With none it cannot be sampled."""

SAMPLING_FIELDS: dict[str, tuple[str, ...]] = {
    "ar": (),
    "mdlm": ("greedy_final",),
    "duo": ("greedy_final",),
    "gidd": ("greedy_final",),
    "ccdd": ("guidance", "greedy_final"),
    "replaid": ("score_temperature", "token_guidance"),
    "co_ladd": ("latent_steps", "greedy_final"),
    "di_ladd": ("latent_steps", "greedy_final"),
    "elf": ("guidance", "noise_scale", "grid", "input_guidance", "draw_final"),
    "t5": (),
}
"""Fields of `sampling` that an objective reads beside those all of them read (steps, sampler, temperature, top_p)."""
