"""Which packings go with what, and the name a field had before."""

from __future__ import annotations

import pytest

from braid.pretrain.config.load import dump_config, load_config
from braid.pretrain.config.objectives import OBJECTIVES
from braid.pretrain.config.packing import DOCUMENT_PACKINGS, HONOURS_PADDING, HONOURS_SEGMENTS
from braid.pretrain.config.validate import problems


def about_packing(recipe: str, *overrides: str) -> list[str]:
    return [p.what for p in problems(load_config(recipe, list(overrides)), world_size=1) if "data." in str(p)]


@pytest.mark.parametrize("packing", DOCUMENT_PACKINGS)
def test_an_objective_honours_segments_or_refuses(packing):
    recipes = {"co_ladd": "tiny_co_ladd", "di_ladd": "tiny_di_ladd"}
    for name in OBJECTIVES:
        found = about_packing(recipes.get(name, f"tiny_{name}"), f"data.packing={packing}")
        refused = any("would look" in what for what in found)
        assert refused == (name not in (HONOURS_SEGMENTS if packing == "best_fit" else HONOURS_PADDING)), (name, found)


def test_an_encoder_that_reads_the_row_does_not_read_several_documents():
    reading = ["objective.encoder.kind=huggingface", "objective.encoder.path=model"]
    assert about_packing("tiny_ccdd", *reading, "data.packing=best_fit") == [
        "the frozen encoder would look across documents: it reads the row as one text"
    ]
    assert not about_packing("tiny_ccdd", *reading, "data.packing=document")


@pytest.mark.parametrize(
    "packing, refused",
    [
        ("wrap", {"cut", "skip"}),
        ("stream", {"cut", "skip"}),
        ("pairs", set()),
        ("document", set()),
        ("best_fit", set()),
        ("paragraph", set()),
    ],
)
def test_what_is_too_long(packing, refused):
    for oversized in ("auto", "cut", "skip", "stop"):
        found = about_packing("tiny_mdlm", f"data.packing={packing}", f"data.oversized={oversized}")
        assert any("data.oversized" in what for what in found) == (oversized in refused), (oversized, found)
    assert any("data.oversized" in what for what in about_packing("tiny_mdlm", "data.oversized=truncate"))


def test_how_much_of_a_target_is_kept():
    for options, is_wrong in (
        (("packing=pairs", "oversized=cut", "target_tokens=4"), False),
        (("packing=pairs", "oversized=skip", "target_tokens=4"), True),
        (("packing=document", "oversized=cut", "target_tokens=4"), True),
        (("packing=pairs", "oversized=cut", "target_tokens=1"), True),
        (("packing=pairs", "oversized=cut", "sequence_length=16", "target_tokens=15"), True),
    ):
        found = about_packing("tiny_mdlm", *(f"data.{option}" for option in options))
        assert any("data.target_tokens" in what for what in found) == is_wrong, (options, found)


def test_the_former_name_of_oversized(tmp_path):
    for packing, value in (("pairs", "skip"), ("wrap", "stop")):
        config = load_config("tiny_mdlm", [f"data.packing={packing}", f"data.oversized={value}"])
        old = tmp_path / "config.yaml"
        old.write_text(dump_config(config).replace("oversized:", "long_pairs:"))
        assert "long_pairs" in old.read_text() and load_config(old) == config
        assert load_config("tiny_mdlm", [f"data.packing={packing}", f"data.long_pairs={value}"]) == config
        assert not about_packing(str(old))
