from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braid.data_pipeline.json_array import array_records
from braid.data_pipeline.readers import documents
from braid.kernels.errors import InputError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def records(content: bytes, block: int) -> list:
    return list(array_records(content[i : i + block] for i in range(0, len(content), block)))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), max_size=5),
    st.integers(1, 9),
    st.sampled_from([None, 2]),
    st.booleans(),
)
def test_equals_the_standard_library_whatever_the_blocks(values, block, indent, ascii):
    content = json.dumps(values, indent=indent, ensure_ascii=ascii).encode("utf-8", "replace")
    assert records(b" \n" + content + b"\n", block) == json.loads(content)


def test_a_long_record_is_not_read_again_at_every_block():
    text = "語" * 1_000_000
    assert records(json.dumps([{"text": text}], ensure_ascii=False).encode(), 4096) == [{"text": text}]


@pytest.mark.parametrize(
    ("content", "number", "said"),
    [
        ('[{"text": "good"}, {"text": "cut', 2, "Unterminated string"),
        ('[{"text": "good"}, {"text": "cut"}', 3, "it is cut off"),
        ('[{"text": "good"} {"text": "no comma"}]', 2, "stands where"),
        ('[{"text": "good"},]', 2, "Expecting value"),
        ('[{"text": "good"}] [{"text": "two"}]', 2, "stands after the array"),
        ("[" * 100_000, 1, "recursion"),
        ('[{"text": nul}]', 1, "Expecting value"),
    ],
)
def test_what_is_no_array_names_the_record(tmp_path, content, number, said):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=rf"a.json, record {number}: not valid JSON") as caught:
        list(documents([tmp_path / "a.json"]))
    assert said in str(caught.value) and caught.value.change


def test_what_a_record_must_be(tmp_path):
    def message(content: bytes) -> str:
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(InputError) as caught:
            list(documents([tmp_path / "a.json"]))
        return str(caught.value)

    assert "record 2: there is no field `text`" in message(b'[{"text": "x"}, {"body": "y"}]')
    many = message(json.dumps([{"x" * 90: 0} | {str(number): 0 for number in range(20_000)}]).encode())
    assert f"fields: {'x' * 40}..., 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 19,989 more" in many and len(many) < 400
    assert "record 1: not a JSON object" in message(b'["text"]')
    assert "record 1: half of a surrogate pair" in message(rb'[{"text": "half \ud83d"}]')
    assert "after record 0: not UTF-8" in message(b'[{"text": "x"}, {"text": "\xe9"}]')
    assert "holds no text" in message(b"[]")
    assert "line 1: not valid JSON" in message(b'{\n "text": "one object over several lines"}')


def test_an_error_early_in_a_large_file_does_not_read_all_of_it():
    asked = []

    def blocks():
        yield b'[{"text" "x"}, '
        for number in range(1000):
            asked.append(number)
            yield b'{"text": "y"}, ' * 100

    with pytest.raises(ValueError, match="Expecting ':'"):
        list(array_records(blocks()))
    assert len(asked) <= 1


def test_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + b'[{"text": "x"}]')
    assert list(documents([tmp_path / "a.json"])) == [("a.json#0", "x")]
