"""One reference run a system for the whole session, and the table of what was compared."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent / "pretrain" / "training")]

from layouts import LAYOUTS, SYSTEMS, Layout, train  # noqa: E402
from training_fixtures import corpus, trainers  # noqa: E402, F401
from training_runs import Trainers  # noqa: E402

FOUND: dict = {}


@pytest.fixture(scope="session")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory):  # noqa: F811
    """`reference(system)`: the folder of its run in one process."""
    started = Trainers(corpus, tmp_path_factory.mktemp("reference"))

    @functools.cache
    def run(system: str) -> Path:
        return train(started, system, system.replace(" ", "-"), Layout(1))

    yield run
    started.close()


@pytest.fixture(scope="session")
def parity_table() -> dict:
    """(system, layout) -> Difference, printed at the end where `--parity FILE` was given."""
    return FOUND


def pytest_terminal_summary(terminalreporter, config):
    path = config.getoption("--parity")
    if not path or not FOUND:
        return
    systems = [system for system in SYSTEMS if any(found[0] == system for found in FOUND)]
    lines = ["| layout | processes | " + " | ".join(systems) + " |", "|---|---|" + "---|" * len(systems)]
    for layout in LAYOUTS:
        cells = [cell(FOUND.get((system, layout))) for system in systems]
        lines.append(f"| {layout} | {LAYOUTS[layout].ranks} | " + " | ".join(cells) + " |")
    text = "\n".join(lines)
    Path(path).write_text(text + "\n")
    terminalreporter.write_line(f"\n{text}\n\nwritten to {path}")


def cell(difference) -> str:
    """loss / gradient norm / gradient, or what is wrong."""
    if difference is None:
        return "-"
    numbers = f"{difference.loss:.0e} / {difference.norm:.0e} / {difference.gradient:.0e}"
    return numbers if difference.within_limits else f"**{'' if difference.noise_equal else 'noise, '}{numbers}**"
