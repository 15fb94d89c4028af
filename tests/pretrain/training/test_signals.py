"""Real signals to real processes: noted, shared by all ranks at one step, and the old handlers back afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ports import free_port

from braid.parallel.data_parallel import World
from braid.pretrain.training.outcome import clear_outcome, read_outcome, write_outcome
from braid.pretrain.training.signals import SAME_KEY_PRESS_S, SIGNALS, StopRequest

# Trains for ever: each step writes its number, and the step after which the poll answered is the last line.
LOOP = """
import sys, time
from braid.parallel.data_parallel import init_world
from braid.pretrain.training.signals import StopRequest
world = init_world("cpu", 60)
with StopRequest(deadline_s=float(sys.argv[2]) if len(sys.argv) > 2 else None) as stop, open(sys.argv[1], "w") as log:
    step, reason = 0, None
    while reason is None:
        step += 1
        time.sleep(0.01 if world.rank == 0 else 0.001)
        reason = stop.poll(world)
        print(step, reason, file=log, flush=True)
world.close()
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_the_old_handler_comes_back(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in SIGNALS]
    with StopRequest() as stop:
        assert stop.poll(World.single()) is None
        os.kill(os.getpid(), number)
        assert stop.poll(World.single()) == number.name
        assert stop.poll(World.single()) == number.name, "the answer stays"
    assert [signal.getsignal(n) for n in SIGNALS] == before
    with pytest.raises(RuntimeError), StopRequest():
        raise RuntimeError
    assert [signal.getsignal(n) for n in SIGNALS] == before
    with StopRequest() as stop:
        assert stop.poll(World.single()) is None, "a new request knows nothing of the last"


def test_a_second_key_press_interrupts_and_an_echo_of_the_first_does_not() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.poll(World.single()) == "SIGINT"
        time.sleep(SAME_KEY_PRESS_S + 0.05)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.poll(World.single()) == "SIGTERM", "a scheduler may repeat itself as it likes"


def test_the_deadline() -> None:
    with StopRequest(deadline_s=0.2) as stop:
        assert stop.poll(World.single()) is None
        time.sleep(0.25)
        assert stop.poll(World.single()) == "deadline"
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.poll(World.single()) == "SIGUSR1", "what came from outside is named first"


def start_ranks(tmp_path: Path, size: int, *arguments: str) -> list[subprocess.Popen]:
    port = free_port()
    peers = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", LOOP, str(tmp_path / f"rank-{rank}"), *arguments],
            env={**os.environ, **peers, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(size)
    ]


def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path: Path) -> None:
    ranks = start_ranks(tmp_path, 3)
    logs = [tmp_path / f"rank-{rank}" for rank in range(3)]
    deadline = time.monotonic() + 60
    while not all(log.exists() and len(log.read_text().splitlines()) > 3 for log in logs):
        assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks)
        time.sleep(0.01)
    ranks[2].send_signal(signal.SIGUSR1)
    assert [rank.wait(timeout=30) for rank in ranks] == [0, 0, 0]
    [first, second, third] = [log.read_text().splitlines() for log in logs]
    assert first == second == third and first[-1].endswith(" SIGUSR1") and first[-2].endswith(" None")


def test_a_deadline_stops_all_ranks_after_the_same_step(tmp_path: Path) -> None:
    ranks = start_ranks(tmp_path, 2, "0.3")
    assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]
    [first, second] = [(tmp_path / f"rank-{rank}").read_text().splitlines() for rank in range(2)]
    assert first == second and first[-1].endswith(" deadline")


def test_the_outcome_is_written_read_and_forgotten(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert read_outcome(run_dir) is None
    write_outcome(run_dir, "failed", 4, None, "loss is nan", rank=3)
    write_outcome(run_dir, "preempted", 3, 120, "stopped by SIGTERM")
    outcome = read_outcome(run_dir)
    assert {k: outcome[k] for k in ("status", "exit_code", "step", "message", "rank")} == {
        "status": "failed", "exit_code": 4, "step": None, "message": "loss is nan", "rank": 3,
    }, "the first to say is believed"  # fmt: skip
    assert outcome["process"] == os.getpid() and abs(outcome["time"] - time.time()) < 60
    assert [path.name for path in run_dir.iterdir()] == ["outcome.json"]
    assert json.loads((run_dir / "outcome.json").read_text()) == outcome
    clear_outcome(run_dir)
    clear_outcome(run_dir)
    assert read_outcome(run_dir) is None
    with pytest.raises(AssertionError):
        write_outcome(run_dir, "finished", 0, 1, "")


def test_an_outcome_that_cannot_be_written_does_not_hide_the_error(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    write_outcome(tmp_path / "file" / "run", "failed", 4, 1, "the disk is full")
    assert "outcome.json could not be written" in capsys.readouterr().err


def test_the_outcome_can_be_read_without_torch() -> None:
    check = "import sys, braid.pretrain.training.outcome; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
