"""apex's FusedAdam as torch's AdamW: the same state, so that a checkpoint of one goes on with the other."""

from __future__ import annotations

import functools

import torch

from braid.kernels.capabilities import require


@functools.cache
def apex_adam() -> type[torch.optim.Optimizer]:
    """The class, made when it is first asked for: its base is not everywhere. BraidError where it is not here."""

    class ApexAdam(require("apex").FusedAdam):
        """Decoupled weight decay, and step counters with the moments: apex keeps one for each group of parameters,
        where no checkpoint would find it."""

        def step(self, closure: None = None) -> None:
            for group in self.param_groups:
                counters = [self.state[p]["step"] for p in group["params"] if "step" in self.state.get(p, {})]
                group.pop("step", None)
                if counters:
                    group["step"] = int(counters[0])
            super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    if self.state.get(parameter):
                        self.state[parameter]["step"] = torch.tensor(float(group["step"]))

        def zero_grad(self, set_to_none: bool = True) -> None:
            torch.optim.Optimizer.zero_grad(self, set_to_none)

    return ApexAdam
