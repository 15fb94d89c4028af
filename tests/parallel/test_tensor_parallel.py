"""Every objective divided over the tensor axis is the one of one process: losses, gradients, bounds, samples."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from tensor_bodies import Result, dropped, look, looks, masks, steps
from tensor_cases import CASES, DROPOUT, build, step

LAYOUTS = [(2, True), (2, False), pytest.param((4, True), marks=pytest.mark.slow),
           pytest.param((4, False), marks=pytest.mark.slow)]  # fmt: skip
ONE_OF_EACH_NETWORK = ["mdlm", "ccdd-mmdit", "ccdd-moedit-2-of-3", "replaid", "co_ladd", "elf"]
PATIENCE_S = 300
WITH_DROPOUT = [name for name, (_, model) in CASES.items() if "dropout" in model]


@cache
def expected(name: str) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Loss terms and gradients on one process."""
    return step(build(name))


@pytest.fixture(scope="module")
def measured(ranks):
    """measured((number of ranks, sequence)): the results of all cases by rank, run when they are first asked for."""
    return cache(lambda layout: ranks(steps, layout[0], list(CASES), layout[1], "fp32", {}, timeout_s=PATIENCE_S))


def joined(results: list[Result], gradients: str, name: str) -> torch.Tensor:
    """The whole gradient, which all ranks agree on."""
    of_ranks = [getattr(result, gradients)[name] for result in results]
    if name in results[0].shards:
        return results[0].shards[name].join(of_ranks)
    assert all(largest_error(each, of_ranks[0]) < 1e-5 for each in of_ranks), f"{name} differs between ranks"
    return of_ranks[0]


def largest_error(value: torch.Tensor, wanted: torch.Tensor) -> float:
    """Over the largest value."""
    return float((value - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_one_process(measured, name, layout):
    """With random weights everywhere; activation checkpointing and dropout in some of the cases."""
    results, (terms, gradients) = [of_rank[name] for of_rank in measured(layout)], expected(name)
    for result in results:
        assert result.terms == pytest.approx(terms, rel=1e-6, abs=1e-6)
    assert results[0].after.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert largest_error(joined(results, "after", key), gradient) < 1e-5, key


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_partial_gradients_are_those_marked_so(measured, name, layout):
    """Norms, adaLN, biases after a sum and heads see some positions; q and k norms some heads; nothing else is partial.

    In particular not: the time embeddings, whose c enters the region once; RePlaid's table, which is looked up whole
    and multiplied in parts; what feeds the latent strand.
    """
    results, (_, gradients) = [of_rank[name] for of_rank in measured(layout)], expected(name)
    partial = results[0].partial
    assert all(result.partial == partial for result in results)
    for key, gradient in gradients.items():
        if not gradient.any():  # what the joint network says of latents that another one denoises
            assert not any(result.before[key].any() for result in results), key
        elif key in partial:
            assert any(largest_error(result.before[key], gradient) > 1e-3 for result in results), key
        else:
            assert largest_error(joined(results, "before", key), gradient) < 1e-5, key
    per_head = {key for key in gradients if "query_norm" in key or "key_norm" in key}
    if not layout[1]:
        assert partial == per_head
    else:
        assert per_head < partial
        assert not any("time" in key or key.startswith(("network.embedding", "schedule")) for key in partial)


@pytest.mark.parametrize("sequence", [True, False])
def test_bf16_is_as_near_as_bf16_is(ranks, sequence):
    """Under autocast, to the precision of bfloat16; and the weights' gradients stay float32."""
    results = ranks(steps, 2, ONE_OF_EACH_NETWORK, sequence, "bf16", {"dropout": 0.0}, timeout_s=PATIENCE_S)
    for name in ONE_OF_EACH_NETWORK:
        terms, gradients = step(build(name, dropout=0.0), "bf16")
        of_ranks = [of_rank[name] for of_rank in results]
        assert of_ranks[0].terms == pytest.approx(terms, rel=0.02, abs=0.02), name
        assert of_ranks[0].terms == of_ranks[1].terms
        for key, gradient in gradients.items():
            value = joined(of_ranks, "after", key)
            assert value.dtype == torch.float32 and value.isfinite().all()
            assert float((value - gradient).norm() / gradient.norm()) < 0.1, (name, key)


@pytest.mark.parametrize("sequence", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_dropout_is_the_same_bit_for_bit(ranks, sequence):
    results = ranks(masks, 2, WITH_DROPOUT, sequence, timeout_s=PATIENCE_S)
    for name in WITH_DROPOUT:
        wanted = dropped(build(name))
        assert len(wanted) >= 4 and all(0 < float(mask.float().mean()) < 1 for mask in wanted)
        for number, mask in enumerate(wanted):
            of_ranks = [of_rank[name][number] for of_rank in results]
            if sequence:
                assert torch.equal(torch.cat(of_ranks, 1), mask), (name, number)
            else:
                assert all(torch.equal(each, mask) for each in of_ranks), (name, number)


@pytest.mark.parametrize("sequence", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_figures_and_samples_are_those_of_one_process(ranks, sequence):
    """Every rank has all of them. An AR model's cache and the probe show lengths that do not divide."""
    results = ranks(looks, 2, list(CASES), sequence, timeout_s=PATIENCE_S)
    for name in CASES:
        figures, samples = look(build(name))
        for seen, drawn in (of_rank[name] for of_rank in results):
            assert seen.keys() == figures.keys()
            for figure, value in figures.items():
                torch.testing.assert_close(seen[figure], value, rtol=1e-5, atol=1e-5, msg=f"{name} {figure}")
            assert all(torch.equal(*pair) for pair in zip(drawn, samples, strict=True)), name


@pytest.mark.slow
@pytest.mark.parametrize("sequence", [True, False])
def test_compiled_blocks_are_the_eager_ones(ranks, sequence):
    names = ["mdlm", "ccdd-moedit-2-of-3"]
    results = ranks(steps, 2, names, sequence, "fp32", DROPOUT | {"compile": True}, timeout_s=600)
    for name in names:
        terms, gradients = step(build(name, **DROPOUT))
        of_ranks = [of_rank[name] for of_rank in results]
        assert of_ranks[0].terms == pytest.approx(terms, rel=1e-5)
        for key, gradient in gradients.items():
            assert largest_error(joined(of_ranks, "after", key), gradient) < 1e-4, (name, key)
