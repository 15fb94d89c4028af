"""Cross-entropy and its gradient on this machine's CPU, by the compiled and the eager implementation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from braid.kernels import dispatch
from braid.kernels.cross_entropy import cross_entropy_


@pytest.fixture(params=["compiled", "eager"])
def implementation(request, monkeypatch) -> Iterator[str]:
    """Each of them in turn."""
    found = dispatch.choose("cpu")
    if request.param == "compiled" and found.name != "compiled":
        pytest.skip(f"there is no compiled library: {found.reason}")
    monkeypatch.setattr(dispatch, "choose", lambda device_type: dispatch.Choice(request.param, "a test"))
    dispatch._functions.cache_clear()
    yield request.param
    dispatch._functions.cache_clear()


def reference(logits, targets, weights, z_loss=0.0, left_out=None):
    """nll, lse, softmax and gradient in float64, by NumPy."""
    x = logits.double().numpy().copy()
    if left_out is not None:
        x[:, left_out] = -np.inf
    largest = x.max(1)
    lse = largest + np.log(np.exp(x - largest[:, None]).sum(1))
    p = np.exp(x - lse[:, None])
    w, rows = weights.double().numpy(), np.arange(len(x))
    gradient = (w * (1 + 2 * z_loss * lse))[:, None] * p
    gradient[rows, targets.numpy()] -= w
    return lse - x[rows, targets.numpy()], lse, p, gradient


def case(vocab_size: int, rows: int = 13, scale: float = 4.0, seed: int = 0):
    rng = np.random.default_rng([vocab_size, seed])
    logits = torch.from_numpy(rng.normal(3, scale, (rows, vocab_size)).astype(np.float32))
    weights = torch.from_numpy(rng.uniform(0, 3, rows).astype(np.float32))
    weights[rng.random(rows) < 0.2] = 0
    return logits, torch.from_numpy(rng.integers(0, vocab_size, rows)), weights


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("vocab_size", [1, 3, 127, 128, 129, 5003])
def test_float32_is_as_exact_as_it_says(implementation, vocab_size, z_loss):
    """nll and lse to 2e-6 of the largest logit, which their input is rounded to; gradients to 2e-6 of each probability
    (times the weight), down to e^-30 of the largest."""
    for seed, scale in enumerate([0.1, 1.0, 4.0]):
        logits, targets, weights = case(vocab_size, scale=scale, seed=seed)
        left_out = vocab_size // 2 if vocab_size > 2 else None
        if left_out is not None:
            targets[targets == left_out] = 0
        nll, lse, p, gradient = reference(logits, targets, weights, z_loss, left_out)
        rows = torch.full((13, vocab_size + 5), 77.0)[:, 2 : 2 + vocab_size]  # a part of wider rows
        rows.copy_(logits)
        ours_nll, ours_lse = cross_entropy_(rows, targets, weights, z_loss, left_out=left_out)
        assert np.allclose(ours_nll.numpy(), nll, rtol=2e-6, atol=1e-6)
        assert np.allclose(ours_lse.numpy(), lse, rtol=2e-6, atol=1e-6)
        assert ours_nll.dtype == ours_lse.dtype == torch.float32
        w = weights.numpy()[:, None]
        error = np.abs(rows.double().numpy() - gradient)
        at_target = np.zeros_like(p, dtype=bool)
        at_target[np.arange(13), targets.numpy()] = True
        allowed = 2e-6 * np.where(at_target, 1, p) * w * (1 + 2 * z_loss * np.abs(lse))[:, None]
        assert np.all(error <= allowed + w * p.max(1, keepdims=True) * np.exp(-30))
        assert (rows[weights == 0] == 0).all() and (left_out is None or (rows[:, left_out] == 0).all())
        assert (rows._base[:, :2] == 77).all() and (rows._base[:, 2 + vocab_size :] == 77).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(implementation, dtype):
    logits, targets, weights = case(300)
    logits = logits.to(dtype)
    nll, lse, _, gradient = reference(logits, targets, weights, 1e-3)
    ours_nll, ours_lse = cross_entropy_(logits, targets, weights, 1e-3)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert np.allclose(ours_nll.double().numpy(), nll, rtol=tolerance, atol=tolerance)
    assert np.allclose(ours_lse.double().numpy(), lse, rtol=tolerance)
    half_ulp = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-12}[dtype]
    assert np.allclose(logits.double().numpy(), gradient, rtol=1.01 * half_ulp, atol=1e-7)


def test_it_is_the_gradient_of_the_loss(implementation):
    logits, targets, weights = case(50)
    leaf = logits.double().requires_grad_()
    lse = leaf.logsumexp(1)
    nll = lse - leaf.gather(1, targets[:, None])[:, 0]
    (weights * (nll + 0.01 * lse**2)).sum().backward()
    cross_entropy_(logits, targets, weights, 0.01)
    assert torch.allclose(logits.double(), leaf.grad, rtol=1e-5, atol=1e-7)


def test_without_gradient_the_numbers_are_the_same(implementation):
    logits, targets, weights = case(300)
    without = cross_entropy_(logits.clone(), targets, weights, gradient=False)
    assert all(map(torch.equal, without, cross_entropy_(logits, targets, weights)))


@pytest.mark.parametrize("pieces", [(150, 150), (1, 299), (300, 40)])
def test_halves_for_a_divided_vocabulary(implementation, pieces):
    """Two processes' columns, one of them perhaps padding alone: together what one process finds."""
    first, second = pieces
    logits, targets, weights = case(300)
    padded = torch.cat([logits, torch.full((13, first + second - 300), -torch.inf)], 1)
    whole = logits.clone()
    nll, lse = cross_entropy_(whole, targets, weights, 1e-3)
    whole = torch.cat([whole, torch.zeros(13, first + second - 300)], 1)
    shards = [padded[:, :first].clone(), padded[:, first:].clone()]
    local = [torch.where(targets < first, targets, -1), torch.where(targets >= first, targets - first, -1)]
    statistics = {}

    def remember(rank):
        def join(*mine):
            statistics[rank] = [each.clone() for each in mine]
            return mine

        return join

    def joined(*_):
        largest = torch.maximum(statistics[0][0], statistics[1][0])
        total = sum(total * (own - largest).exp() for own, total, _ in statistics.values())
        return largest, total, statistics[0][2] + statistics[1][2]

    for rank in (0, 1):
        cross_entropy_(shards[rank].clone(), local[rank], weights, 1e-3, False, remember(rank))
    for rank in (0, 1):
        ours_nll, ours_lse = cross_entropy_(shards[rank], local[rank], weights, 1e-3, True, joined)
        assert torch.allclose(ours_nll, nll, rtol=2e-6, atol=1e-6) and torch.allclose(ours_lse, lse, rtol=2e-6)
    assert torch.allclose(torch.cat(shards, 1), whole, rtol=5e-6, atol=1e-9)


