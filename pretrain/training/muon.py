"""Muon: momentum whose singular values are made equal, for matrices; Nesterov-Adam for everything else.

For a gradient g_t of a matrix W [out, in], with t counted from 1:

    m_t = beta m_{t-1} + (1 - beta) g_t
    u_t = beta m_t / (1 - beta^(t+1)) + (1 - beta) g_t / (1 - beta^t)
    W  <- (1 - lr decay) W - lr sqrt(max(1, out / in)) orthogonalised(u_t)

This is what optax.contrib.muon does, with which ELF (arXiv 2605.10938) was trained. torch.optim.Muon is another
algorithm under the same name: it orthogonalises in bfloat16, which loses the small singular values, and without the
bias correction, so that the first steps weigh the momentum against the gradient differently; and it refuses whatever is
not two-dimensional.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from braid.parallel.layers import Shard, gather_whole
from braid.parallel.mesh import Axis

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the odd polynomial a x + b x^3 + c x^5 that is applied to the singular values (Jordan et al., 2024)."""
NUM_ITERATIONS = 5

KEPT = {
    "matrix": ("momentum", "step"),
    "table": ("momentum", "step"),
    "other": ("exp_avg", "exp_avg_sq", "step"),
}
"""Kind of a parameter -> what is kept for it."""

ChangeWhole = Callable[[Collection[str], Mapping[Tensor, Tensor], Callable[[Tensor, Tensor], Tensor]], None]


def orthogonalised(matrices: Tensor, eps: float = 1e-8) -> Tensor:
    """U S' V^T for each matrix U S V^T of a stack [..., m, n], float32: S' lies near 1 wherever S / |S| is not tiny.

    Each matrix is divided by its Frobenius norm + eps, so that no singular value is above 1, and goes through
    `NUM_ITERATIONS` Newton-Schulz iterations. The result does not depend on which of the two dimensions comes first.
    """
    assert not torch.is_autocast_enabled(matrices.device.type), "autocast would multiply in bfloat16"
    a, b, c = COEFFICIENTS
    x = matrices.float()
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:  # the product below is the smaller one of the two
        x = x.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + eps)
    for _ in range(NUM_ITERATIONS):
        product = x @ x.mT
        x = a * x + (b * product + c * (product @ product)) @ x
    return x.mT if is_tall else x


def nesterov(moment: Tensor, gradient: Tensor, beta: float, step: Tensor) -> Tensor:
    """The look-ahead average beta m_t / (1 - beta^(t+1)) + (1 - beta) g_t / (1 - beta^t) after step t = `step`, a
    scalar."""
    ahead, now = ((1 - beta ** (step.double() + more)) for more in (1, 0))
    return moment * (beta / ahead).float() + gradient * ((1 - beta) / now).float()


