"""Real offline W&B runs in child processes; what they wrote is read back from W&B's own files."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pb = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason="the wandb package is optional")

BLOCK = 32768

RUN = """
import os, signal, sys, time
from pathlib import Path
from braid.pretrain.config.schema import Config, TelemetryConfig, TrainingConfig
from braid.pretrain.telemetry import wandb_sink
from braid.pretrain.telemetry.wandb_sink import WandbSink

def start(folder, mode="offline", **fields):
    config = Config(telemetry=TelemetryConfig(wandb=mode, wandb_project="a-project"), training=TrainingConfig(**fields))
    return WandbSink.start(config, Path(folder), report=lambda message: print("REPORT", message, flush=True))

def record(step, split="train"):
    by_time = [0.5, None, step]
    terms = {"token": step / 3, "latent": None}
    return {"step": step, "split": split, "loss": step / 7, "terms": terms, "loss_by_time": by_time, "mfu": None}
"""


def in_child(body: str, *arguments: object, timeout: float = 90, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, "-c", RUN + body, *map(str, arguments)],
        env={**kept, "WANDB_SILENT": "true", **environment}, capture_output=True, text=True, timeout=timeout,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def records_of(path: Path) -> Iterator[Any]:
    """Protobuf records of a .wandb file.

    The file is a log of LevelDB's kind: a 7-byte head, then blocks of 32 KiB of fragments (crc32 u32, length u16, type
    u8, payload), type 1 whole, 2 first, 3 middle, 4 last; fewer than 7 bytes at a block's end are padding. A killed
    writer leaves a torn end.
    """
    content = path.read_bytes()
    assert struct.unpack_from("<4sHB", content) == (b":W&B", 0xBEE1, 0)
    position, parts = 7, []
    while position + 7 <= len(content):
        room = BLOCK - position % BLOCK
        if room < 7:
            position += room
            continue
        checksum, length, kind = struct.unpack_from("<IHB", content, position)
        payload = content[position + 7 : position + 7 + length]
        if kind == 0 or len(payload) < length:
            return
        assert checksum == zlib.crc32(bytes([kind]) + payload)
        position += 7 + length
        parts = [payload] if kind in (1, 2) else [*parts, payload]
        if kind in (1, 4):
            record = pb.Record()
            record.ParseFromString(b"".join(parts))
            yield record


def values_of(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def read_run(path: Path) -> dict[str, Any]:
    """Id, project, name, config, history by step (values merged as W&B does) and exit code of one .wandb file."""
    found: dict[str, Any] = {"history": {}, "config": {}, "exit": None}
    for record in records_of(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found |= {"id": record.run.run_id, "project": record.run.project, "name": record.run.display_name}
            found["config"] |= values_of(record.run.config.update)
        elif kind == "history":
            values = values_of(record.history.item)
            found["history"].setdefault(values["_step"], {}).update(values)
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found


def runs_below(folder: Path) -> list[dict[str, Any]]:
    return [read_run(path) for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))]


def test_an_offline_run_and_its_continuation(tmp_path: Path) -> None:
    folder = tmp_path / "my-run"
    folder.mkdir()
    first = in_child(
        """
sink = start(sys.argv[1], steps=5)
for step in range(1, 6):
    sink.write(record(step))
sink.write(record(5, "validation"))
sink.close(3)
sink.close(0)
sink.write(record(6))
""",
        folder,
    )
    assert first.returncode == 0, first.stderr
    assert "REPORT" not in first.stdout
    time.sleep(1.1)  # W&B names its folders by the second
    second = in_child(
        "sink = start(sys.argv[1], steps=9)\nfor step in range(6, 10): sink.write(record(step))\nsink.close()", folder
    )
    assert second.returncode == 0, second.stderr

    before, after = runs_below(folder)
    assert before["id"] == after["id"] == (folder / "wandb_id").read_text().strip() and len(after["id"]) == 8
    assert before["project"] == after["project"] == "a-project" and before["name"] == "my-run"
    assert before["config"]["training"]["steps"] == 5 and after["config"]["training"]["steps"] == 9
    assert before["config"]["objective"]["name"] == "mdlm" and before["config"]["telemetry"]["wandb"] == "offline"
    assert list(before["history"]) == [1, 2, 3, 4, 5] and list(after["history"]) == [6, 7, 8, 9]
    for step, values in {**before["history"], **after["history"]}.items():
        logged = {key: value for key, value in values.items() if not key.startswith("_")}
        expected = {"loss": step / 7, "terms/token": step / 3, "loss_by_time/0": 0.5, "loss_by_time/2": step}
        splits = ("train", "validation") if step == 5 else ("train",)
        assert logged == {f"{split}/{key}": value for split in splits for key, value in expected.items()}
    assert before["exit"] == 3 and after["exit"] == 0


def test_a_killed_run_leaves_a_readable_prefix_and_keeps_its_id(tmp_path: Path) -> None:
    killed = in_child(
        """
