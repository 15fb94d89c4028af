"""What runs on the ranks of test_context.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gathering import gather_tensors
from tensor_cases import LENGTH, build, step
from torch import Tensor
from torch.utils._pytree import tree_leaves

from braid.kernels.errors import BraidError
from braid.parallel import context as context_module
from braid.parallel.context import Context, CoreAttention, divide_attention
from braid.parallel.data_parallel import World, reduce_gradients
from braid.parallel.layers import sum_partial_gradients
from braid.parallel.mesh import Axis, build_mesh
from braid.parallel.plan import ParallelConfig
from braid.pretrain.checkpoint.layout import shards_of
from braid.pretrain.model.elf_network import NUM_PREFIX
from braid.pretrain.model.probe import check_direction

B, K = 2, 6


def context_of(world: World, by: str = "ulysses") -> Context:
    return Context(build_mesh(world, ParallelConfig(context=world.size)).context, by)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def largest_error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max())


SELF, CROSS, JOINT = ((12,), (12,)), ((6,), (18,)), ((12, 6), (12, 6))
ATTENTIONS = {
    "self": (SELF, False, False),
    "one position each": (((3,), (3,)), False, False),
    "masked": (SELF, True, False),
    "cross": (CROSS, False, False),
    "cross, masked": (CROSS, True, False),
    "two streams": (JOINT, False, False),
    "two streams, masked": (JOINT, True, False),
    "causal": (SELF, False, True),
}
"""Lengths of the streams that queries, and that keys and values, are made of; whether keys are masked; causal."""


def attentions(world: World, by: str, num_heads: int) -> dict[str, float]:
    """The largest error of this rank's outcome and gradients, in float64, against attention of whole sequences."""
    context = context_of(world, by)
    return {
        name: error_of_attention(context, num_heads, *case)
        for name, case in ATTENTIONS.items()
        if by == "ulysses" or name != "causal"
    }


def error_of_attention(
    context: Context, num_heads: int, lengths: tuple[tuple[int, ...], tuple[int, ...]], masked: bool, causal: bool
) -> float:
    core, whole = CoreAttention(), CoreAttention()
    divide_attention(core, context)
    of_queries, of_keys = lengths
    q, k, v = (
        [normal(10 * i + j, B, num_heads, length, K).requires_grad_() for j, length in enumerate(streams)]
        for i, streams in enumerate((of_queries, of_keys, of_keys))
    )
    weights = [normal(50 + j, B, num_heads, length, K) for j, length in enumerate(of_queries)]
    seen = [normal(70 + j, B, length) > 0 for j, length in enumerate(of_keys)]
    seen[0][:, 0] = True  # each query sees something

    def run(attend: CoreAttention, place: Context) -> tuple[list[Tensor], list[Tensor]]:
        """What comes of each stream of queries, and the gradients."""
        parts = [[place.part(stream, 2) for stream in streams] for streams in (q, k, v)]
        keys = place.gather(torch.cat([place.part(stream) for stream in seen], 1))[:, None, None] if masked else None
        joined = attend(*(torch.cat(streams, 2) for streams in parts), keys=keys, causal=causal)
        outcome = joined.split([stream.shape[2] for stream in parts[0]], 2)
        loss = sum((each * place.part(weight, 2)).sum() for each, weight in zip(outcome, weights, strict=True))
        return [each.detach() for each in outcome], list(torch.autograd.grad(loss, [*q, *k, *v]))

    wanted, wanted_gradients = run(whole, Context())
    with context.dividing():
        found, gradients = run(core, context)
        pairs = [(each, context.part(other, 2)) for each, other in zip(found, wanted, strict=True)]
        # All of the gradient of a position is where the position is.
        pairs += [
            (context.part(each, 2), context.part(other, 2))
            for each, other in zip(gradients, wanted_gradients, strict=True)
        ]
    return max(largest_error(*pair) for pair in pairs)


def sums_and_parts(world: World) -> None:
    """What a context does to positions, and what it adds up, with gradients; nothing unless it is dividing."""
    context, length = context_of(world), 6 * world.size
    x = normal(0, B, length, K).requires_grad_()
    assert context.part(x).shape == x.shape and context.gather(x) is x and context.sum(x) is x
    assert context.size == 1 and context.start(5) == 0 and context.divides
    torch.testing.assert_close(context.mean(x), x.mean(1))
    with context.dividing():
        here, rank = context.part(x), world.rank
        assert torch.equal(here, x.chunk(world.size, 1)[rank])
        assert context.size == world.size and context.start(6) == 6 * rank
        assert torch.equal(context.gather(here.detach()), x)
        assert torch.equal(context.gather(here > 0), x > 0)
        mean = context.mean(here)
        torch.testing.assert_close(mean, x.mean(1))
        # Each goes on with a function of its own: the gradient is that of the sum of all.
        (mean.square() * (rank + 1)).sum().backward()
    wanted = (2 * x.mean(1) * sum(range(1, world.size + 1)) / length)[:, None].expand_as(x)
    torch.testing.assert_close(context.axis.all_reduce_sum(x.grad), wanted)
    assert context.size == 1


def steps(
    world: World, names: list[str], fields: dict[str, Any], precision: str = "fp32", packed: bool = False
) -> dict[str, tuple[dict[str, float], dict]]:
    """A step of each case: the terms of the loss and the whole gradients, added up as the trainer does."""
    plan = ParallelConfig(**fields)
    mesh, results = build_mesh(world, plan), {}
    for name in names:
        objective = build(name, mesh.tensor, plan.sequence, Context(mesh.context, plan.context_by))
        lengths = watch(objective.network)
        terms, _ = step(objective, precision, packed=packed)
        prefix = NUM_PREFIX if name == "elf" else 0
        share = (LENGTH + prefix) // plan.context // (plan.tensor if plan.sequence else 1)
        assert share in lengths and max(lengths) <= (LENGTH + prefix) // plan.context, (name, lengths)
        parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        sum_partial_gradients(parameters, mesh.tensor)
        reduce_gradients(parameters, mesh.reduction)
        totals = mesh.reduction.all_reduce_sum(torch.tensor(list(terms.values()), dtype=torch.float64))
        gradients = {key: parameter.grad for key, parameter in objective.named_parameters() if parameter.requires_grad}
        whole = gather_tensors(gradients, shards_of(objective), mesh.tensor)
        results[name] = dict(zip(terms, totals.tolist(), strict=True)), {k: g.clone() for k, g in whole.items()}
    return results


def watch(network: torch.nn.Module) -> set[int]:
    """Becomes the number of positions of what the network, its blocks and their attention give."""
    lengths: set[int] = set()

    def look(module: torch.nn.Module, inputs: Any, outputs: Any) -> None:
        lengths.update(x.shape[1] for x in tree_leaves(outputs) if torch.is_tensor(x) and x.ndim >= 3)

    for module in (network, *network.blocks):
        module.register_forward_hook(look)
    return lengths


def probes(world: World, names: list[str], by: str) -> dict[str, list[str]]:
    """What the start-up probe says of each case: as it is, and where nothing travels between processes."""
    context, said = context_of(world, by), {}

    def check(name: str) -> str:
        try:
            with context.dividing():
                check_direction(build(name, context=context).network, length=LENGTH)
        except BraidError as error:
            return str(error)
        return ""

    def own_keys(context: Context, *tensors: Tensor) -> list[Tensor]:
        return [torch.cat([x] * context.size, 2) for x in tensors]

    for name in names:
        said[name] = [check(name)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Axis, "all_to_all", lambda self, tensor: tensor)
            patch.setattr(context_module, "_all_positions", own_keys)
            said[name].append(check(name))
    return said
