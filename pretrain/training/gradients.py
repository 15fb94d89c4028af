"""The forward and backward passes of a step: one micro-batch after the other, or all of them through a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import partial

import torch
from torch import Tensor

from braid.data_pipeline.loader import Batch
from braid.parallel.engine import Engine
from braid.parallel.pipeline import Schedule, beside, spread
from braid.pretrain.objectives.base import Corrupted, LossTerms, Noise, Objective, Pass, advance

from .precision import autocast
from .step import StepSums

MicroBatch = tuple[Batch, Noise]


class Gradients:
    """Adds up the gradients of a step. `schedule` is None where the network is in one piece."""

    def __init__(self, objective: Objective, engine: Engine, precision: str, schedule: Schedule | None) -> None:
        self.objective, self.engine, self.precision, self.schedule = objective, engine, precision, schedule
        self.device = next(objective.parameters()).device

    def add_up(self, micro_batches: Sequence[MicroBatch], count: Tensor) -> StepSums:
        """The gradient of the sum of all losses divided by `count`, the tokens that count in the global batch. Returns
        what the losses add up to, which in a pipeline the processes with the heads alone know."""
        sums = StepSums(self.device, self.objective.splits_loss)
        if self.schedule is None:
            self._one_by_one(micro_batches, count, sums)
        else:
            with self.objective.context.dividing():
                self._through_pipeline(micro_batches, count, sums)
        return sums

    def _one_by_one(self, micro_batches: Sequence[MicroBatch], count: Tensor, sums: StepSums) -> None:
        for number, micro_batch in enumerate(micro_batches, 1):
            with ExitStack() as dividing:
                loss = self.engine.forward(partial(self._loss, micro_batch, dividing))
                self.engine.backward(loss.total / count, last=number == len(micro_batches))
            sums.add(loss)

    def _loss(self, micro_batch: MicroBatch, dividing: ExitStack) -> LossTerms:
        """The sums of one micro-batch, of this process's positions: they stay divided until `dividing` is closed."""
        objective = self.objective
        corrupted = objective.corrupt(*micro_batch)
        dividing.enter_context(objective.context.dividing())
        corrupted = corrupted.part(objective.context)
        with autocast(self.precision, self.device):
            prediction = objective.predict(corrupted)
        return objective.loss(prediction, corrupted)

    def _through_pipeline(self, micro_batches: Sequence[MicroBatch], count: Tensor, sums: StepSums) -> None:
        """Every process corrupts every micro-batch for itself: before its first piece, or before all passes without
        gradient where there are any."""
        objective, stage = self.objective, self.objective.stage
        last = len(stage.pieces) - 1
        held = self._after_passes(micro_batches)
        cuts: list[list[tuple[Tensor, Tensor]]] = []
        row_losses: list[Tensor] = []

        def step(number: int) -> Tensor:
            corrupted = held[number] if number in held else self._corrupt(micro_batches[number])
            if stage.piece == 0 < last:
                corrupted, pairs = _cut(corrupted)
                cuts.append(pairs)
            held[number] = corrupted
            if stage.piece == last and not objective.follows_row_losses:
                del held[number]
            with autocast(self.precision, self.device):
                prediction = objective.call(corrupted)
            if not stage.at_end:
                if not objective.splits_loss:
                    return prediction
                loss = objective.loss_of_piece(stage.aside, corrupted)
                sums.add(loss)
                return beside(prediction, loss.total / count) if loss.total.requires_grad else prediction
            loss = objective.loss(prediction, corrupted)
            sums.add(loss)
            if objective.follows_row_losses:
                row_losses.append(loss.row_losses)
            return loss.total / count

        shape = self._hidden_shape(micro_batches, len(micro_batches[0][0].tokens))
        self.schedule.run(len(micro_batches), step, shape, more_to_come=self.engine.more_to_come)
        for pairs in cuts:
            found = [(given, leaf.grad) for given, leaf in pairs if leaf.grad is not None]
            if found:
                torch.autograd.backward(*zip(*found, strict=True))
        if objective.follows_row_losses:
            for number, of_rows in enumerate(self._from_the_end(row_losses)):
                objective.finish_gradients(held[number], of_rows)

    def _after_passes(self, micro_batches: Sequence[MicroBatch]) -> dict[int, Corrupted]:
        """What `Objective.call` is given of each micro-batch; {} where nothing comes before it. A pass takes all
        micro-batches through the pipeline, and its results are on every process before the next."""

        def begin(number: int) -> tuple:
            passes = self.objective.passes(self._corrupt(micro_batches[number]))
            return passes, advance(passes)

        first = begin(0)
        if not isinstance(first[1], Pass):
            return {0: first[1]}
        begun, following = zip(first, *map(begin, range(1, len(micro_batches))), strict=True)
        while isinstance(following[0], Pass):
            with torch.no_grad(), autocast(self.precision, self.device):
                shape = self._hidden_shape(micro_batches, following[0].num_rows)
                calls = [each.call for each in following]
                results = self.schedule.run(len(calls), partial(_call, calls), shape, forward_only=True)
            following = list(map(advance, begun, self._from_the_end(results)))
        return dict(enumerate(following))

    def _corrupt(self, micro_batch: MicroBatch) -> Corrupted:
        """This process's positions. (The corruption is of whole sequences, and runs nothing that would divide them.)"""
        return self.objective.corrupt(*micro_batch).part(self.objective.context)

    def _hidden_shape(self, micro_batches: Sequence[MicroBatch], num_rows: int) -> tuple[int, ...]:
        return self.objective.network.hidden_shape(num_rows, micro_batches[0][0].tokens.shape[1])

    def _from_the_end(self, tensors: list[Tensor]) -> list[Tensor]:
        """Those of the process with the heads, on every process."""
        axis = self.schedule.stage.axis
        return spread(axis, tensors, axis.size - 1)


def _cut(corrupted: Corrupted) -> tuple[Corrupted, list[tuple[Tensor, Tensor]]]:
    """The same with leaves for what has a gradient, and pairs of what was given and its leaf: the backward passes of
    several pieces come here, and the first would free what is behind."""
    values = {each.name: getattr(corrupted, each.name) for each in fields(corrupted)}
    given = {name: value for name, value in values.items() if isinstance(value, Tensor) and value.requires_grad}
    leaves = {name: value.detach().requires_grad_() for name, value in given.items()}
    return replace(corrupted, **leaves), [(given[name], leaf) for name, leaf in leaves.items()]


def _call(calls: Sequence[Callable[[], Tensor]], number: int) -> Tensor:
    return calls[number]()
