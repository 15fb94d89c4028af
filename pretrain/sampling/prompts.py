"""What a sample must contain: known tokens at known positions (prefix or infill)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from braid.data_pipeline.tokenizers import Tokenizer
from braid.kernels.errors import InputError

GAP = re.compile(r"\[\[(\d+)\]\]")


@dataclass(frozen=True)
class Prompt:
    """`tokens` int64 [N, L] where `known` bool [N, L] is True; anything elsewhere."""

    tokens: Tensor
    known: Tensor

    def to(self, device: torch.device) -> Prompt:
        return Prompt(self.tokens.to(device), self.known.to(device))


def no_prompt(num: int, length: int) -> Prompt:
    """Nothing is known: unconditional samples."""
    return Prompt(torch.zeros(num, length, dtype=torch.int64), torch.zeros(num, length, dtype=torch.bool))


def prefix_prompt(text: str, num: int, length: int, tokenizer: Tokenizer, *, wrapped: bool) -> Prompt:
    """`num` copies of a prompt whose tokens begin the row, after BOS where rows are wrapped."""
    return _pinned([[(text, 0)]] * num, length, tokenizer, wrapped=wrapped)


def infill_prompts(file: Path, num: int, length: int, tokenizer: Tokenizer, *, wrapped: bool) -> Prompt:
    """One prompt a line of a JSON-lines file, `num` samples of each: {"text": "def add(a, b):[[12]]return c"}.

    `[[n]]` is a gap of n tokens to fill; after the text the row is free.
    """
    rows = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(
            f"cannot read the infill file {file}: {error.strerror}", change="give an existing file"
        ) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(
                f"{file}, line {number}: not a JSON object with a text",
                found=line[:80],
                change='write {"text": "words [[5]] words"}; [[5]] is a gap of 5 tokens',
            ) from error
        pieces = GAP.split(text)  # text, gap, text, gap, ..., text
        row = [(piece, int(gap)) for piece, gap in zip(pieces[0::2], [*pieces[1::2], "0"], strict=True)]
        rows += [row] * num
    if not rows:
        raise InputError(f"the infill file {file} has no lines", change='write {"text": "words [[5]] words"} lines')
    return _pinned(rows, length, tokenizer, wrapped=wrapped)


def _pinned(rows: list[list[tuple[str, int]]], length: int, tokenizer: Tokenizer, *, wrapped: bool) -> Prompt:
    prompt = no_prompt(len(rows), length)
    start, end = (1, length - 1) if wrapped else (0, length)
    if wrapped:
        prompt.tokens[:, 0], prompt.tokens[:, -1] = tokenizer.bos_id, tokenizer.eos_id
        prompt.known[:, 0] = prompt.known[:, -1] = True
    for index, row in enumerate(rows):
        position = start
        for ids, gap in zip(tokenizer.encode_batch([text for text, _ in row]), [gap for _, gap in row], strict=True):
            if position + len(ids) + gap > end:
                raise InputError(
                    "the prompt does not fit into a row",
                    found=f"at least {position + len(ids) + gap - start} tokens, a row holds {end - start}",
                    change="shorten the prompt or its gaps, or train with a larger data.sequence_length",
                )
            prompt.tokens[index, position : position + len(ids)] = torch.from_numpy(np.asarray(ids, dtype=np.int64))
            prompt.known[index, position : position + len(ids)] = True
            position += len(ids) + gap
    return prompt
