"""The records of a JSON array, one after the other: only the one being read is in memory.

With the standard library's decoder, so a record of a .json file means what it would on a line of a .jsonl file. (ijson
is no faster, and its compiled parser makes "?" of half a surrogate pair without a word.)
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator

SPACE = re.compile(r"[ \t\n\r]*")
LOOKAHEAD = 16
"""An error this near the end of what has been read (a cut-off word, number or escape) may be none with more text."""


def array_records(blocks: Iterator[bytes]) -> Iterator[object]:
    """The elements of the array that `blocks` hold. Raises ValueError (UnicodeDecodeError is one) or RecursionError."""
    text = _Text(blocks)
    if text.take() != "[":
        raise ValueError("it does not begin with `[`")
    if text.peek() == "]":
        text.take()
    else:
        while True:
            yield text.value()
            if (separator := text.take()) == "]":
                break
            if separator != ",":
                raise ValueError(f"`{separator}` stands where `,` or `]` should" if separator else "it is cut off")
    if rest := text.peek():
        raise ValueError(f"`{rest}` stands after the array")


class _Text:
    """The text not read yet, of which as much is in memory as the next value needs."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._utf8 = blocks, codecs.getincrementaldecoder("utf-8")()
        self._decode = json.JSONDecoder().raw_decode
        self._buffer, self._start = "", 0

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while (start := SPACE.match(self._buffer, self._start).end()) == len(self._buffer):
            self._start = start
            if not self._more():
                return ""
        self._start = start
        return self._buffer[start]

    def take(self) -> str:
        """`peek`, and go on after it."""
        character = self.peek()
        self._start += len(character)
        return character

    def value(self) -> object:
        """The value that begins here."""
        self.peek()
        while True:
            try:
                value, self._start = self._decode(self._buffer, self._start)
                return value
            except json.JSONDecodeError as error:
                unfinished = error.pos > len(self._buffer) - LOOKAHEAD or error.msg.startswith("Unterminated string")
                # As much again as there is, so that a long value is not tried at every block of it.
                if not unfinished or not self._more(len(self._buffer) - self._start):
                    raise ValueError(f"{error.msg}, {error.pos} characters into it") from error

    def _more(self, wanted: int = 1) -> bool:
        """Read at least so many bytes more; False when there are none."""
        parts, size = [self._buffer[self._start :]], 0
        while size < wanted and (block := next(self._blocks, None)) is not None:
            parts.append(self._utf8.decode(block))
            size += len(block)
        if not size:
            parts.append(self._utf8.decode(b"", final=True))
        self._buffer, self._start = "".join(parts), 0
        return size > 0