class Muon(torch.optim.Optimizer):
    """Each group says with `kind` what its parameters are:

    `matrix`: weights [..., out, in], torch's layout; each matrix of a stack (experts) on its own, as if it were a
        parameter of its own. A fused matrix (queries, keys and values) is one matrix.
    `table`: embedding tables [V, W]. They are matrices too, of the linear map from one-hot tokens: in = V, out = W.
        The update of a vocabulary is therefore scaled by max(1, W / V) = 1, not by V / W.
    `other`: biases, norms, learned tokens, scalars: Adam with Nesterov momentum, both moments bias-corrected,
        update nesterov(m) / (sqrt(v / (1 - beta2^t)) + eps) (optax's adamw with nesterov=True; torch.optim.NAdam adds a
        schedule to the momentum).

    Weight decay is decoupled. A parameter without a gradient has the gradient zero: its moments decay and it goes on
    moving, whatever branch of the objective a step took; where none has one, a step does nothing. State: `step`
    (float32), and `momentum`, or `exp_avg` and `exp_avg_sq`. Where `found_inf` is set (as of torch's fused optimizers:
    a scalar on the device of the parameters), a step that finds it above 0 does nothing either, and the host does not
    wait to know; the counters are on that device then, otherwise on the CPU.

    Orthogonalising mixes all entries of a matrix. Where a matrix is divided among the ranks of the axis `tensor`, its
    u_t is gathered, orthogonalised whole and cut again: parts orthogonalised one by one would give another update. So
    it is where an engine has cut the parameters, laid end to end, among the ranks that sum up gradients: these engines
    are asked through `change_whole`, and then each rank orthogonalises its share of the matrices.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        tensor: Axis | None = None,
    ) -> None:
        self.tensor = tensor
        self.found_inf: Tensor | None = None
        self.change_whole: ChangeWhole | None = None
        """`change_whole` of a DividedEngine whose groups these are; None: parameters are whole."""
        super().__init__(
            groups, {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": 0.0, "kind": None}
        )
        for group in self.param_groups:
            group["keeps"] = KEPT[group["kind"]]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None
        if all(parameter.grad is None for group in self.param_groups for parameter in group["params"]):
            return
        for group in self.param_groups:
            updates = self._adam_updates(group) if group["kind"] == "other" else self._matrix_updates(group)
            for parameter, update in updates:
                decayed = parameter * (1 - group["lr"] * group["weight_decay"])
                self._replace(parameter, decayed.add_(update, alpha=-group["lr"]))

    def _adam_updates(self, group: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
        for parameter in group["params"]:
            yield parameter, self._adam_update(parameter, group)

    def _adam_update(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        beta1, beta2 = group["betas"]
        state, gradient = self._begun(parameter, group), _gradient(parameter)
        self._replace(state["exp_avg"], state["exp_avg"].lerp(gradient, 1 - beta1))
        squares = (state["exp_avg_sq"] * beta2).addcmul_(gradient, gradient, value=1 - beta2)
        self._replace(state["exp_avg_sq"], squares)
        root = (state["exp_avg_sq"] / (1 - beta2 ** state["step"].double()).float()).sqrt()
        return nesterov(state["exp_avg"], gradient, beta1, state["step"]) / (root + group["eps"])

    def _matrix_updates(self, group: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
        def update(parameter: Tensor, averaged: Tensor) -> Tensor:
            return self._orthogonalised(averaged, getattr(parameter, "shard", None), group)

        averages = ((parameter, self._averaged(parameter, group)) for parameter in group["params"])
        if self.change_whole is None:
            yield from ((parameter, update(parameter, averaged)) for parameter, averaged in averages)
        else:
            updates = dict(averages)
            self.change_whole(group["names"], updates, update)
            yield from updates.items()

    def _averaged(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """u_t, entry by entry."""
        state, beta, gradient = self._begun(parameter, group), group["momentum"], _gradient(parameter)
        self._replace(state["momentum"], state["momentum"].lerp(gradient, 1 - beta))
        return nesterov(state["momentum"], gradient, beta, state["step"])

    def _begun(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """What is kept for a parameter, with this step counted."""
        state = self.state[parameter]
        if not state:
            state.update({name: torch.zeros_like(parameter) for name in group["keeps"]})
            state["step"] = torch.zeros((), device="cpu" if self.found_inf is None else parameter.device)
        self._replace(state["step"], state["step"] + 1)
        return state

    def _replace(self, old: Tensor, new: Tensor) -> None:
        """Write `new` into `old`, unless this step is to do nothing."""
        old.copy_(new if self.found_inf is None else torch.where(self.found_inf > 0, old, new))

    def _orthogonalised(self, averaged: Tensor, shard: Shard | None, group: dict[str, Any]) -> Tensor:
        """The update of a matrix, or of this process's part on the tensor axis, from its u_t."""
        whole = averaged if shard is None else gather_whole(averaged, shard, self.tensor)
        rows, columns = whole.shape[-2:]
        out_over_in = rows / columns if group["kind"] == "matrix" else columns / rows
        update = orthogonalised(whole, group["eps"]) * math.sqrt(max(1, out_over_in))
        return update if shard is None else shard.cut(update)


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
