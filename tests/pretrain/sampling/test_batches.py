"""Samples by the batch: as many at a time as fit, without any influence on what comes out."""

import pytest
import torch

from braid.pretrain.config.schema import SamplingConfig
from braid.pretrain.sampling import batches
from braid.pretrain.sampling.batches import draw_in_batches
from braid.pretrain.sampling.prompts import Prompt, no_prompt

from ..evaluation.models import byte_model
from ..evaluation.test_conditional import rows_of_pairs, tokens_and_given


@pytest.mark.parametrize("name", ["ar", "mdlm"])
def test_drawing_ignores_the_batch_size(name, tmp_path):
    """Sources of several lengths: each is in its row, and calls are those of its row."""
    model = byte_model(name, packing="pairs", length=20)
    rows, _ = rows_of_pairs(tmp_path, 20)
    num = len(rows)
    prompt = Prompt(*map(torch.from_numpy, tokens_and_given(rows)))
    seen = []
    objective, settings = model.objective, SamplingConfig(steps=4)
    assert getattr(objective, "answers", True), "a model of pairs knows that it is one"
    common = dict(precision="fp32", key=1)
    two = draw_in_batches(
        objective, settings, prompt, batch_size=2, progress=lambda *count: seen.append(count), **common
    )
    assert torch.equal(two.tokens[prompt.known], prompt.tokens[prompt.known])
    assert seen == sorted(seen) and seen[-1] == (num, num) and (2, num) in seen
    all_at_once = draw_in_batches(objective, settings, prompt, **common)
    assert torch.equal(two.tokens, all_at_once.tokens) and two.network_calls == all_at_once.network_calls
    if name == "ar":
        assert two.network_calls == (20 - prompt.known.sum(1)).tolist()
    else:
        assert max(two.network_calls) <= 4
    assert not torch.equal(two.tokens, draw_in_batches(objective, settings, prompt, precision="fp32", key=2).tokens)


def test_a_batch_beyond_the_memory_is_drawn_in_halves(monkeypatch):
    """Whatever fits in the end, the samples are the same; one that does not fit by itself is an error."""
    model = byte_model("mdlm", length=20)
    objective, settings, prompt = model.objective, SamplingConfig(steps=3), no_prompt(7, 20)
    expected = draw_in_batches(objective, settings, prompt, key=1, precision="fp32")
    draw, sizes = batches.draw_samples, []

    def holds(most):
        def drawing(objective, settings, part, **options):
            sizes.append(len(part.tokens))
            if len(part.tokens) > most:
                raise torch.OutOfMemoryError("no room")
            return draw(objective, settings, part, **options)

        return drawing

    monkeypatch.setattr(batches, "draw_samples", holds(2))
    found = draw_in_batches(objective, settings, prompt, key=1, precision="fp32")
    assert sizes == [7, 4, 2, 2, 2, 1]
    assert torch.equal(found.tokens, expected.tokens) and found.network_calls == expected.network_calls
    monkeypatch.setattr(batches, "draw_samples", holds(0))
    with pytest.raises(torch.OutOfMemoryError):
        draw_in_batches(objective, settings, prompt, key=1, precision="fp32")
