"""Cross-entropy of an output layer, chunk by chunk, against all logits at once in float64."""

from __future__ import annotations

import pytest
import torch

from braid.kernels import linear_loss as chunked
from braid.kernels.linear_cross_entropy import CrossEntropy, linear_cross_entropy
from braid.kernels.linear_loss import Rows, linear_loss

N, W, V = 130, 24, 203  # a vocabulary that is no multiple of 8
WITHOUT = 5


def inputs(dtype=torch.float32, bias=True):
    """Hidden states, weight and bias, which are leaves; targets and weights, some of them 0."""
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(N, W, generator=generator),
        0.5 * torch.randn(V, W, generator=generator),
        torch.randn(V, generator=generator) if bias else None,
    ]
    leaves = [each if each is None else each.to(dtype).requires_grad_() for each in leaves]
    targets = torch.randint(WITHOUT + 1, V, (N,), generator=generator)
    weights = 3 * torch.rand(N, generator=generator)
    weights[::7] = 0.0
    return leaves, targets, weights


def all_at_once(leaves, targets, weights, counts, z_loss=0.0):
    """Total, nll and gradients in float64."""
    exact = [each if each is None else each.detach().double().requires_grad_() for each in leaves]
    logits = torch.nn.functional.linear(*exact)
    logits = torch.where(torch.arange(V) == WITHOUT, -torch.inf, logits)
    lse = logits.logsumexp(1)
    nll = lse - logits.gather(1, targets[:, None])[:, 0]
    total = (weights.double() * (nll + z_loss * lse.square()))[counts].sum()
    gradients = torch.autograd.grad(total, [each for each in exact if each is not None])
    return total.detach(), nll.detach() * counts, gradients


