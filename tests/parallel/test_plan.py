"""The arithmetic of parallel plans: what is dealt to whom, what cannot be right, and that what is proposed fits."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braid.parallel.plan import ParallelConfig, PlanFacts, deal_blocks
from braid.parallel.plan_check import check_plan

FACTS = PlanFacts(
    num_layers=12,
    num_heads=12,
    mlp_width=3072,
    sequence_length=1024,
    global_batch_size=512,
    micro_batch_size=8,
)


def plan(**fields):
    return ParallelConfig(**fields)


def facts(**fields):
    return replace(FACTS, **fields)


def applied(way: str, given_plan: ParallelConfig, given_facts: PlanFacts) -> tuple[ParallelConfig, PlanFacts]:
    """The plan and batch after the overrides of a proposal."""
    for section, field, text in re.findall(r"(\w+)\.(\w+)=(\S*)", way):
        old = getattr(given_plan if section == "parallel" else given_facts, field)
        value = text == "true" if isinstance(old, bool) else type(old)(text)
        if section == "parallel":
            given_plan = replace(given_plan, **{field: value})
        else:
            given_facts = replace(given_facts, **{field: value})
    return given_plan, given_facts


def assert_mended(problem, given_plan, given_facts, num_processes):
    ways = problem.change.split(", or ")
    assert len(set(ways)) == 2, problem
    for way in ways:
        assert way, problem
        assert check_plan(*applied(way, given_plan, given_facts), num_processes) == [], (way, problem)


# -- who holds what --------------------------------------------------------------------------------------------------


def test_sizes_that_follow_from_the_fields():
    mixed = plan(tensor=2, context=3, pipeline=4)
    assert mixed.model_processes == 24 and mixed.data(96) == 4
    assert not plan(pipeline=2, virtual=2).batched_transfers
    assert plan(pipeline=2).batched_transfers and plan(pipeline=4, virtual=2).batched_transfers


def test_blocks_are_dealt_in_order_and_leftovers_go_to_the_middle_first():
    assert deal_blocks(8, 4) == [[(0, 1)], [(2, 3)], [(4, 5)], [(6, 7)]]
    sizes = [[len(pieces[0]) for pieces in deal_blocks(number, 4)] for number in (9, 10, 11)]
    assert sizes == [[2, 3, 2, 2], [2, 3, 3, 2], [3, 3, 3, 2]]
    assert deal_blocks(3, 2) == [[(0, 1)], [(2,)]]
    assert deal_blocks(8, 2, 2) == [[(0, 1), (4, 5)], [(2, 3), (6, 7)]]
    assert deal_blocks(6, 2, alternates=True) == [[(0, 1, 2, 3)], [(4, 5)]]


@settings(max_examples=100, deadline=None, database=None)
@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 4), st.booleans())
def test_every_block_is_dealt_once(number, pipeline, virtual, alternates):
    number *= 2 if alternates else 1
    virtual = virtual if pipeline > 1 else 1
    sizes = facts(num_layers=number, alternates=alternates, global_batch_size=8 * pipeline)
    if check_plan(plan(pipeline=pipeline, virtual=virtual), sizes):
        return
    dealt = deal_blocks(number, pipeline, virtual, alternates=alternates)
    in_order = [block for piece in itertools.zip_longest(*dealt) for run in piece for block in run]
    assert in_order == list(range(number))
    sizes = [len(run) for pieces in dealt for run in pieces]
    assert max(sizes) - min(sizes) <= (2 if alternates else 1) and min(sizes) > 0
    assert all(size % 2 == 0 for size in sizes) or not alternates


# -- each rule -------------------------------------------------------------------------------------------------------

CASES = {
    "processes": (plan(tensor=4), facts(), 6, "number of processes",
                  "6 processes / (tensor 4 x context 1 x pipeline 1) = 1.5"),
    "heads": (plan(tensor=8), facts(), 16, "whole heads", "12 heads / tensor 8 = 1.5"),
    "columns": (plan(tensor=4), facts(mlp_width=3070), 8, "MLP", "3070 columns / tensor 4 = 767.5"),
    "another library": (plan(tensor=2), facts(divisible=False), 2, "another library's", "parallel.tensor = 2"),
    "positions": (plan(context=3), facts(), 3, "divide the sequence", "1024 positions / context 3 = 341.333"),
    "slots": (plan(context=4), facts(num_slots=6), 4, "divide the sequence", "6 latent slots / context 4 = 1.5"),
    "prefix": (plan(context=8), facts(num_heads=8, sequence_length=1036, prefix_length=12), 8, "divide the sequence",
               "12 positions before the text / context 8 = 1.5"),
    "text": (plan(context=4), facts(sequence_length=1030 + 12, prefix_length=12), 4, "divide the sequence",
             "1030 positions / context 4 = 257.5"),
    "blocks": (plan(pipeline=16), facts(global_batch_size=128), 16, "needs a block", "12 blocks / pipeline 16 = 0.75"),
    "pairs": (plan(pipeline=8), facts(alternates=True), 8, "stay together", "12 blocks = 6 pairs / pipeline 8 = 0.75"),
    "sequence alone": (plan(sequence=True), facts(), 8, "only one", "parallel.tensor = 1"),
    "sequence": (plan(tensor=4, sequence=True), facts(sequence_length=1026), 4, "tensor x context divides",
                 "1026 positions / (tensor 4 x context 1) = 256.5"),
    "ulysses": (plan(context=8), facts(), 8, "all positions of some",
                "12 heads / (tensor 1 x context 8) = 1.5"),
    "gather unused": (plan(context_by="gather"), facts(), 8, "is ignored", "parallel.context = 1"),
    "gather causal": (plan(context=2, context_by="gather"), facts(causal=True), 8, "next to no work", "causal"),
    "virtual alone": (plan(virtual=2), facts(), 8, "no pipeline", "parallel.virtual = 2, parallel.pipeline = 1"),
    "equal pieces": (plan(pipeline=4, virtual=2), facts(), 4, "equal pieces",
                     "12 blocks / (pipeline 4 x virtual 2) = 1.5"),
    "equal pairs": (plan(pipeline=2, virtual=2), facts(alternates=True), 2, "equal pieces of pairs", "= 6 pairs /"),
    "batch": (plan(), facts(global_batch_size=500), 4, "multiple of training.micro_batch_size x ranks",
              "500 = 15 x (8 x 4 ranks = 32) + 20"),
    "batch of sharded": (plan(tensor=2), facts(global_batch_size=20), 4, "x data-parallel ranks",
                         "20 = 1 x (8 x 2 data-parallel ranks = 16) + 4"),
    "rounds": (plan(pipeline=2, virtual=2), facts(global_batch_size=24), 2, "rounds",
               "24 / (8 x 1 data-parallel ranks) = 3 micro-batches / pipeline 2 = 1.5"),
    "stage without engine": (plan(zero=1), facts(), 4, "DeepSpeed's", "parallel.zero = 1, parallel.engine = 'plain'"),
    "bf16 without ZeRO": (plan(engine="deepspeed"), facts(), 4, "off by one", "run.precision = 'bf16'"),
    "ZeRO 3 and pipeline": (plan(engine="deepspeed", zero=3, pipeline=2), facts(), 4, "waits for ever", "pipeline = 2"),
    "ZeRO 2 and pipeline": (plan(engine="deepspeed", zero=2, pipeline=2), facts(), 4, "save nothing", "pipeline = 2"),
    "offload": (plan(engine="deepspeed", offload="cpu"), facts(precision="fp32"), 4, "what ZeRO divides", "zero = 0"),
    "nvme": (plan(engine="deepspeed", zero=3, offload="nvme"), facts(), 4, "local disk", "parallel.offload_dir = ''"),
    "nvme below 3": (plan(engine="deepspeed", zero=2, offload="nvme", offload_dir="/fast"), facts(), 4, "stage 3 alone",
                     "parallel.offload = 'nvme', parallel.zero = 2"),
    "fused": (plan(engine="deepspeed", zero=1, fused_accumulation=True), facts(), 4, "only engine = 'megatron'",
              "parallel.fused_accumulation = true, parallel.engine = 'deepspeed'"),
    "folder unused": (plan(offload_dir="/fast"), facts(), 4, "is ignored", "parallel.offload_dir = '/fast'"),
    "range": (plan(tensor=0), facts(), 4, "parallel.tensor = 0 must be at least 1", ""),
    "choice": (plan(engine="fsdp"), facts(), 4, "parallel.engine = 'fsdp' is not one of plain, deepspeed", ""),
    "stage": (plan(engine="deepspeed", zero=4), facts(precision="fp32"), 4, "parallel.zero = 4 is not one of 0, 1", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_rule_shows_its_arithmetic_and_two_plans_that_fit(name):
    given_plan, given_facts, num_processes, message, arithmetic = CASES[name]
    (problem,) = check_plan(given_plan, given_facts, num_processes)
    assert message in problem.message
    assert arithmetic in problem.found
    assert_mended(problem, given_plan, given_facts, num_processes)


def test_the_nearest_plans_come_first():
    def ways(given_plan, num_processes, **fields):
        (problem,) = check_plan(given_plan, facts(**fields), num_processes)
        return problem.change.split(", or ")

    assert ways(plan(tensor=8), 48, global_batch_size=384) == ["parallel.tensor=6", "parallel.tensor=12"]
    assert ways(plan(context=8), 64) == ["parallel.context_by=gather", "parallel.context=4"]
    assert ways(plan(pipeline=4, virtual=2), 4) == ["parallel.virtual=3", "parallel.virtual=1"]
    assert ways(plan(engine="deepspeed"), 4) == ["parallel.engine=plain", "parallel.engine=megatron"]
    assert ways(plan(), 4, global_batch_size=500) == [
        "training.global_batch_size=512",
        "training.global_batch_size=480",
    ]


@pytest.mark.parametrize(
    ("given_plan", "fields", "num_processes"),
    [
        (plan(tensor=12), {}, 12),
        (plan(context=4, context_by="gather"), {"num_heads": 6}, 4),
        (plan(context=3), {"sequence_length": 1023}, 3),
        (plan(tensor=4, sequence=True), {"num_slots": 8}, 4),
        (plan(pipeline=5), {"global_batch_size": 8}, 5),
        (plan(pipeline=2, virtual=6), {}, 2),
        (plan(pipeline=2, virtual=3), {"alternates": True}, 2),
        (plan(engine="deepspeed"), {"precision": "fp32"}, 2),
        (plan(engine="deepspeed", pipeline=2), {"precision": "fp32"}, 2),
        (plan(engine="deepspeed", zero=3, offload="nvme", offload_dir="/fast"), {}, 2),
        (plan(engine="deepspeed", zero=1, pipeline=2, tensor=2), {}, 8),
        (plan(engine="megatron", pipeline=2, virtual=2, tensor=2, sequence=True, context=2), {}, 16),
        (plan(pipeline=2, tensor=2), {}, 4),
        (plan(context=2), {"causal": True}, 4),
        (plan(engine="deepspeed", zero=2), {"divisible": False}, 4),
    ],
)
def test_what_is_allowed(given_plan, fields, num_processes):
    assert check_plan(given_plan, facts(**fields), num_processes) == []


def test_everything_that_is_wrong_comes_at_once():
    told = check_plan(plan(tensor=8, pipeline=5, virtual=2, zero=3, offload="nvme", context_by="ring"), facts(), 48)
    text = "\n".join(problem.message for problem in told)
    for part in (
        "'ring' is not one of",
        "number of processes",
        "whole heads",
        "equal pieces",
        "DeepSpeed's",
        "local disk",
    ):
        assert part in text
    assert len(told) == 6


def test_without_a_number_of_processes_only_what_none_could_mend_is_wrong():
    assert check_plan(plan(tensor=4, pipeline=3), facts()) == []
    assert len(check_plan(plan(tensor=4, pipeline=3), facts(), 1)) == 1
    (problem,) = check_plan(plan(tensor=8), facts())
    assert_mended(problem, plan(tensor=8), facts(), None)


# -- against a construction of the ranks -----------------------------------------------------------------------------


def dealt(things: int, among: int) -> int | None:
    """How many each gets when they are handed out in turn; None when somebody gets fewer."""
    shares = [len(range(index, things, among)) for index in range(among)]
    return shares[0] if min(shares) == max(shares) else None


def constructible(p: ParallelConfig, f: PlanFacts, num_processes: int) -> bool:
    """Whether ranks, heads, positions, blocks and rows can be handed out as the axes say, and the engine exists."""
    if min(p.tensor, p.context, p.pipeline, p.virtual) < 1:
        return False
    data = [d for d in range(1, num_processes + 1) if d * p.pipeline * p.context * p.tensor == num_processes]
    if not data:
        return False
    heads, columns = dealt(f.num_heads, p.tensor), dealt(f.mlp_width, p.tensor)
    lengths = (f.sequence_length - f.prefix_length, f.prefix_length, f.num_slots)
    text, prefix, slots = (dealt(length, p.context) for length in lengths)
    if None in (heads, columns, text, prefix, slots):
        return False
    if not f.divisible and max(p.tensor, p.context, p.pipeline) > 1:
        return False
    if p.context > 1 and p.context_by == "ulysses" and dealt(heads, p.context) is None:
        return False
    if p.context_by == "gather" and (p.context == 1 or f.causal):
        return False
    if p.sequence and (p.tensor == 1 or None in [dealt(held, p.tensor) for held in (prefix + text, slots)]):
        return False
    units = list(range(0, f.num_layers, 2 if f.alternates else 1))
    pieces = [units[i :: p.pipeline * p.virtual] for i in range(p.pipeline * p.virtual)]
    if not all(pieces) or (p.virtual > 1 and (p.pipeline == 1 or len({len(piece) for piece in pieces}) > 1)):
        return False
    rows = dealt(f.global_batch_size, data[0])
    if rows is None or rows == 0 or rows % f.micro_batch_size:
        return False
    if p.virtual > 1 and dealt(rows // f.micro_batch_size, p.pipeline) is None:
        return False
    engines = {("plain", 0, "none"), ("megatron", 0, "none")}
    engines |= {("deepspeed", stage, place) for stage in (1, 2, 3) for place in ("none", "cpu")}
    engines |= {("deepspeed", 3, "nvme")}
    engines |= {("deepspeed", 0, "none")} if f.precision == "fp32" else set()
    if p.pipeline > 1:
        engines = {engine for engine in engines if engine[1] < 2}
    if p.fused_accumulation and p.engine != "megatron":
        return False
    return (p.engine, p.zero, p.offload) in engines and bool(p.offload_dir) == (p.offload == "nvme")


few = st.sampled_from([1, 1, 1, 2, 3, 4, 6, 8])
PLANS = st.builds(
    ParallelConfig,
    tensor=few,
    sequence=st.booleans(),
    context=few,
    context_by=st.sampled_from(["ulysses", "ulysses", "gather"]),
    pipeline=few,
    virtual=few,
    engine=st.sampled_from(["plain", "deepspeed", "megatron"]),
    zero=st.sampled_from([0, 0, 1, 2, 3]),
    offload=st.sampled_from(["none", "none", "cpu", "nvme"]),
    offload_dir=st.sampled_from(["", "", "/fast"]),
    fused_accumulation=st.sampled_from([False, False, True]),
)
FACTS_OF_ANY_KIND = st.builds(
    PlanFacts,
    num_layers=st.integers(1, 16).map(lambda number: 2 * number),
    num_heads=st.sampled_from([1, 4, 6, 8, 12, 24]),
    mlp_width=st.sampled_from([48, 96, 50]),
    sequence_length=st.sampled_from([24, 48, 96, 97]),
    prefix_length=st.sampled_from([0, 0, 12]),
    global_batch_size=st.integers(1, 96),
    micro_batch_size=st.sampled_from([1, 1, 2, 3, 4]),
    precision=st.sampled_from(["fp32", "bf16"]),
    num_slots=st.sampled_from([0, 0, 24, 10]),
    alternates=st.booleans(),
    causal=st.booleans(),
    divisible=st.sampled_from([True, True, True, False]),
)


@settings(max_examples=200, deadline=None, database=None)
@given(PLANS, FACTS_OF_ANY_KIND, st.sampled_from([1, 2, 4, 6, 8, 12, 16, 24, 32, 48]))
def test_a_plan_without_problems_is_one_that_can_be_built(given_plan, given_facts, num_processes):
    told = check_plan(given_plan, given_facts, num_processes)
    assert (told == []) == constructible(given_plan, given_facts, num_processes)


@settings(max_examples=100, deadline=None, database=None)
@given(PLANS, FACTS_OF_ANY_KIND, st.sampled_from([None, 1, 4, 6, 8, 16, 24, 48]))
def test_what_is_proposed_fits(given_plan, given_facts, num_processes):
    for problem in check_plan(given_plan, given_facts, num_processes):
        assert_mended(problem, given_plan, given_facts, num_processes)


@settings(max_examples=50, deadline=None, database=None)
@given(PLANS, FACTS_OF_ANY_KIND, st.sampled_from([1, 2, 3]))
def test_what_is_wrong_without_a_number_is_wrong_with_any(given_plan, given_facts, data):
    if check_plan(given_plan, given_facts):
        assert check_plan(given_plan, given_facts, data * given_plan.model_processes)
