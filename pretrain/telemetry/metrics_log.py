"""`metrics.jsonl`: one JSON object a line, appended as training goes.

Each line is written to the file at once, so it can be followed live. A run that is killed may have written lines its
last checkpoint knows nothing of, and half a line. The checkpoint therefore holds the length of the file (`offset`), and
the resumed run cuts the file there before it appends: in the end no step is there twice, and the file is the one an
uninterrupted run would have written. The cut is one `ftruncate`: there is no instant at which the file is not readable.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from braid.kernels.errors import InputError


class MetricsLog:
    """The records of one run.

    A write that fails (full disk) is reported once, kept in memory and tried again with the next one.

    Args:
        path: the file; its folder exists.
        offset: `offset` of the checkpoint the run continues from; None or 0 for a run that starts at its first step.
            What the file has beyond it is dropped, and said.
        enabled: False on the ranks that do not write; every call is then nothing.
        report: told in one line about dropped or lost lines and failed writes.
    """

    def __init__(
        self, path: Path, offset: int | None = None, *, enabled: bool = True, report: Callable[[str], None] = print
    ) -> None:
        self.path, self.enabled, self._report = path, enabled, report
        self._unwritten = b""
        self._failing = False
        if enabled:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._size = self._cut(offset or 0)

    def _cut(self, offset: int) -> int:
        """Shorten the file to the last whole line within `offset` bytes; returns its new size."""
        content = self.path.read_bytes()
        if len(content) < offset:
            self._report(
                f"{self.path}: {len(content)} bytes are there of the {offset} when the checkpoint was saved; "
                "the lines in between are lost, the run goes on"
            )
        kept = content[:offset].rfind(b"\n") + 1
        if kept < len(content):
            os.ftruncate(self._file, kept)
            os.fsync(self._file)
            num_lines, num_bytes = content[kept:].count(b"\n"), len(content) - kept
            self._report(
                f"{self.path}: dropped {num_lines} lines ({num_bytes} bytes) written after the checkpoint; "
                "their steps are done again"
            )
        return kept

    def write(self, record: dict[str, Any]) -> None:
        """Append one record. Numbers that are not finite become null."""
        if not self.enabled:
            return
        line = json.dumps(_finite(record), allow_nan=False, separators=(",", ":"))
        self._unwritten += line.encode() + b"\n"
        try:
            while self._unwritten:
                written = os.write(self._file, self._unwritten)
                self._size += written
                self._unwritten = self._unwritten[written:]
            self._failing = False
        except OSError as error:
            if not self._failing:
                self._report(f"{self.path} cannot be written ({error}); its lines are kept in memory and tried again")
            self._failing = True

    @property
    def offset(self) -> int:
        """Length of the file in bytes once all is written. What is on file by then is durable, so a checkpoint may
        hold the number."""
        if not self.enabled:
            return 0
        try:
            os.fsync(self._file)
        except OSError as error:
            self._report(f"{self.path} could not be made durable: {error}")
        return self._size + len(self._unwritten)

    def close(self) -> None:
        """No more records."""
        if self.enabled:
            os.close(self._file)
            self.enabled = False


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics file, of a running or killed run too: a torn last line is left out.

    Raises:
        InputError: there is no such file, or a whole line is no JSON object.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError as error:
        raise InputError(f"there is no {path}", change="give the run.dir of a training run") from error
    lines.pop()  # empty after the last newline, or torn
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            found = line[:80].decode(errors="replace")
            raise InputError(f"{path}: line {number} is no JSON object", found=found, change="remove that line")
        records.append(record)
    return records


def _finite(value: Any) -> Any:
    """The same, with null where JSON has no number: NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
