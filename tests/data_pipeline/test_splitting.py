from __future__ import annotations

from dataclasses import dataclass

import pytest

from braid.data_pipeline.readers import Piece
from braid.data_pipeline.splitting import Split, choose_split, training_sample
from braid.kernels.errors import InputError


@dataclass
class Texts:
    """A source of the given documents; each is a list of parts, and of a group of its own unless `groups` names it."""

    documents: list[list[str]]
    groups: list[str] | None = None
    read: int = 0
    first_validation: int | None = None

    def pieces(self, first_file: int = 0):
        self.read = 0
        for number, parts in enumerate(self.documents):
            group = self.groups[number] if self.groups else f"a.txt#{number}"
            for part, text in enumerate(parts):
                self.read += 1
                last = part == len(parts) - 1
                yield Piece(0, number, part, f"a.txt#{number}", group, text, len(text.encode()), last)


def assigned(source: Texts, split: Split) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"train": [], "validation": []}
    for name, piece in split.assign(source.pieces()):
        assert piece.num_bytes == len(piece.text.encode())
        found[name].append(piece.text)
    return found


@pytest.mark.parametrize("num", [2, 3, 10, 60])
@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.5, 0.9])
def test_a_few_documents_are_shared_out_as_asked(num, fraction):
    source = Texts([[f"document {i:4}"] for i in range(num)])
    found = assigned(source, choose_split(source, fraction))
    wanted = min(max(1, fraction * num), num - 1)
    assert abs(len(found["validation"]) - wanted) <= 0.5
    assert sorted(found["train"] + found["validation"]) == sorted(text for (text,) in source.documents)


def test_groups_are_weighed_by_their_bytes():
    source = Texts([["x" * (1000 if i % 10 == 0 else 10)] for i in range(100)])
    validation = sum(map(len, assigned(source, choose_split(source, 0.2))["validation"]))
    total = sum(len(text) for (text,) in source.documents)
    assert abs(validation / total - 0.2) < 0.06


def test_many_documents_are_not_all_read_to_choose():
    source = Texts([["text"]] * 20_000)
    split = choose_split(source, 0.05)
    assert source.read == 640  # 32 expected validation documents
    found = assigned(source, split)
    assert abs(len(found["validation"]) - 1000) < 5 * (20_000 * 0.05 * 0.95) ** 0.5


def test_adding_documents_moves_none_between_the_splits():
    few, more = (Texts([[f"{i}"] for i in range(num)]) for num in (3000, 5000))
    before = set(assigned(few, choose_split(few, 0.05))["validation"])
    after = set(assigned(more, choose_split(more, 0.05))["validation"])
    assert before == {text for text in after if int(text) < 3000}


def test_groups_stay_together():
    groups = [f"group {i // 5}" for i in range(60)]
    source = Texts([[f"{i}"] for i in range(60)], groups)
    found = assigned(source, choose_split(source, 0.3))
    train, validation = ({int(text) // 5 for text in found[name]} for name in ("train", "validation"))
    assert train and validation and not train & validation


def test_one_group_of_several_documents_cannot_be_split():
    source = Texts([["a"], ["b"]], ["same", "same"])
    with pytest.raises(InputError, match="belong together"):
        choose_split(source, 0.1)


@pytest.mark.parametrize("num_parts", [1, 4])
@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.5, 0.95])
def test_a_single_document_is_cut_at_a_line_boundary(num_parts, fraction):
    lines = [f"line {i} é\n" for i in range(400)]
    step = -(-len(lines) // num_parts)
    source = Texts([["".join(lines[i : i + step]) for i in range(0, len(lines), step)]])
    found = assigned(source, choose_split(source, fraction))
    train, validation = "".join(found["train"]), "".join(found["validation"])
    assert train + validation == "".join(lines) and train.endswith("\n") and validation
    assert abs(len(validation) / len(train + validation) - fraction) < 2 / 400


def test_a_cut_document_ends_on_both_sides():
    source = Texts([["one\ntwo\nthree\n", "four\nfive\nsix\n"]])
    split = choose_split(source, 0.6)
    pieces = list(split.assign(source.pieces()))
    assert [(name, piece.last) for name, piece in pieces] == [
        ("train", True), ("validation", False), ("validation", True)
    ]  # fmt: skip
    assert len({piece.document for _, piece in pieces}) == 2


@pytest.mark.parametrize("text", ["no line end at all", "語語語語", "ab", "\n\n", "a\n", "\na", "one\ntwo"])
def test_short_and_odd_single_documents(text):
    source = Texts([[text]])
    found = assigned(source, choose_split(source, 0.05))
    assert "".join(found["train"]) and "".join(found["validation"])
    assert "".join(found["train"] + found["validation"]) == text


def test_a_single_character_cannot_be_cut():
    source = Texts([["語"]])
    with pytest.raises(InputError, match="too short") as caught:
        assigned(source, choose_split(source, 0.05))
    assert "3 bytes" in caught.value.found


def test_sample_is_training_text_within_its_limit_and_even():
    source = Texts([[f"{i:04} " + "x" * 95] for i in range(2000)])
    split = choose_split(source, 0.1)
    train = assigned(source, split)["train"]
    assert training_sample(source, split, 10**9) == train
    sample = training_sample(source, split, 40_000)
    assert set(sample) <= set(train) and sample == sorted(sample)
    assert 15_000 < sum(map(len, sample)) <= 40_000
    assert sample == training_sample(source, split, 40_000)
    first_half = sum(int(text[:4]) < 1000 for text in sample)
    assert abs(first_half / len(sample) - 0.5) < 0.15  # not the beginning of the corpus only
