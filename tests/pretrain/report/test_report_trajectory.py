"""The trajectory of a report: the viewer replays what was recorded, hidden tokens stay hidden, large ones are cut."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from report_page import Page, page_of
from synthetic_run import STORY, trajectory, write_run

from braid.kernels.errors import InputError
from braid.pretrain.report.denoising import MAX_FRAMES, MAX_POSITIONS, SPECIAL, trajectory_of


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "joint-small", "ccdd")


def replayed(data: str) -> list[list[str | None]]:
    """What the viewer shows at each frame."""
    view = json.loads(data)
    pieces, frames = [None] * len(view["blanks"]), []
    for frame in view["frames"]:
        for position, piece in frame["set"]:
            pieces[position] = piece
        frames.append(list(pieces))
    return frames


def test_viewer_replays_every_frame():
    recorded = trajectory(num_steps=50)
    recorded["frames"][20]["pieces"][3] = " other"  # a token that is written, remasked and written again
    recorded["frames"][21]["pieces"][3] = None
    view = trajectory_of(recorded)
    expected = [[SPECIAL if piece == "" else piece for piece in frame["pieces"]] for frame in recorded["frames"]]
    assert replayed(view.data) == expected
    assert view.has_special
    assert view.cut == "" and view.num_frames == 51
    blanks = json.loads(view.data)["blanks"]
    final = recorded["frames"][-1]["pieces"]
    assert [
        re.sub(r"\S", "_", piece or SPECIAL) for piece in final
    ] == blanks  # same width, same line breaks, no letter


def test_stills_show_no_hidden_text_and_mark_what_is_new(run):
    recorded = trajectory()
    _, page = page_of(run)
    stills = page.boxes[1:5]
    whole = SPECIAL + STORY
    assert stills[-1] == whole
    for still, step in zip(stills, (16, 32, 48), strict=False):
        frame = recorded["frames"][step]
        hidden = sum(piece is None for piece in frame["pieces"])
        assert 0 < hidden < len(frame["pieces"])
        assert re.sub(r"[^_\s]", "_", still) == re.sub(r"\S", "_", whole)
        shown = re.findall(r"[^_\s]+", still)
        pieces = [piece or SPECIAL for piece in frame["pieces"] if piece is not None]
        assert "".join(shown) == "".join(re.sub(r"\s", "", piece) for piece in pieces)


def test_large_trajectories_are_cut_and_said_to_be():
    length, steps = MAX_POSITIONS + 500, 2 * MAX_FRAMES
    frames = [
        {"time": 1 - s / steps, "pieces": [f" w{s}" if (s + i) % 3 else None for i in range(length)]}
        for s in range(steps + 1)
    ]
    view = trajectory_of({"decoded_mask": "_", "frames": frames})
    assert f"the first {MAX_POSITIONS:,} of {length:,} positions" in view.cut
    assert f"{view.num_frames} of {steps + 1} steps" in view.cut
    assert len(view.data) < 1_000_000
    shown = replayed(view.data)
    assert shown[0] == frames[0]["pieces"][:MAX_POSITIONS] and shown[-1] == frames[-1]["pieces"][:MAX_POSITIONS]


def test_trajectory_of_one_frame_or_of_unequal_frames():
    one = {"frames": [{"time": 0.0, "pieces": ["a", None]}]}
    assert replayed(trajectory_of(one).data) == [["a", None]]
    assert trajectory_of(None) is None and trajectory_of({"frames": []}) is None
    with pytest.raises(InputError, match="differ in length"):
        trajectory_of({"frames": [{"pieces": ["a"]}, {"pieces": ["a", "b"]}]})


@pytest.mark.slow
def test_viewer_plays_to_the_end_in_a_browser(run, tmp_path):
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((path for path in map(shutil.which, names) if path), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    text, _ = page_of(run)
    page = tmp_path / "play.html"
    page.write_text(text.replace("</body>", '<script>document.querySelector("button").click();</script></body>'))
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    quiet += ["--disable-background-networking", "--disable-component-update"]
    command = [
        browser,
        *quiet,
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=15000",
        "--dump-dom",
        page.as_uri(),
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    played = Page(dom)
    assert played.boxes[0] == SPECIAL + STORY
    assert "step 64 of 64" in dom and ">Play</button>" in dom