def test_infinities_and_nan(implementation):
    logits = torch.tensor(
        [[0.0, -torch.inf, 1.0], [torch.nan, 0.0, 0.0], [5e4, -5e4, 5e4], [-torch.inf, -torch.inf, 2.0]]
    )
    nll, _ = cross_entropy_(logits, torch.tensor([2, 1, 0, 2]), torch.ones(4))
    assert logits[0, 1] == 0 and torch.isfinite(nll[[0, 2, 3]]).all() and nll[1].isnan() and logits[1].isnan().any()
    assert nll[2] == pytest.approx(np.log(2)) and logits[2].tolist() == pytest.approx([-0.5, 0, 0.5]) and nll[3] == 0


def test_a_target_beyond_the_tokens_is_seen(implementation):
    logits = torch.zeros(2, 5)
    if implementation == "eager":
        with pytest.raises(RuntimeError):
            cross_entropy_(logits, torch.tensor([5, 0]), torch.ones(2))
    else:
        nll, _ = cross_entropy_(logits, torch.tensor([5, 0]), torch.ones(2))
        assert nll.isnan().tolist() == [True, False]


def test_rows_do_not_depend_on_each_other_or_on_threads(implementation):
    logits, targets, weights = case(1000, rows=40)
    together = logits.clone()
    nll, lse = cross_entropy_(together, targets, weights, 1e-3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = logits[7:9].clone()
    ours = cross_entropy_(alone, targets[7:9], weights[7:9], 1e-3)
    torch.set_num_threads(threads)
    assert torch.equal(alone, together[7:9]) and torch.equal(ours[0], nll[7:9]) and torch.equal(ours[1], lse[7:9])
