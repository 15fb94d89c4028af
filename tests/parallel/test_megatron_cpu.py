"""Megatron-core on the CPU: its layers, schedule and optimizers against plain torch; and that nobody else notices.

If a test here fails with a new version of Megatron-core: look at what changed in `cuda_uses.py`, then in the stand-in.
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import megatron.core
import pytest
import torch
from cuda_uses import RECORDED
from megatron_bodies import (
    PlainNetwork,
    batch,
    install_and_look,
    run_mappings,
    run_network,
    run_pipeline,
    run_sharded_network,
    send_together,
    train_plainly,
    train_with_megatron,
    try_other_versions,
)

from braid.parallel.megatron_cpu import MODULES


def assert_close(found: dict, expected: dict, *, rtol: float, atol: float) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=rtol, atol=atol, check_dtype=False, msg=lambda t, n=name: f"{n}: {t}"
        )


@pytest.mark.parametrize("sequence", [False, True], ids=["", "sequence-parallel"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
def test_layers_equal_plain_torch(ranks, sequence: bool, bf16: bool) -> None:
    """Column- and row-parallel, the vocabulary's embedding and cross-entropy: outputs and all gradients."""
    expected = run_network(PlainNetwork(), bf16)
    assert all(value.abs().max() > 0.05 for value in expected.values()), "else the tolerance would hide errors"
    for found in ranks(run_sharded_network, 2, sequence, bf16):
        assert_close(found, expected, rtol=0, atol=0.03 if bf16 else 1e-6)


def test_moving_activations(ranks) -> None:
    own = [torch.arange(24.0).view(6, 4) + 100 * rank for rank in (0, 1)]
    for rank, found in enumerate(ranks(run_mappings, 2)):
        half = slice(3 * rank, 3 * rank + 3)
        moved = {
            "gather_from_tensor_model_parallel_region": torch.cat(own, dim=1),
            "gather_from_sequence_parallel_region": torch.cat(own, dim=0),
            "reduce_scatter_to_sequence_parallel_region": (own[0] + own[1])[half],
            "all_to_all": torch.cat([own[0][half], own[1][half]]),
        }
        ones = torch.ones(6, 4)
        halves = torch.cat([ones[:3], 2 * ones[:3]])  # rank 1 weighs what it got twice
        gradients = {
            "gather_from_tensor_model_parallel_region": (1 + rank) * ones,
            "gather_from_sequence_parallel_region": 3 * ones,
            "reduce_scatter_to_sequence_parallel_region": halves,
            "all_to_all": halves,
        }
        assert_close({name: result for name, (result, _) in found.items()}, moved, rtol=0, atol=0)
        assert_close({name: gradient for name, (_, gradient) in found.items()}, gradients, rtol=0, atol=0)


@pytest.mark.parametrize("num_micro_batches", [1, 5])
def test_a_pipeline_of_two_stages_equals_one_process(ranks, num_micro_batches: int) -> None:
    network, losses = PlainNetwork(), []
    for index in range(num_micro_batches):
        tokens, targets = batch(index)
        loss = network.losses(network(tokens), targets).sum()
        (loss / num_micro_batches).backward()
        losses.append(loss.item())
    (first_losses, first), (last_losses, last) = ranks(run_pipeline, 2, num_micro_batches)
    assert first_losses == [] and last_losses == pytest.approx(losses, rel=1e-6)
    assert not first.keys() & last.keys() and first.keys() | last.keys() == dict(network.named_parameters()).keys()
    expected = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert_close(first | last, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("distributed", [False, True], ids=["replicated", "distributed"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_optimizers_equal_plain_torch(ranks, distributed: bool, bf16: bool) -> None:
    """bfloat16 weights move as the float32 ones they are copies of, but for their own rounding."""
    expected_norms, expected = train_plainly(4)
    assert min(expected_norms) > 0.1, "clipping must be at work"
    for norms, weights in ranks(train_with_megatron, 2, distributed, bf16, 4):
        assert norms == pytest.approx(expected_norms, rel=5e-3 if bf16 else 1e-6)
        assert_close(weights, expected, rtol=2**-8 if bf16 else 0, atol=2e-3 if bf16 else 1e-6)


def test_what_is_sent_together_goes_one_by_one(ranks) -> None:
    ranks(send_together, 2)


def test_nobody_else_notices(ranks) -> None:
    ranks(install_and_look, 1)


def test_other_versions_are_refused_and_cuda_is_left_alone(ranks) -> None:
    ranks(try_other_versions, 1)


def cuda_uses(path: Path) -> dict[str, int]:
    """How often each word about CUDA, and torch's manager of what is sent together, stand in a source file, comments
    and docstrings left out."""
    uses = Counter()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Attribute(value=ast.Attribute(value=ast.Name(id="torch"), attr="cuda"), attr=name):
                uses[f"torch.cuda.{name}"] += 1
            case ast.Attribute(value=ast.Name(id="torch"), attr="cuda"):
                pass  # part of the former, or a bare mention
            case ast.Attribute(attr="cuda" | "is_cuda" as name):
                uses[f".{name}"] += 1
            case ast.Constant(value=str(word)) if word == "cuda" or word.startswith(("cuda:", "torch.cuda.")):
                uses[repr(word)] += 1
            case ast.ImportFrom(module=str(name)) if name.startswith("torch.cuda"):
                uses[f"from {name}"] += 1
            case ast.Call(func=ast.Name(id="_coalescing_manager" as name)):
                uses[name] += 1
    return dict(uses)


@pytest.mark.parametrize("module", RECORDED)
def test_megatron_speaks_of_cuda_where_it_did(module: str) -> None:
    """A use that is not recorded may need the stand-in's care, or be of no concern: decide, then record it."""
    path = Path(megatron.core.__file__).parent.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    assert cuda_uses(path) == RECORDED[module]


def test_all_modules_that_are_changed_are_recorded() -> None:
    assert set(MODULES) <= RECORDED.keys() and all(RECORDED[module] for module in MODULES)
