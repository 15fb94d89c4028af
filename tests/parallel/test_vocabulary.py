"""A divided vocabulary beside a whole one: values and gradients of everything that is done over all tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from layer_bodies import vocabularies

from braid.parallel.vocabulary import Vocabulary


@pytest.mark.parametrize("num, size", [(2, 19), (2, 16), pytest.param(4, 19, marks=pytest.mark.slow), (4, 5)])
def test_divided_is_whole(ranks, num, size):
    """Also where the last rank has nothing but padding: 5 tokens on 4 ranks."""
    ranks(vocabularies, num, size)


def test_on_one_process_they_are_torchs_own():
    vocabulary, generator = Vocabulary(11), torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 11, generator=generator)
    targets = torch.randint(0, 11, (2, 3), generator=generator)
    without = logits.clone()
    without[..., 4] = -torch.inf
    assert vocabulary.logits(logits) is logits and vocabulary.gather(logits) is logits
    assert torch.equal(vocabulary.without(logits, 4), without)
    expected = F.cross_entropy(without.flatten(0, 1), targets.flatten(), reduction="none").view(2, 3)
    assert torch.equal(vocabulary.cross_entropy(logits, targets, without=4), expected)
    assert torch.equal(vocabulary.log_softmax(logits), F.log_softmax(logits, -1))
    assert torch.equal(vocabulary.softmax(logits), logits.softmax(-1))
    assert torch.equal(vocabulary.take(logits, targets[..., None]), logits.gather(-1, targets[..., None]))
    for method in ("columns", "rows", "shared", "sum"):
        assert getattr(vocabulary, method)(logits) is logits
    assert vocabulary.without_(logits, 4) is logits and torch.equal(logits, without)
