"""What a run directory holds, read without torch. A file that is absent is None or empty; a damaged one is an error."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from braid.kernels.errors import InputError

NUM_TIME_BUCKETS = 10
NESTED = ("split", "terms", "loss_by_time", "sources")
FILES = ("config.yaml", "metrics.jsonl", "evaluation.json", "trajectory.json", "schedule.json", "summary.json")


@dataclass(frozen=True)
class Columns:
    """The metrics of one split as columns: float64 arrays [lines], NaN where a line has no finite value of it.

    Loss terms are the columns `terms.<name>`, the loss by time bucket `time.0` ... `time.9`, what is known of a source
    of a mixture `sources.<name>.<what>`.
    """

    data: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.data.values()), ()))

    def __getitem__(self, name: str) -> np.ndarray:
        return self.data.get(name, np.full(len(self), np.nan))

    def has(self, name: str) -> bool:
        """Whether any line has a finite value of `name`."""
        return bool(np.isfinite(self[name]).any())

    def last(self, name: str) -> float | None:
        """The last finite value of `name`; None where there is none."""
        finite = self[name][np.isfinite(self[name])]
        return float(finite[-1]) if finite.size else None

    @property
    def terms(self) -> list[str]:
        """Names of the loss terms, in the order they first appear."""
        return [name.removeprefix("terms.") for name in self.data if name.startswith("terms.")]

    @property
    def sources(self) -> list[str]:
        """Names of the sources of a mixture."""
        return list(dict.fromkeys(name.split(".")[1] for name in self.data if name.startswith("sources.")))

    @property
    def by_time(self) -> np.ndarray:
        """Loss by time bucket, [lines, 10]."""
        return np.stack([self[f"time.{index}"] for index in range(NUM_TIME_BUCKETS)], axis=1)


@dataclass(frozen=True)
class Run:
    """Everything the report shows of one run directory."""

    folder: Path
    config_text: str
    config: dict[str, Any]
    train: Columns
    validation: Columns
    unfinished_line: bool
    """The last line of metrics.jsonl was still being written; it is left out."""
    evaluation: dict[str, Any] | None
    samples: list[dict[str, Any]]
    """Every sample, newest step first, in the order of the files."""
    trajectory: dict[str, Any] | None
    schedule: dict[str, Any] | None
    environment: dict[str, Any] | None
    summary: dict[str, Any] | None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def objective(self) -> str | None:
        section = self.config.get("objective")
        configured = section.get("name") if isinstance(section, dict) else None
        return configured or (self.evaluation or {}).get("objective")

    @property
    def headline(self) -> str:
        """Name of the figure that validation follows, the objective's first; empty before there is one."""
        return next(iter(self.validation.terms), "")

    def unit(self, figure: str) -> str:
        """`nats` or `value`, of one of the objective's figures: as the evaluation says, or before there is one, by
        whether validation gives bits per byte, which only nats have."""
        units = {each.get("name"): each.get("unit", "nats") for each in (self.evaluation or {}).get("figures") or []}
        return units.get(figure) or ("nats" if self.validation.has("bits_per_byte") else "value")

    def setting(self, section: str, key: str) -> Any:
        """`config[section][key]`, None where the resolved configuration does not say."""
        values = self.config.get(section)
        return values.get(key) if isinstance(values, dict) else None


def read_run(folder: Path) -> Run:
    """Read a run directory. Raises InputError when it is missing or one of its files is damaged (file and line)."""
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise InputError("The run directory does not exist", found=str(folder), change="give the run.dir of a run")
    config_text, config = _config(folder / "config.yaml")
    train, validation, unfinished = _metrics(folder / "metrics.jsonl")
    return Run(
        folder=folder,
        config_text=config_text,
        config=config,
        train=train,
        validation=validation,
        unfinished_line=unfinished,
        evaluation=_json_object(folder / "evaluation.json"),
        samples=_samples(folder / "samples"),
        trajectory=_json_object(folder / "trajectory.json"),
        schedule=_json_object(folder / "schedule.json"),
        environment=_json_object(folder / "environment.json"),
        summary=_json_object(folder / "summary.json"),
    )


def holds_a_run(folder: Path) -> bool:
    """Whether `folder` has any of the files a run, an evaluation or a demo leaves."""
    return (folder / "samples").is_dir() or any((folder / name).is_file() for name in FILES)


def _config(path: Path) -> tuple[str, dict[str, Any]]:
    if not path.is_file():
        return "", {}
    text = path.read_text(encoding="utf-8")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError("config.yaml is not valid YAML", found=f"{path}: {error}", change="restore the file") from None
    if not isinstance(config, dict):
        raise InputError("config.yaml is not a mapping", found=str(path), change="restore the file")
    return text, config


def _json_object(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise _damaged(path, f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise _damaged(path, f"{path}: {type(value).__name__} instead of an object")
    return value


def _json_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """The objects of a JSON-lines file. A last line without newline that does not parse yields None: a writer was
    stopped, or is still at work, in the middle of it."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                if not line.endswith("\n"):
                    yield None
                    return
                raise _damaged(path, f"{path}, line {number}: {error}") from None
            if not isinstance(value, dict):
                raise _damaged(path, f"{path}, line {number}: {type(value).__name__} instead of an object")
            yield value


def _damaged(path: Path, found: str) -> InputError:
    return InputError(f"{path.name} is not valid JSON", found=found, change="restore the file, or remove it")


def _metrics(path: Path) -> tuple[Columns, Columns, bool]:
    tables: dict[str, dict[str, array]] = {"train": {}, "validation": {}}
    lengths = {"train": 0, "validation": 0}
    unfinished = False
    if path.is_file():
        for line in _json_lines(path):
            if line is None:
                unfinished = True
                break
            split = line.get("split")
            if split not in tables:
                raise InputError("metrics.jsonl has a line of an unknown split", found=f"{path}: split {split!r}")
            _append(tables[split], lengths[split], line)
            lengths[split] += 1
    train, validation = (
        Columns({name: np.frombuffer(column) for name, column in table.items()}) for table in tables.values()
    )
    return train, validation, unfinished


def _append(table: dict[str, array], length: int, line: dict[str, Any]) -> None:
    """Add one line to the columns, filling with NaN what it lacks (or what the lines before it lacked)."""
    values = {name: value for name, value in line.items() if name not in NESTED}
    values |= {f"terms.{name}": value for name, value in (line.get("terms") or {}).items()}
    values |= {f"time.{index}": value for index, value in enumerate(line.get("loss_by_time") or [])}
    for source, found in (line.get("sources") or {}).items():
        values |= {f"sources.{source}.{name}": value for name, value in found.items()}
    for name, value in values.items():
        if value is None or isinstance(value, (int, float)):
            column = table.setdefault(name, array("d", [float("nan")]) * length)
            column.append(value if value is not None and math.isfinite(value) else float("nan"))
    for column in table.values():
        if len(column) == length:
            column.append(float("nan"))


def _samples(folder: Path) -> list[dict[str, Any]]:
    samples = []
    for path in sorted(folder.glob("*.jsonl")) if folder.is_dir() else ():
        samples += [sample for sample in _json_lines(path) if sample is not None]
    return sorted(samples, key=lambda sample: -(sample.get("step") or 0))
