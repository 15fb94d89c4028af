"""What a checkpoint of a run holds, and how a model is built back from one."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, is_dataclass
from dataclasses import fields as dataclass_fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from braid.data_pipeline.tokenizers import Tokenizer, load_tokenizer
from braid.kernels.errors import CheckpointError
from braid.kernels.random import CONTRACT_VERSION
from braid.parallel.engine import Engine
from braid.parallel.layers import whole_shape
from braid.parallel.mesh import Mesh
from braid.pretrain.config.load import dump_config, load_config
from braid.pretrain.config.schema import Config
from braid.pretrain.model.encoders import TableEncoder
from braid.pretrain.objectives.base import Objective
from braid.pretrain.objectives.build import build_objective, saved_encoder
from braid.pretrain.training.ema import EMA

from .layout import cut_tensors, gather_stages, gather_tensors, shards_of
from .store import CheckpointStore

TOKENIZER_FOLDER = "tokenizer"
CONFIG_FILE = "config.yaml"

FREE_TO_CHANGE = ("model.dropout", "model.activation_checkpointing", "model.compile")
"""Fields of the sections `model` and `objective` that do not change what the saved weights mean."""
UNMENTIONED = ("run.dir", "run.threads", "data.path", "data.workers", "training.log_every", "telemetry")
"""Fields whose change is not worth a line when a run is continued."""


@dataclass(frozen=True)
class Snapshot:
    """Tensors by group (weights, ema, optimizer, encoder), JSON state, and the configuration it was saved with."""

    groups: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    config: Config

    @staticmethod
    def load(store: CheckpointStore, path: Path) -> Snapshot:
        """Read and verify a committed checkpoint."""
        checkpoint = store.load(path)
        return Snapshot(checkpoint.groups, checkpoint.state, load_config(path / CONFIG_FILE))


def checkpoint_files(config: Config, tokenizer: Tokenizer) -> dict[str, bytes]:
    """What lies beside the tensors: the resolved configuration and the tokenizer. Made once, when a run starts: a save
    must not fail for want of a temporary folder."""
    files = {CONFIG_FILE: dump_config(config).encode()}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        for file in sorted(Path(folder).iterdir()):
            files[f"{TOKENIZER_FOLDER}/{file.name}"] = file.read_bytes()
    return files


def tensors_to_save(objective: Objective, engine: Engine, ema: EMA | None, mesh: Mesh) -> dict[str, dict[str, Tensor]]:
    """All tensors of a checkpoint by group, whole whatever the layout, on rank 0. Collective."""
    groups = {
        "weights": dict(engine.named(engine.held)) | engine.untrained(),
        "optimizer": dict(engine.optimizer_state()),
    }
    if ema:
        groups["ema"] = dict(engine.named(ema.averages))
    shards = shards_of(objective)
    groups = {name: gather_tensors(tensors, shards, mesh.tensor) for name, tensors in groups.items()}
    if mesh.tensor.rank == mesh.reduction.rank == 0:
        groups = gather_stages(groups, objective, mesh.pipeline)
    encoder = getattr(objective, "encoder", None)
    if isinstance(encoder, TableEncoder):
        groups["encoder"] = {"table": encoder.table}
    return groups


def take(
    config: Config,
    step: int,
    objective: Objective,
    groups: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    tokenizer: Tokenizer,
) -> Snapshot:
    """Everything needed to continue bit for bit, or to sample and evaluate elsewhere without the corpus. `groups` are
    the objective's `tensors_to_save`."""
    encoder = getattr(objective, "encoder", None)
    identity = {
        "step": step,
        "objective": config.objective.name,
        "seed": config.run.seed,
        "tokenizer_hash": tokenizer.hash,
        "encoder_fingerprint": encoder.fingerprint if encoder is not None else None,
        "noise_contract": CONTRACT_VERSION,
        "versions": {"braid": version("braid-lm"), "torch": torch.__version__},
    }
    return Snapshot(groups, {**identity, **state}, config)


