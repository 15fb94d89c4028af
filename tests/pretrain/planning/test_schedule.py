"""The time of a pipeline and what it keeps, against a simulation of every forward and backward pass."""

from __future__ import annotations

import random

import pytest

from braid.parallel.plan import ParallelConfig
from braid.pretrain.planning.memory import micro_batches_in_flight
from braid.pretrain.planning.schedule import pipeline_seconds, waiting_share


def program(process: int, pipeline: int, virtual: int, micro_batches: int) -> list[tuple[str, int, int]]:
    """(pass, piece, micro-batch) in the order in which a process works: warm-up, one forward one backward, the rest."""
    total = micro_batches * virtual
    warmup = pipeline - 1 - process
    if virtual > 1:
        warmup = 2 * warmup + (virtual - 1) * pipeline
    warmup = min(warmup, total)

    def turn(number: int) -> tuple[int, int]:
        rounds, within = divmod(number, pipeline * virtual)
        return within // pipeline, rounds * pipeline + within % pipeline

    forward = [("forward", *turn(number)) for number in range(total)]
    backward = [("backward", virtual - 1 - turn(number)[0], turn(number)[1]) for number in range(total)]
    if virtual == 1:
        forward = [("forward", 0, number) for number in range(total)]
        backward = [("backward", 0, number) for number in range(total)]
    order = forward[:warmup]
    for index in range(total - warmup):
        order += [forward[warmup + index], backward[index]]
    return order + backward[total - warmup :]


def simulate(stages: list[float], micro_batches: int, virtual: int = 1) -> tuple[float, list[float]]:
    """Seconds until all is done, and for each process the most micro-batches it kept. A third of a stage's time is its
    forward pass; sending takes none."""
    pipeline = len(stages)
    last = pipeline * virtual - 1
    done: dict[tuple[str, int, int], float] = {}
    clocks, kept, most = [0.0] * pipeline, [0] * pipeline, [0] * pipeline
    programs = [program(process, pipeline, virtual, micro_batches) for process in range(pipeline)]
    places = [0] * pipeline
    while any(place < len(order) for place, order in zip(places, programs, strict=True)):
        moved = False
        for process in range(pipeline):
            while places[process] < len(programs[process]):
                kind, piece, number = programs[process][places[process]]
                depth = piece * pipeline + process
                if kind == "forward":
                    needs = [("forward", depth - 1, number)] if depth else []
                else:
                    needs = [("backward", depth + 1, number)] if depth < last else [("forward", depth, number)]
                if any(need not in done for need in needs):
                    break
                seconds = stages[process] / virtual * (1 if kind == "forward" else 2) / 3
                clocks[process] = max([clocks[process], *(done[need] for need in needs)]) + seconds
                done[kind, depth, number] = clocks[process]
                kept[process] += 1 if kind == "forward" else -1
                most[process] = max(most[process], kept[process])
                places[process] += 1
                moved = True
        assert moved, "the schedule waits for itself"
    return max(clocks), [pieces / virtual for pieces in most]


SHAPES = [(2, 4, 1), (4, 8, 1), (4, 2, 1), (8, 8, 1), (2, 4, 3), (4, 8, 2), (4, 4, 5), (8, 16, 2), (1, 5, 1)]


@pytest.mark.parametrize(("pipeline", "micro_batches", "virtual"), SHAPES)
def test_equal_stages(pipeline, micro_batches, virtual):
    seconds, kept = simulate([6.0] * pipeline, micro_batches, virtual)
    assert pipeline_seconds([6.0] * pipeline, micro_batches, virtual) == pytest.approx(seconds)
    bubble = 1 - micro_batches * 6.0 / seconds
    assert waiting_share([6.0] * pipeline, micro_batches, virtual) == pytest.approx(bubble)
    assert bubble == pytest.approx((pipeline - 1) / (virtual * micro_batches + pipeline - 1))
    plan = ParallelConfig(pipeline=pipeline, virtual=virtual)
    assert [micro_batches_in_flight(plan, stage, micro_batches) for stage in range(pipeline)] == kept


@pytest.mark.parametrize("virtual", [1, 2])
def test_uneven_stages(virtual):
    """Exact where the last one, which has the head, is the slowest; else never too short, and at most 10 % too long."""
    chance = random.Random(0)
    for _ in range(40):
        pipeline = chance.choice([2, 3, 4, 6])
        micro_batches = pipeline * chance.randint(2, 8)
        stages = [5.0] * (pipeline - 1) + [5 + 3 * chance.random()]
        seconds, _ = simulate(stages, micro_batches, virtual)
        assert pipeline_seconds(stages, micro_batches, virtual) == pytest.approx(seconds)
        stages = [5 + chance.random() for _ in range(pipeline)]
        seconds, _ = simulate(stages, micro_batches, virtual)
        assert seconds * (1 - 1e-9) <= pipeline_seconds(stages, micro_batches, virtual) <= 1.1 * seconds


def test_waiting_counts_what_slower_stages_cost():
    assert waiting_share([1.0, 1.0, 1.0, 2.0], 100) == pytest.approx(1 - 500 / (4 * 203))
    assert waiting_share([3.0], 7) == 0
