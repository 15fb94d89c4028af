"""Other libraries' kernels, where the section `accelerators` asks for them."""

from __future__ import annotations

import torch

from braid.kernels.attention import use_attention
from braid.kernels.errors import ConfigError
from braid.kernels.norms import use_norms
from braid.pretrain.config.accelerators import LIBRARIES, AcceleratorsConfig
from braid.pretrain.model.fp8 import require_fp8

from .apex_adam import apex_adam


def use_accelerators(config: AcceleratorsConfig, device: torch.device) -> None:
    """Attention and norms of this process by the libraries of `config`; and see that those of optimizer and linear
    layers are there. ConfigError on a CPU; BraidError, saying what to install, for a library that is missing."""
    asked = {field: getattr(config, field) for field in LIBRARIES if getattr(config, field) != "torch"}
    if asked and device.type != "cuda":
        raise ConfigError(
            "accelerators are for GPUs",
            found=", ".join(f"accelerators.{field} = {library!r}" for field, library in asked.items())
            + f", and the run is on a {device.type.upper()}",
            change=" ".join(f"accelerators.{field}=torch" for field in asked),
        )
    use_norms(config.norms)
    if config.optimizer == "apex":
        apex_adam()
    if config.linears == "transformer-engine":
        require_fp8()
    use_attention(config.attention, device)
