"""What the engines have in common that divide every parameter and its optimizer state among the ranks of the reduction
axis."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from braid.parallel.engine import Engine, Part, Receivers

COUNTER = "step"
"""What optimizers call the number of their steps, a scalar and the same for all weights. Whatever else they keep of a
weight is like it, in float32."""


def name_groups(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write into each of the optimizer's groups the `names` of its parameters, before these are cut."""
    name_of = {parameter: name for name, parameter in module.named_parameters()}
    for group in optimizer.param_groups:
        group["names"] = [name_of[parameter] for parameter in group["params"]]


class Cut(NamedTuple):
    """How a parameter is divided on the reduction axis, and tensors like its pieces that are here."""

    parameter: nn.Parameter
    shape: torch.Size
    pieces: Sequence[tuple[int, int, int]]
    """(position, start, stop) of each, of the values laid end to end."""
    own: Sequence[Tensor]
    """Those of this process, in their order."""


class DividedEngine(Engine):
    """The optimizer's groups have `names` (see `name_groups`) and, where it does not keep the same for all of them,
    `keeps`, the names of what it keeps for each parameter of the group."""

    @abstractmethod
    def named(
        self,
        like_held: Sequence[Tensor | None],
        to: Receivers | None = None,
        names: Collection[str] | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """As of every engine; with `names` those alone, and then of `like_held` what has no values of theirs may be
        None."""

    @abstractmethod
    def fill(self, like_held: Sequence[Tensor | None], part: Part, names: Collection[str] | None = None) -> None:
        """As of every engine; with `names` as in `named`."""

    @abstractmethod
    def holding(self, names: Collection[str]) -> list[int]:
        """Numbers of those of `held` that have values of the parameters `names`."""

    @abstractmethod
    def cuts(self, names: Collection[str], like: Mapping[Tensor, Tensor]) -> Iterator[Cut]:
        """Of the parameters `names`, those that lie in the weights for which `like` has tensors like them; on every
        rank of the reduction axis the same ones, in one order."""

    @torch.no_grad()
    def change_whole(
        self,
        names: Collection[str],
        like: Mapping[Tensor, Tensor],
        change: Callable[[nn.Parameter, Tensor], Tensor],
    ) -> None:
        """Overwrite tensors like weights of `held`, by weight, with `change(parameter, values)`: values of this
        process's part on the tensor and pipeline axes, made whole on one rank of the reduction axis. The ranks have
        different parameters at a time, the ranks of the tensor axis the same."""
        axis, device = self.mesh.reduction, self.mesh.world.device
        for dealt in _rounds(list(self.cuts(names, like)), axis.size):
            wholes = {to: axis.join(cut.pieces, cut.own, torch.float32, device, to) for to, cut in dealt.items()}
            if axis.rank in dealt:
                mine, whole = dealt[axis.rank], wholes[axis.rank]
                wholes[axis.rank] = change(mine.parameter, whole.view(mine.shape)).reshape(-1)
            for source, cut in dealt.items():
                axis.cut(cut.pieces, cut.own, wholes[source], device, source)

    def optimizer_state(self, to: Receivers | None = None) -> Iterator[tuple[str, Tensor]]:
        for key, names in self._kept().items():
            wanted = to and {name: to[f"{name}/{key}"] for name in names if f"{name}/{key}" in to}
            if key == COUNTER:
                given = ((name, self._counter()) for name in names if self._is_given(name, wanted))
            else:
                values = [self.optimizer.state[weight].get(key) for weight in self.held]
                given = self.named(values, wanted, names)
            for name, value in given:
                yield f"{name}/{key}", value

    def optimizer_outline(self) -> dict[str, Tensor]:
        shapes = self.shapes()
        return {
            f"{name}/{key}": self._counter().to("meta") if key == COUNTER else torch.empty(shapes[name], device="meta")
            for key, names in self._kept().items()
            for name in names
        }

    def _kept(self) -> dict[str, list[str]]:
        """What the optimizer keeps -> of which parameters, in the order of `named`; the same on every rank of the
        reduction axis, also on one that has no piece of a group."""
        states = [self.optimizer.state[weight] for weight in self.held if self.optimizer.state.get(weight)]
        kept: dict[str, set[str]] = {}
        for group in self.optimizer.param_groups if states else ():
            for key in group.get("keeps", states[0]):
                kept.setdefault(key, set()).update(group["names"])
        return {key: [name for name in self.names if name in names] for key, names in sorted(kept.items())}

    def _counter(self) -> Tensor:
        return next(self.optimizer.state[weight][COUNTER] for weight in self.held if self.optimizer.state.get(weight))

    def _is_given(self, name: str, to: Receivers | None) -> bool:
        return to is None or to.get(name) == self.mesh.reduction.rank

    def load_optimizer_state(self, keys: Iterable[str], part: Part) -> None:
        self.optimizer.state.clear()
        names_of: dict[str, list[str]] = {}
        for key in keys:
            name, _, state = key.rpartition("/")
            names_of.setdefault(state, []).append(name)
        for state, names in names_of.items():
            numbers = self.holding(names)
            if state == COUNTER:
                values = {number: part(f"{names[0]}/{state}").clone() for number in numbers}
            else:
                values = {number: torch.empty_like(self.held[number]) for number in numbers}
                every = [values.get(number) for number in range(len(self.held))]
                self.fill(every, lambda name, *span, state=state: part(f"{name}/{state}", *span), names)
            for number, value in values.items():
                self.optimizer.state[self.held[number]][state] = value


def _rounds(cuts: list[Cut], size: int) -> list[dict[int, Cut]]:
    """Deal parameters to positions: each to one that holds the most of it, of those to one that has least to do.
    Round by round, {position: parameter}; in one round all have about the same to do."""
    queues: list[list[Cut]] = [[] for _ in range(size)]
    work = [0] * size
    for cut in sorted(cuts, key=lambda cut: -cut.shape.numel()):
        held = [0] * size
        for position, start, stop in cut.pieces:
            held[position] += stop - start
        chosen = min(range(size), key=lambda position: (-held[position], work[position]))
        work[chosen] += cut.shape.numel()
        queues[chosen].append(cut)
    longest = max(map(len, queues))
    return [
        {position: queue[number] for position, queue in enumerate(queues) if number < len(queue)}
        for number in range(longest)
    ]
