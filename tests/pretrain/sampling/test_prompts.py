"""Where a prompt's text stands in a row of each packing, and what else is given."""

from __future__ import annotations

import pytest

from braid.data_pipeline.tokenizers import load_tokenizer
from braid.kernels.errors import InputError
from braid.pretrain.sampling.prompts import prefix_prompt

TOKENIZER = load_tokenizer("bytes")


@pytest.mark.parametrize(
    ("packing", "start", "given", "room"),
    [
        ("stream", 0, "xxx.....", 8),
        ("wrap", 1, "xxxx...x", 6),
        ("document", 1, "xxxx....", 6),
        ("best_fit", 1, "xxxx....", 6),
        ("paragraph", 0, "xxx.....", 7),
    ],
)
def test_a_prefix_stands_where_text_begins(packing, start, given, room):
    prompt = prefix_prompt("abc", 2, 8, TOKENIZER, packing=packing)
    assert ["".join(".x"[int(k)] for k in row) for row in prompt.known] == [given] * 2
    assert prompt.tokens[:, start : start + 3].tolist() == [[97, 98, 99]] * 2
    assert start == 0 or prompt.tokens[:, 0].tolist() == [TOKENIZER.bos_id] * 2
    prefix_prompt("a" * room, 1, 8, TOKENIZER, packing=packing)
    with pytest.raises(InputError, match=f"a row holds {room}"):
        prefix_prompt("a" * (room + 1), 1, 8, TOKENIZER, packing=packing)