sink = start(sys.argv[1])
for step in range(1, 3001):
    sink.write(record(step))
time.sleep(0.5)
os.kill(os.getpid(), signal.SIGKILL)
""",
        tmp_path,
    )
    assert killed.returncode == -signal.SIGKILL
    [found] = runs_below(tmp_path)
    steps = list(found["history"])
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 1000
    assert all(values["train/loss"] == step / 7 for step, values in found["history"].items())
    identity = (tmp_path / "wandb_id").read_text()
    again = in_child("start(sys.argv[1]).close()", tmp_path)
    assert again.returncode == 0 and (tmp_path / "wandb_id").read_text() == identity


def test_the_death_of_its_service_does_not_stop_the_run(tmp_path: Path) -> None:
    done = in_child(
        """
import subprocess
sink = start(sys.argv[1])
sink.write(record(1))
for child in subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True).stdout.split():
    try:
        os.kill(int(child), signal.SIGKILL)
    except ProcessLookupError:
        pass  # pgrep itself
time.sleep(0.3)
for step in range(2, 30):
    sink.write(record(step))
    time.sleep(0.02)
sink.close()
print("STEPS DONE")
""",
        tmp_path,
    )
    reports = [line for line in done.stdout.splitlines() if line.startswith("REPORT")]
    assert done.returncode == 0 and "STEPS DONE" in done.stdout
    assert len(reports) == 1 and "W&B failed" in reports[0] and "goes on without it" in reports[0]


def test_an_unreachable_server_means_offline(tmp_path: Path) -> None:
    key = "0123456789abcdef" * 2 + "01234567"
    done = in_child(
        "wandb_sink.INIT_TIMEOUT_S = 1\nsink = start(sys.argv[1], 'online')\nsink.write(record(1))\nsink.close()",
        tmp_path,
        WANDB_BASE_URL="http://127.0.0.1:9",
        WANDB_API_KEY=key,
    )
    assert done.returncode == 0, done.stderr
    assert "REPORT W&B did not start (CommError" in done.stdout and "logging offline instead" in done.stdout
    [found] = runs_below(tmp_path)
    assert found["history"][1]["train/loss"] == 1 / 7 and found["id"] == (tmp_path / "wandb_id").read_text().strip()


def test_where_it_cannot_even_log_offline_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "wandb").touch()  # where W&B wants its folder
    done = in_child("sink = start(sys.argv[1])\nsink.write(record(1))\nsink.close()", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "REPORT W&B did not start (NotADirectoryError" in done.stdout
    assert "REPORT the run goes on without W&B" in done.stdout


FAILS = """
from braid.kernels.errors import BraidError
try:
    start(sys.argv[1], sys.argv[2])
except BraidError as error:
    print(error)
else:
    sys.exit("no error")
"""


def test_online_without_a_key_is_an_error(tmp_path: Path) -> None:
    done = in_child(FAILS, tmp_path, "online", HOME=str(tmp_path), NETRC=str(tmp_path / "none"))
    assert done.returncode == 0, done.stderr
    assert "W&B refuses" in done.stdout and "wandb login" in done.stdout and "telemetry.wandb=offline" in done.stdout


NAMESPACE = "module_from_spec(ModuleSpec('wandb', None, is_package=True))"


@pytest.mark.parametrize("stands_in", ["None", NAMESPACE])
def test_without_the_package_it_says_what_to_install(tmp_path: Path, stands_in: str) -> None:
    """Not installed; and not installed with a folder of that name in the way, which Python imports as an empty one."""
    imports = "from importlib.machinery import ModuleSpec\nfrom importlib.util import module_from_spec\n"
    done = in_child(f"{imports}sys.modules['wandb'] = {stands_in}" + FAILS, tmp_path, "offline")
    assert done.returncode == 0, done.stderr
    assert "wandb is needed here" in done.stdout and "pip install 'braid-lm[wandb]'" in done.stdout


def test_off_touches_nothing(tmp_path: Path) -> None:
    body = """
online = Config(telemetry=TelemetryConfig(wandb="online"))
for sink in start(sys.argv[1], "off"), WandbSink.start(online, Path("x"), enabled=False):
    sink.write(record(1))
    sink.close()
sys.exit("wandb" in sys.modules)
"""
    assert in_child(body, tmp_path).returncode == 0 and not list(tmp_path.iterdir())