def relative(ours, theirs) -> float:
    """The largest difference, relative to the largest number."""
    return float((ours.double() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("share, rows_at_once", [(0.5, N), (0.5, 16), (1.0, 13), (0.01, N), (0.0, 16)])
def test_it_is_what_all_logits_say(share, rows_at_once, bias, z_loss, monkeypatch):
    """Of half the rows, of all, one or none; in one chunk, in many, and where chunks divide the rows evenly."""
    monkeypatch.setattr(chunked, "CHUNK_LOGITS", rows_at_once * 256)
    leaves, targets, weights = inputs(bias=bias)
    counts = torch.arange(N) % 100 < 100 * share
    total, nll = linear_cross_entropy(*leaves, targets, weights, rows=Rows(counts), z_loss=z_loss, without=WITHOUT)
    expected, expected_nll, gradients = all_at_once(leaves, targets, weights, counts, z_loss)
    assert float(total.detach()) == pytest.approx(float(expected), rel=1e-6)
    assert not nll.requires_grad and torch.all(nll[~counts] == 0)
    assert (nll - expected_nll).abs().max() < 1e-6 * expected_nll.abs().max().clamp(min=1)
    (total / 3).backward()
    for leaf, gradient in zip([each for each in leaves if each is not None], gradients, strict=True):
        assert leaf.grad.dtype == leaf.dtype and relative(3 * leaf.grad, gradient) < 1e-6
    assert torch.all(leaves[0].grad[~counts] == 0) and torch.all(leaves[1].grad[WITHOUT] == 0)


def test_all_rows_count_where_none_are_named():
    leaves, targets, weights = inputs()
    everything = torch.ones(N, dtype=torch.bool)
    total, nll = linear_cross_entropy(*leaves, targets, weights)
    again, nll_again = linear_cross_entropy(*leaves, targets, weights, rows=Rows(everything))
    assert torch.equal(total, again) and torch.equal(nll, nll_again)


def test_float64_is_kept():
    leaves, targets, weights = inputs(torch.float64)
    counts = torch.arange(N) % 3 > 0
    total, nll = linear_cross_entropy(*leaves, targets, weights.double(), rows=Rows(counts), without=WITHOUT)
    expected, expected_nll, gradients = all_at_once(leaves, targets, weights, counts)
    total.backward()
    torch.testing.assert_close(nll, expected_nll, rtol=1e-12, atol=1e-12)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-11, atol=1e-12)


def test_bfloat16_products_are_those_of_autocast_and_float32_after(monkeypatch):
    """The same logits to the bit, and gradients as close to float64 as autocast's own."""
    monkeypatch.setattr(chunked, "CHUNK_LOGITS", 32 * 256)
    leaves, targets, weights = inputs()
    counts = torch.arange(N) % 2 > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = torch.nn.functional.linear(*leaves)
    logits = torch.where(torch.arange(V) == WITHOUT, -torch.inf, logits.float())
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    plain = torch.autograd.grad((weights * nll)[counts].sum(), leaves)

    half = leaves[0].detach().bfloat16().requires_grad_()
    total, values = linear_cross_entropy(half, *leaves[1:], targets, weights, rows=Rows(counts), without=WITHOUT)
    torch.testing.assert_close(values[counts].float(), nll[counts].detach(), rtol=1e-6, atol=1e-6)
    ours = torch.autograd.grad(total, [half, *leaves[1:]])
    assert [each.dtype for each in ours] == [torch.bfloat16, torch.float32, torch.float32]
    exact = all_at_once(leaves, targets, weights, counts)[2]
    for mine, theirs, wanted in zip(ours, plain, exact, strict=True):
        assert relative(mine, wanted) < max(1.2 * relative(theirs, wanted), 1e-2)


def test_what_needs_no_gradient_gets_none():
    """A frozen weight, hidden states that nobody learns from, and no gradient at all."""
    leaves, targets, weights = inputs()
    place = targets, weights
    expected, nll = linear_cross_entropy(*leaves, *place)
    wanted = torch.autograd.grad(expected, leaves)
    for frozen in range(3):
        some = [leaf.detach() if index == frozen else leaf for index, leaf in enumerate(leaves)]
        total, _ = linear_cross_entropy(*some, *place)
        found = torch.autograd.grad(total, [each for each in some if each.requires_grad])
        kept = [gradient for index, gradient in enumerate(wanted) if index != frozen]
        assert all(torch.equal(one, other) for one, other in zip(found, kept, strict=True))
    with torch.no_grad():
        total, values = linear_cross_entropy(*leaves, *place)
    assert not total.requires_grad and torch.equal(total, expected.detach()) and torch.equal(values, nll)


def test_evaluation_computes_no_gradient():
    asked = []

    def row_loss(logits, rows, gradient):
        asked.append(gradient)
        return logits.sum(1), logits.amax(1)

    leaves, _, _ = inputs()
    with torch.no_grad():
        linear_loss(*leaves, Rows(torch.ones(N, dtype=torch.bool)), row_loss)
    linear_loss(*(leaf.detach() for leaf in leaves), Rows(torch.ones(N, dtype=torch.bool)), row_loss)
    linear_loss(*leaves, Rows(torch.ones(N, dtype=torch.bool)), row_loss)
    assert asked == [False, False, True]


def test_it_is_deterministic_and_differentiated_once():
    leaves, targets, weights = inputs()
    runs = [torch.autograd.grad(linear_cross_entropy(*leaves, targets, weights)[0], leaves) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    total, _ = linear_cross_entropy(*leaves, targets, weights)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_under_compile_it_runs_as_it_is():
    leaves, targets, weights = inputs()
    rows = Rows(torch.arange(N) % 2 > 0)

    def loss(hidden, weight, bias):
        return linear_cross_entropy(2 * hidden, weight, bias, targets, weights, rows=rows)[0] + 1

    compiled = torch.compile(loss, backend="aot_eager")
    (total, expected) = (each(*leaves) for each in (compiled, loss))
    torch.testing.assert_close(total, expected)
    ours, theirs = (torch.autograd.grad(each, leaves) for each in (total, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_logits_that_are_there_need_no_layer():
    leaves, targets, weights = inputs()
    counts = torch.arange(N) % 4 > 1
    logits = torch.nn.functional.linear(*leaves)
    row_loss = CrossEntropy(targets, weights, without=WITHOUT)
    total, nll = linear_loss(logits, None, None, Rows(counts), row_loss)
    expected, expected_nll, gradients = all_at_once(leaves, targets, weights, counts)
    assert (nll - expected_nll).abs().max() < 1e-5
    for ours, theirs in zip(torch.autograd.grad(total, leaves), gradients, strict=True):
        assert relative(ours, theirs) < 1e-6


def test_memory_is_that_of_a_chunk():
    """Rows at a time are few where the vocabulary is wide, and never more than there are."""
    assert chunked.chunk_rows(10**6, 50_257) == chunked.CHUNK_LOGITS // 50_304
    assert chunked.chunk_rows(100, 50_257) == 100
    assert chunked.chunk_rows(100, 10**9) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_says_the_same(dtype):
    leaves, targets, weights = inputs()
    counts = torch.arange(N) % 2 > 0
    hidden = leaves[0].detach().to(dtype).requires_grad_()
    total, nll = linear_cross_entropy(hidden, *leaves[1:], targets, weights, rows=Rows(counts), without=WITHOUT)
    expected = torch.autograd.grad(total, [hidden, *leaves[1:]])
    there = [each.detach().cuda().requires_grad_() for each in (hidden, *leaves[1:])]
    rows = Rows(counts.cuda())
    rows.begin()
    assert rows.number == int(counts.sum())
    total, values = linear_cross_entropy(*there, targets.cuda(), weights.cuda(), rows=rows, without=WITHOUT)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(values.cpu(), nll, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(torch.autograd.grad(total, there), expected, strict=True):
        assert relative(ours.cpu(), theirs.double()) < tolerance