def restore(
    snapshot: Snapshot,
    config: Config,
    objective: Objective,
    engine: Engine,
    ema: EMA | None,
    tokenizer: Tokenizer,
) -> list[str]:
    """Put a snapshot into freshly built objects.

    Returns a line for each setting that differs from the saved one and may differ. Raises CheckpointError, which says
    what does not fit: another model, objective, tokenizer, encoder, seed or noise contract.
    """
    encoder = getattr(objective, "encoder", None)
    running = {
        "objective": config.objective.name,
        "seed": config.run.seed,
        "tokenizer_hash": tokenizer.hash,
        "encoder_fingerprint": encoder.fingerprint if encoder is not None else None,
        "noise_contract": CONTRACT_VERSION,
    }
    differences = [
        f"{name}: checkpoint {snapshot.state[name]}, this run {value}"
        for name, value in running.items()
        if snapshot.state[name] != value
    ]
    running_shapes = {name: tensor.shape for name, tensor in objective.state_dict().items()}
    running_shapes |= {name: whole_shape(parameter) for name, parameter in objective.named_parameters()}
    held, pipeline = running_shapes.keys(), objective.network.stage.axis
    if pipeline is not None:
        running_shapes = {
            key: shape for part in pipeline.all_gather_object(running_shapes) for key, shape in part.items()
        }
    differences += _shape_differences(snapshot.groups["weights"], running_shapes)
    changes = _setting_changes(snapshot.config, config)
    meaningful = ("model.", "objective.", "optimizer.name")
    fixed = {field: change for field, change in changes.items() if field.startswith(meaningful)}
    differences += [f"{field}: {change}" for field, change in fixed.items() if field not in FREE_TO_CHANGE]
    if differences:
        raise CheckpointError(
            "the checkpoint in the run directory is of another run or model",
            found="; ".join(differences),
            change="use the configuration it was saved with (config.yaml in the run directory), or another run.dir",
        )
    shards = shards_of(objective)
    weights = cut_tensors(snapshot.groups["weights"], shards)
    with engine.writing() as trained:
        for name, tensor in engine.untrained().items():
            tensor.copy_(weights[name])
        engine.fill(trained, weights.__getitem__)
    state = {key: value for key, value in snapshot.groups["optimizer"].items() if key.rpartition("/")[0] in held}
    state = cut_tensors(state, shards)
    engine.load_optimizer_state(state.keys(), state.__getitem__)
    if ema and "ema" in snapshot.groups:
        engine.fill(ema.averages, cut_tensors(snapshot.groups["ema"], shards).__getitem__)
    elif ema:
        raise CheckpointError(
            "the checkpoint has no averaged weights",
            found="training.ema_decay was 0 when it was saved",
            change="set training.ema_decay=0, or start in another run.dir",
        )
    return [f"{field}: {change}" for field, change in changes.items() if not field.startswith(UNMENTIONED)]


def _setting_changes(saved: Config, running: Config) -> dict[str, str]:
    """Dotted field -> "saved value -> value of this run", for fields that both have and that differ."""

    def fields(value: Any, path: str = "") -> dict[str, Any]:
        if not is_dataclass(value):
            return {path: value}
        return {
            name: leaf
            for field in dataclass_fields(value)
            for name, leaf in fields(getattr(value, field.name), f"{path}.{field.name}".lstrip(".")).items()
        }

    before, now = fields(saved), fields(running)
    return {name: f"{before[name]} -> {now[name]}" for name in now if name in before and before[name] != now[name]}


def _shape_differences(saved: dict[str, Tensor], running: dict[str, torch.Size]) -> list[str]:
    """At most a handful of lines: names on one side only, and tensors of other shapes."""
    lines = [f"{name} only in the checkpoint" for name in sorted(saved.keys() - running.keys())]
    lines += [f"{name} only in this run" for name in sorted(running.keys() - saved.keys())]
    lines += [
        f"{name}: checkpoint {tuple(saved[name].shape)}, this run {tuple(running[name])}"
        for name in sorted(saved.keys() & running.keys())
        if saved[name].shape != running[name]
    ]
    return lines if len(lines) <= 4 else [*lines[:4], f"and {len(lines) - 4} more tensors"]


@dataclass(frozen=True)
class LoadedModel:
    """A trained model, ready to sample or evaluate."""

    config: Config
    objective: Objective
    tokenizer: Tokenizer
    step: int
    path: Path


def load_model(path: Path, device: torch.device, *, use_ema: bool = True) -> LoadedModel:
    """From a run directory (its newest valid checkpoint) or one checkpoint folder.

    Uses the averaged weights where there are any, unless `use_ema` is False.
    """
    if (path / "checkpoints").is_dir():
        store = CheckpointStore(path / "checkpoints")
        found = store.latest_valid(report=print)
        if found is None:
            raise CheckpointError(
                f"no valid checkpoint in {path / 'checkpoints'}", change="train first: braid pretrain ..."
            )
        path = found[1]
    elif (path / "manifest.json").is_file():
        store = CheckpointStore(path.parent)
    else:
        raise CheckpointError(
            f"{path} is neither a run directory nor a checkpoint",
            found="no checkpoints/ and no manifest.json in it" if path.exists() else "no such folder",
            change="give the run.dir of a training run, or one of its checkpoints/step-* folders",
        )
    snapshot = Snapshot.load(store, path)
    config = snapshot.config
    tokenizer = load_tokenizer(path / TOKENIZER_FOLDER)
    encoder = saved_encoder(config, tokenizer, snapshot.groups.get("encoder"), path, device)
    if encoder is not None and encoder.fingerprint != snapshot.state["encoder_fingerprint"]:
        raise CheckpointError(
            "the encoder is not the one the model was trained with",
            found=f"fingerprint {encoder.fingerprint}, the checkpoint's is {snapshot.state['encoder_fingerprint']}",
            change=f"put the original back at {config.objective.encoder.path}",
        )
    objective = build_objective(config, tokenizer, encoder, device)
    weights = dict(snapshot.groups["weights"])
    if use_ema:
        weights.update(snapshot.groups.get("ema", {}))
    objective.load_state_dict(weights)
    objective.begin_step(snapshot.state["step"], config.training.steps)
    objective.eval()
    return LoadedModel(config, objective, tokenizer, snapshot.state["step"], path)
