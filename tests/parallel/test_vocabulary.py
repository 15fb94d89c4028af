"""A divided vocabulary beside a whole one: values and gradients of everything that is done over all tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from layer_bodies import cross_entropies, vocabularies

from braid.parallel.vocabulary import Vocabulary


@pytest.mark.parametrize("num, size", [(2, 19), (2, 16), pytest.param(4, 19, marks=pytest.mark.slow), (4, 5)])
def test_divided_is_whole(ranks, num, size):
    """Also where the last rank has nothing but padding: 5 tokens on 4 ranks."""
    ranks(vocabularies, num, size)


@pytest.mark.parametrize("num, size, sequence", [(2, 19, False), (2, 16, True), (4, 5, True)])
def test_cross_entropy_of_a_divided_layer_is_that_of_a_whole_one(ranks, num, size, sequence):
    ranks(cross_entropies, num, size, sequence)


def test_on_one_process_they_are_torchs_own():
    vocabulary, generator = Vocabulary(11), torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 11, generator=generator)
    targets = torch.randint(0, 11, (2, 3), generator=generator)
    without = logits.clone()
    without[..., 4] = -torch.inf
    assert vocabulary.logits(logits) is logits and vocabulary.gather(logits) is logits
    assert torch.equal(vocabulary.without(logits, 4), without)
    row_loss = vocabulary.cross_entropy(targets, torch.ones(2, 3), without=4)
    added, nats = row_loss(logits.flatten(0, 1).clone(), torch.arange(6), False)
    expected = F.cross_entropy(without.flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(nats, expected)
    assert torch.equal(added, nats)
    assert torch.equal(vocabulary.log_softmax(logits), F.log_softmax(logits, -1))
    assert torch.equal(vocabulary.softmax(logits), logits.softmax(-1))
    torch.testing.assert_close(vocabulary.softmax_(logits.clone()), logits.softmax(-1))
    assert torch.equal(vocabulary.take(logits, targets[..., None]), logits.gather(-1, targets[..., None]))
    for method in ("columns", "rows", "shared", "sum"):
        assert getattr(vocabulary, method)(logits) is logits
    assert vocabulary.without_(logits, 4) is logits and torch.equal(logits, without)
