"""Who holds gradients and optimizer state, and what the training loop asks of it.

An engine takes the gradients of the micro-batches of a step, sums them over everybody who has a part of them, clips
their global norm and updates the weights. It may divide gradients, optimizer state and weights among the ranks with
the same part of the model (the mesh's `reduction` axis): what this process updates is the list `held` of float32
tensors, and everything that is kept for each of them (moments, averages) has the same shapes in the same order.

    PlainEngine        every process holds all of its parameters
    DividedEngine      each process holds its pieces of them (divided_engine.py):
      ZeroEngine       DeepSpeed's ZeRO stages 1 to 3, with offload (deepspeed_engine.py)
      MegatronEngine   its DistributedDataParallel and DistributedOptimizer (megatron_engine.py)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from braid.parallel.data_parallel import reduce_gradients
from braid.parallel.layers import sum_partial_gradients
from braid.parallel.mesh import Axis, Mesh
from braid.parallel.pipeline import counts_here, sum_replicated_gradients

T = TypeVar("T")

Receivers = Mapping[str, int]
"""Name -> position on the reduction axis; what is not in it, nobody wants."""
Part = Callable[..., Tensor]
"""`part(name)`: what this process has of a tensor on the tensor and pipeline axes. `part(name, start, stop)`: of that,
laid end to end, the values between two places, and no more is read than they take."""


class NotFinite(Exception):
    """The gradient of a step is not finite: that step updated nothing, nor did any after it."""

    def __init__(self, steps_ago: int = 0) -> None:
        self.steps_ago = steps_ago
        """0: the step that was asked for; 1: the one before."""


class Flag:
    """A number on the device, 0.0 or 1.0, and its copy on the host."""

    def __init__(self, device: torch.device) -> None:
        self.value = torch.zeros((), device=device)
        self._copy = torch.zeros((), pin_memory=device.type == "cuda")
        self._on_host = self._copy.numpy()
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def raise_unless_finite(self, norm: Tensor) -> None:
        """Make it 1 for ever when `norm` is not finite."""
        torch.maximum(self.value, (~norm.isfinite()).to(self.value), out=self.value)
        self._copy.copy_(self.value, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def read(self) -> bool:
        """As it was when it was last written; waits for that."""
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._on_host)


class Engine(ABC):
    """What every engine offers. All methods are collective over all ranks of the mesh."""

    mesh: Mesh
    optimizer: torch.optim.Optimizer
    """Keyed by the tensors of `held`; the loop sets the learning rates of its groups."""
    names: list[str]
    """Of the parameters of this process's part of the model that are trained."""
    held: list[Tensor]
    """Float32 weights that this process updates; all ranks of the reduction axis together hold every weight of their
    stage of the pipeline that is trained at least once."""
    flag: Flag | None = None
    """Set on the device by a gradient that is not finite, where `step` does not wait to know it."""

    def forward(self, compute: Callable[[], T]) -> T:
        """What `compute` returns; of a dataclass, its fields can be differentiated.

        Whoever reads the module's weights does so in here: an engine may divide them among the ranks of the reduction
        axis, which then gather together and must do the same, in one order.
        """
        return compute()

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """The gradient of one micro-batch, whose loss comes from `forward`: after the last of a step, the sum over
        micro-batches and over the reduction axis is the gradient of the step. With `last`, its reduction may begin
        beside the backward pass."""

    @contextmanager
    def more_to_come(self) -> Iterator[None]:
        """In this block a pipeline's schedule goes backward, with gradients that are left on the parameters: others are
        to come for those that a pass reaches. Outside, up to `step`, none is, but for replicated parameters, so that
        reductions may begin beside the backward pass."""
        yield

    @abstractmethod
    def step(self, clip_norm: float) -> Tensor:
        """Make the gradient whole, scale it to a global norm of at most `clip_norm` (0: leave it), update the weights,
        and forget it. Returns the norm before clipping, float32 scalar, the same on every rank.

        Raises NotFinite, with the weights and the optimizer state as they were; where asking the device would make the
        host wait for it, a step late, or from `check_finite`.
        """

    def check_finite(self) -> None:
        """Raise NotFinite now, if the last step's gradient was not finite and `step` did not wait to know it."""
        if self.flag is not None and self.flag.read():
            raise NotFinite

    @abstractmethod
    def publish(self) -> None:
        """Make the module's weights those of `held`."""

    def present(self) -> Iterator[list[int]]:
        """Numbers of those of `held` that are in memory until the next ones are asked for: all at once, unless an
        engine keeps them on a disk."""
        yield list(range(len(self.held)))

    @contextmanager
    def writing(self) -> Iterator[list[Tensor]]:
        """`held`, to write there, which is allowed in this block only: after it the module's weights are those."""
        yield self.held
        self.publish()

    @abstractmethod
    def named(self, like_held: Sequence[Tensor], to: Receivers | None = None) -> Iterator[tuple[str, Tensor]]:
        """For tensors like those of `held`: (name of the parameter, all values of this process's part of it on the
        tensor and pipeline axes). One after the other, so that a model that does not fit on one process can be written.
        A weight that is not trained is not among them.

        All are given on all ranks of the reduction axis or, where it is said which are to go `to` whom, each on that
        position alone; then the others only send what they hold of it.
        """

    @abstractmethod
    def shapes(self) -> dict[str, torch.Size]:
        """Name -> shape of what `named` gives, in its order. Not collective."""

    @abstractmethod
    def fill(self, like_held: Sequence[Tensor], part: Part) -> None:
        """Inverse of `named`: fill tensors like those of `held` from `part`."""

    @abstractmethod
    def optimizer_state(self, to: Receivers | None = None) -> Iterator[tuple[str, Tensor]]:
        """(`<parameter name>/<state name>`, value) of what the optimizer keeps, as `named` gives parts; step counters
        are scalars."""

    @abstractmethod
    def optimizer_outline(self) -> dict[str, Tensor]:
        """What `optimizer_state` gives, in its order, on the device meta. Not collective."""

    @abstractmethod
    def load_optimizer_state(self, keys: Iterable[str], part: Part) -> None:
        """Inverse of `optimizer_state`: `part` of each of `keys`; the state that was there is gone."""

    @abstractmethod
    def untrained(self) -> dict[str, Tensor]:
        """The rest of the module's state dict: buffers, and parameters that are not trained. Whole over the reduction
        axis; tensors that may be written to while `held` may."""


