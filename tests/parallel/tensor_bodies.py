"""What runs on the ranks of test_tensor_parallel.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensor_cases import BATCH, LENGTH, batch_and_noise, build, step

from braid.parallel.data_parallel import World
from braid.parallel.layers import Shard, sum_partial_gradients
from braid.parallel.mesh import Axis, build_mesh
from braid.parallel.plan import ParallelConfig
from braid.pretrain.config.schema import SamplingConfig
from braid.pretrain.model.probe import check_direction
from braid.pretrain.objectives.base import Noise, Objective
from braid.pretrain.sampling.prompts import no_prompt
from braid.pretrain.sampling.sampler import draw_samples


@dataclass
class Result:
    """Of one case on one rank."""

    terms: dict[str, float]
    before: dict[str, torch.Tensor]
    """Gradients before the partial ones are summed."""
    after: dict[str, torch.Tensor]
    """Gradients after that."""
    shards: dict[str, Shard]
    """Of the parameters that are divided."""
    partial: set[str]


def tensor_axis(world: World) -> Axis:
    return build_mesh(world, ParallelConfig(tensor=world.size)).tensor


def steps(world: World, names: list[str], sequence: bool, precision: str, model: dict[str, Any]) -> dict[str, Result]:
    """A forward and a backward pass of each case."""
    axis, results = tensor_axis(world), {}
    for name in names:
        objective = build(name, axis, sequence, **model)
        terms, before = step(objective, precision)
        parameters = dict(objective.named_parameters())
        sum_partial_gradients(parameters.values(), axis)
        after = {key: before[key] if parameters[key].grad is None else parameters[key].grad for key in before}
        shards = {key: parameter.shard for key, parameter in parameters.items() if hasattr(parameter, "shard")}
        partial = {key for key, parameter in parameters.items() if getattr(parameter, "partial", False)}
        results[name] = Result(terms, before, after, shards, partial)
    return results


def dropped(objective: Objective) -> list[torch.Tensor]:
    """All dropout masks of a step, block by block, as [B, L, ...] one beside the other."""
    masks = []

    def record(block: torch.nn.Module) -> None:
        make = block.dropout_masks

        def recording(*args: Any) -> Any:
            made = make(*args)
            masks.extend(mask for mask in torch.utils._pytree.tree_leaves(made) if mask is not None)
            return made

        block.dropout_masks = recording

    for network in objective.children():
        for block in getattr(network, "blocks", ()):
            record(block)
    step(objective)
    return masks


def masks(world: World, names: list[str], sequence: bool) -> dict[str, list[torch.Tensor]]:
    """The dropout masks of each case, of this rank's positions."""
    axis = tensor_axis(world)
    return {name: dropped(build(name, axis, sequence)) for name in names}


def look(objective: Objective, *, guided: bool = True) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Every figure of an evaluation [B], and samples [N, L] by some samplers. `guided`: by one too that needs the
    gradient of the network."""
    batch, noise = batch_and_noise()
    objective.eval()
    with torch.no_grad():
        figures = objective.evaluate(batch, Noise.evaluation(noise.key, noise.ordinals, 0, 1))
    settings = {
        "elf": [SamplingConfig(steps=3), SamplingConfig(steps=3, temperature=0.7)],
        "replaid": [SamplingConfig(steps=3), SamplingConfig(steps=3, top_p=0.8, token_guidance=0.5 * guided)],
        "co_ladd": [SamplingConfig(steps=3, sampler="joint_ddpm")],
        "ccdd": [SamplingConfig(steps=3, guidance=1.5)],
        "gidd": [SamplingConfig(steps=3, greedy_final=True)],
    }.get(objective.name, [SamplingConfig(steps=3, top_p=0.9)])
    prompt = no_prompt(BATCH, LENGTH)
    if getattr(objective.config, "latent_denoiser", False):  # it draws the latents before the text, without a prompt
        settings = [SamplingConfig(steps=3, sampler="sequential_ddpm")]
    else:
        prompt.tokens[:, :3], prompt.known[:, :3] = batch.tokens[:, :3], True
    return figures, [draw_samples(objective, each, prompt, key=3).tokens for each in settings]


def looks(world: World, names: list[str], sequence: bool) -> dict[str, tuple]:
    """What each case evaluates to and samples; and that the start-up probe passes."""
    axis, seen = tensor_axis(world), {}
    for name in names:
        objective = build(name, axis, sequence)
        seen[name] = look(objective)
        check_direction(objective.network, length=9)  # a length that does not divide
    return seen
