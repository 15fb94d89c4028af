"""Which packings an objective can be trained on: rows of documents have padding that must not be seen, and with
`best_fit` documents that must not see each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from braid.pretrain.config.check import Check

if TYPE_CHECKING:
    from braid.pretrain.config.schema import Config

DOCUMENT_PACKINGS = ("document", "best_fit", "paragraph")
HONOURS_PADDING = ("ar", "ccdd", "duo", "elf", "gidd", "mdlm", "replaid")
HONOURS_SEGMENTS = ("ar", "ccdd", "duo", "gidd", "mdlm", "replaid")
READS_THE_ROW = ("huggingface", "trained")
"""Kinds of encoders whose representation of a token depends on the text around it."""


def check_packing(check: Check, config: Config) -> None:
    """Refuse rows of documents for an objective that would look at padding or across documents."""
    objective, packing = config.objective, config.data.packing
    found = f"objective.name = {objective.name!r}, data.packing = {packing!r}"
    if packing in DOCUMENT_PACKINGS and objective.name not in HONOURS_PADDING:
        why = "its spans are cut from full rows" if objective.name == "t5" else "its latents are about a whole row"
        check.add(
            f"objective.name = {objective.name!r} would look at padding: {why}",
            found,
            f"data.packing=wrap or stream, or one of the objectives {', '.join(HONOURS_PADDING)}",
        )
    elif packing == "best_fit" and objective.name not in HONOURS_SEGMENTS:
        check.add(
            f"objective.name = {objective.name!r} would look across documents: the tokens before its text see it all",
            found,
            f"data.packing=document or paragraph, or one of the objectives {', '.join(HONOURS_SEGMENTS)}",
        )
    elif packing == "best_fit" and objective.name == "ccdd" and objective.encoder.kind in READS_THE_ROW:
        check.add(
            "the frozen encoder would look across documents: it reads the row as one text",
            f"{found}, objective.encoder.kind = {objective.encoder.kind!r}",
            "data.packing=document, or objective.encoder.kind=table or embeddings",
        )