class PlainEngine(Engine):
    """Every process holds all of its parameters, and torch's optimizer updates them.

    torch's fused optimizers and Muon can leave out an update when a number on the device says so. With these the host
    does not wait for the gradient norm: the number, once set, stays, so that no later step updates anything either, and
    is looked at when the next step is due, by which time it has long arrived.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh) -> None:
        self.optimizer, self.mesh = optimizer, mesh
        self.module = module
        if all(group.get("fused") for group in optimizer.param_groups) or hasattr(optimizer, "found_inf"):
            self.flag = Flag(next(module.parameters()).device)
            optimizer.grad_scale, optimizer.found_inf = None, self.flag.value
        trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self.names, self.held = list(trained), list(trained.values())

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, clip_norm: float) -> Tensor:
        sum_partial_gradients(self.held, self.mesh.tensor)
        reduce_gradients(self.held, self.mesh.reduction)
        sum_replicated_gradients(self.held, self.mesh.pipeline)
        norm = gradient_norm(self.held, self.mesh.tensor, None, self.mesh.pipeline)
        if self.flag is not None:
            if self.flag.read():
                raise NotFinite(steps_ago=1)
            self.flag.raise_unless_finite(norm)
        elif not math.isfinite(norm.item()):
            self.optimizer.zero_grad(set_to_none=True)
            raise NotFinite
        clip_gradients(self.held, norm, clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def publish(self) -> None:
        pass

    def named(self, like_held: Sequence[Tensor], to: Receivers | None = None) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in zip(self.names, like_held, strict=True):
            if to is None or to.get(name) == self.mesh.reduction.rank:
                yield name, tensor

    def shapes(self) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in self.named(self.held)}

    @torch.no_grad()
    def fill(self, like_held: Sequence[Tensor], part: Part) -> None:
        for name, tensor in self.named(like_held):
            tensor.copy_(part(name))

    def optimizer_state(self, to: Receivers | None = None) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self.named(self.held):
            for key, value in sorted(self.optimizer.state.get(weight, {}).items()):
                if to is None or to.get(f"{name}/{key}") == self.mesh.reduction.rank:
                    yield f"{name}/{key}", value

    def optimizer_outline(self) -> dict[str, Tensor]:
        return {key: torch.empty_like(value, device="meta") for key, value in self.optimizer_state()}

    def load_optimizer_state(self, keys: Iterable[str], part: Part) -> None:
        self.optimizer.state.clear()
        weights = dict(self.named(self.held))
        for key in keys:
            name, _, state = key.rpartition("/")
            weight, value = weights[name], part(key)
            # Step counters stay on the CPU, where the optimizers keep them, all but the fused ones.
            device = weight.device if value.ndim or self.flag is not None else value.device
            self.optimizer.state[weight][state] = value.to(device, copy=True)

    def untrained(self) -> dict[str, Tensor]:
        trained = set(self.names)
        return {name: tensor for name, tensor in self.module.state_dict().items() if name not in trained}


def gradient_norm(
    parameters: Sequence[Tensor],
    tensor: Axis | None = None,
    apart: Axis | None = None,
    pipeline: Axis | None = None,
) -> Tensor:
    """Global L2 norm over every gradient, float32 scalar; the same on all ranks of the axes `tensor`, whose parts of
    divided gradients are added up, and `pipeline`, whose parameters are others. What several ranks have whole counts
    once. Among the ranks of `apart`, where it is given, all gradients are divided."""
    given = [p for p in parameters if p.grad is not None and counts_here(p, pipeline)]
    divided = [p.grad for p in given if hasattr(p, "shard")]
    whole = [p.grad for p in given if not hasattr(p, "shard")]
    staged = pipeline is not None and pipeline.grouped
    if apart is None and not divided and not staged:
        return torch.nn.utils.get_total_norm(whole)
    device = parameters[0].device
    squares = torch.stack([torch.nn.utils.get_total_norm(part).to(device).square() for part in (whole, divided)])
    if apart is not None:
        apart.all_reduce_sum(squares)
    if tensor is not None:
        tensor.all_reduce_sum(squares[1:])
    square = squares.sum()
    return (pipeline.all_reduce_sum(square) if staged else square).sqrt()


def clip_gradients(parameters: Sequence[Tensor], norm: Tensor, clip_norm: float) -> None:
    """Scale gradients so that their global norm is at most `clip_norm` (0: leave them)."""
    if clip_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
