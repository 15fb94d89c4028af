from __future__ import annotations

import io
import re
import time

from braid.data_pipeline.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(stream, *, enabled: bool = True, interval: float = 0.0) -> str:
    with Progress(enabled, stream=stream, interval=interval) as progress:
        progress.note("a note [with brackets]")
        progress.begin(1000)
        for step in range(1, 4):
            progress.update(documents=10 * step, num_bytes=10**6 * step, tokens=5000 * step, position=250 * step)
            time.sleep(0.02)
    return stream.getvalue()


def test_plain_lines():
    note, first, second, third = run(io.StringIO()).splitlines()
    assert note == "a note [with brackets]"
    # The first call is where measuring begins.
    assert first == "10 documents, 1.0 MB, 5,000 tokens, 0 tokens/s, time left unknown"
    pattern = r"30 documents, 3\.0 MB, 15,000 tokens, ([\d,]+) tokens/s, 0:00:00 left"
    speed = int(re.fullmatch(pattern, third)[1].replace(",", ""))
    assert 10_000 < speed <= 10_000 / 0.04


def test_not_more_often_than_the_interval():
    assert run(io.StringIO(), interval=60.0).splitlines() == ["a note [with brackets]"]


def test_silent():
    assert run(io.StringIO(), enabled=False) == ""


def test_time_left_counts_from_where_this_run_began():
    stream = io.StringIO()
    with Progress(stream=stream, interval=0.0) as progress:
        progress.begin(2000)
        progress.update(0, 0, 10**9, 1000)  # an earlier run had done half
        time.sleep(0.05)
        progress.update(1, 1, 10**9 + 50, 1001)  # one byte in 0.05 s: 999 bytes are left
    hours, minutes, seconds = map(int, re.search(r"(\d+):(\d+):(\d+) left", stream.getvalue()).groups())
    assert 45 <= hours * 3600 + minutes * 60 + seconds <= 300
    assert re.search(r", ([\d,]+) tokens/s, 0:", stream.getvalue())[1].replace(",", "").isdecimal()


def test_terminal_shows_a_bar():
    shown = run(Terminal())
    assert "a note [with brackets]" in shown and "30 documents, 3.0 MB, 15,000 tokens" in shown and "75%" in shown
