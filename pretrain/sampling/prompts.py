"""What a sample must contain, known tokens at known positions (prefix or infill), and what its latents are to say."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from braid.data_pipeline.loader import validation_batches
from braid.data_pipeline.packing import Rows
from braid.data_pipeline.tokenizers import Tokenizer
from braid.kernels.errors import InputError

GAP = re.compile(r"\[\[(\d+)\]\]")


@dataclass(frozen=True)
class Prompt:
    """`tokens` int64 [N, L] where `known` bool [N, L] is True; anything elsewhere."""

    tokens: Tensor
    known: Tensor
    described: Tensor | None = None
    """Whole rows, int64 [N, L], whose latents LADD's sequential samplers show the network instead of drawing some: what
    the text half can do at best, and no sample of the model."""

    def to(self, device: torch.device) -> Prompt:
        return Prompt(*(each if each is None else each.to(device) for each in self._fields()))

    def rows(self, start: int, stop: int) -> Prompt:
        """Those of some samples."""
        return Prompt(*(each if each is None else each[start:stop] for each in self._fields()))

    def _fields(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.tokens, self.known, self.described


def no_prompt(num: int, length: int) -> Prompt:
    """Nothing is known: unconditional samples."""
    return Prompt(torch.zeros(num, length, dtype=torch.int64), torch.zeros(num, length, dtype=torch.bool))


def prefix_prompt(text: str, num: int, length: int, tokenizer: Tokenizer, *, packing: str) -> Prompt:
    """`num` copies of a prompt whose tokens begin the row, after BOS where rows are wrapped. Where rows are pairs it is
    the source, whole, and EOS follows it."""
    return _pinned([[(text, 0)]] * num, length, tokenizer, packing)


def described_prompt(rows: Rows, num: int) -> Prompt:
    """No token is known, and the latents are those of `num` rows spread over a corpus, some of them again where it has
    fewer."""
    batches = validation_batches(rows, num, num, 0, 1)
    tokens = torch.cat([batch.tokens for batch in batches])
    tokens = tokens.repeat(-(-num // len(tokens)), 1)[:num]
    return replace(no_prompt(*tokens.shape), described=tokens)


def source_prompt(rows: Rows, num: int) -> Prompt:
    """The sources of `num` pairs spread over the rows of a corpus of pairs."""
    [batch] = validation_batches(rows, num, num, 0, 1)
    return Prompt(batch.tokens, batch.condition)


def infill_prompts(file: Path, num: int, length: int, tokenizer: Tokenizer, *, packing: str) -> Prompt:
    """One prompt a line of a JSON-lines file, `num` samples of each: {"text": "def add(a, b):[[12]]return c"}.

    `[[n]]` is a gap of n tokens to fill; after the text the row is free.
    """
    rows = []
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # JSON texts may hold what splitlines would split at
    except UnicodeDecodeError as error:
        raise InputError(
            f"the infill file {file} is not UTF-8 text", found=str(error), change="save it in UTF-8"
        ) from error
    except OSError as error:
        raise InputError(
            f"cannot read the infill file {file}: {error.strerror}", change="give an existing file"
        ) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            if not isinstance(text, str):
                raise TypeError
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
    return _pinned(rows, length, tokenizer, packing)


def prefix_lengths(prompt: Prompt) -> Tensor:
    """How many tokens each row begins with, int64 [N]: all that a model that writes from left to right can be given.

    The EOS that closes a wrapped row does not count; such a model writes its own.

    Raises:
        InputError: something else is known.
    """
    known = prompt.known.clone()
    if known[:, -1].all() and not known.all():
        known[:, -1] = False
    if not torch.equal(known, known.cumprod(1).bool()):
        raise InputError(
            "an AR model cannot infill: it only continues a prefix", change="use --prompt, or a diffusion model"
        )
    return known.sum(1)


def _pinned(rows: list[list[tuple[str, int]]], length: int, tokenizer: Tokenizer, packing: str) -> Prompt:
    prompt = no_prompt(len(rows), length)
    start = int(packing not in ("stream", "paragraph"))
    end = length - int(packing != "stream")
    if packing in ("pairs", "document", "best_fit"):
        prompt.tokens[:, 0], prompt.known[:, 0] = tokenizer.bos_id, True
    if packing == "wrap":
        prompt.tokens[:, 0], prompt.tokens[:, -1] = tokenizer.bos_id, tokenizer.eos_id
        prompt.known[:, 0] = prompt.known[:, -1] = True
    for index, row in enumerate(rows):
        for text, _ in row:
            _check_unicode(text)
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
        if packing == "pairs":
            prompt.tokens[index, position], prompt.known[index, position] = tokenizer.eos_id, True
    return prompt


def _check_unicode(text: str) -> None:
    """Half a surrogate pair, as the shell's stray bytes and JSON's escapes can make, is no text to tokenise."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError("the prompt is not UTF-8 text", found=ascii(text[:80]), change="write it in UTF-8") from error
