"""What a checkpoint of a run holds, and how a model is built back from one."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from dataclasses import fields as dataclass_fields
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.mixture import Stage
from braid.data_pipeline.packing import Rows
from braid.data_pipeline.remote import Fetching
from braid.data_pipeline.tokenizers import Tokenizer, load_tokenizer
from braid.kernels.errors import CheckpointError, InputError
from braid.kernels.random import CONTRACT_VERSION
from braid.parallel.engine import Engine, Part
from braid.pretrain.config.load import dump_config, load_config
from braid.pretrain.config.schema import Config
from braid.pretrain.model.encoders import TableEncoder
from braid.pretrain.objectives.base import Objective
from braid.pretrain.objectives.build import build_objective, saved_encoder
from braid.pretrain.training.ema import EMA

from .folder import MANIFEST, CheckpointReader, open_checkpoint, refusal, verify_folder
from .layout import Layout
from .pieces import LocalTensor
from .store import CheckpointStore

TOKENIZER_FOLDER = "tokenizer"
CONFIG_FILE = "config.yaml"

FREE_TO_CHANGE = ("model.dropout", "model.activation_checkpointing", "model.compile")
"""Fields of the sections `model` and `objective` that do not change what the saved weights mean."""
UNMENTIONED = (
    "run.dir",
    "run.threads",
    "data.path",
    "data.sources",
    "data.workers",
    "data.cache",
    "data.retries",
    "data.timeout_s",
    "training.log_every",
    "telemetry",
)
"""Fields whose change is not worth a line when a run is continued."""


def checkpoint_files(config: Config, tokenizer: Tokenizer) -> dict[str, bytes]:
    """What lies beside the tensors: the resolved configuration and the tokenizer. Made once, when a run starts: a save
    must not fail for want of a temporary folder."""
    files = {CONFIG_FILE: dump_config(config).encode()}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        for file in sorted(Path(folder).iterdir()):
            files[f"{TOKENIZER_FOLDER}/{file.name}"] = file.read_bytes()
    return files


def tensors_to_save(
    objective: Objective, engine: Engine, ema: EMA | None, layout: Layout
) -> tuple[dict[str, dict[str, LocalTensor]], Iterator[tuple[str, str, Tensor]]]:
    """What this process writes: group (weights, optimizer, ema, encoder) -> name -> tensor on the device `meta`; and
    then their values, as (group, name, values), one after the other. Collective over the reduction axis, and so is the
    iteration, in which values move to the process that writes them."""
    outline, encoder = _outline(engine), getattr(objective, "encoder", None)
    rest = {"weights": engine.untrained()}
    groups = {"weights": outline | _on_meta(rest["weights"]), "optimizer": engine.optimizer_outline()}
    if ema:
        groups["ema"] = outline
    groups = {
        group: {key: held for key, held in tensors.items() if layout.writes(key, held.ndim)}
        for group, tensors in groups.items()
    }
    if isinstance(encoder, TableEncoder):
        rest["encoder"] = {"table": encoder.table} if layout.writes_the_rest else {}
        groups["encoder"] = _on_meta(rest["encoder"])
    writers, here = layout.share(groups), layout.reduction.rank

    def given() -> Iterator[tuple[str, str, Tensor]]:
        named = {
            "weights": engine.named(engine.held, writers["weights"]),
            "optimizer": engine.optimizer_state(writers["optimizer"]),
        }
        if ema:
            named["ema"] = engine.named(ema.averages, writers["ema"])
        for group, to in writers.items():
            own = ((key, held) for key, held in rest.get(group, {}).items() if to.get(key) == here)
            for key, held in chain(named.get(group, ()), own):
                yield group, key, layout.local(key, held).values

    mine = {
        group: {key: layout.local(key, held) for key, held in tensors.items() if writers[group][key] == here}
        for group, tensors in groups.items()
    }
    return mine, given()


def _outline(engine: Engine) -> dict[str, Tensor]:
    """What the engine gives of weights and their averages, on the device `meta`."""
    return {name: torch.empty(shape, dtype=torch.float32, device="meta") for name, shape in engine.shapes().items()}


def _on_meta(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}


def describe(
    config: Config, step: int, objective: Objective, state: dict[str, Any], tokenizer: Tokenizer, num_processes: int
) -> dict[str, Any]:
    """The JSON state of a checkpoint: `state`, and what else it takes to continue bit for bit, or to sample and
    evaluate elsewhere without the corpus."""
    encoder = getattr(objective, "encoder", None)
    identity = {
        "step": step,
        "objective": config.objective.name,
        "seed": config.run.seed,
        "tokenizer_hash": tokenizer.hash,
        "encoder_fingerprint": encoder.fingerprint if encoder is not None else None,
        "noise_contract": CONTRACT_VERSION,
        "processes": num_processes,
        "versions": {"braid": version("braid-lm"), "torch": torch.__version__},
    }
    return {**identity, **state}


def restore(
    reader: CheckpointReader,
    config: Config,
    objective: Objective,
    engine: Engine,
    ema: EMA | None,
    tokenizer: Tokenizer,
    layout: Layout,
) -> list[str]:
    """Put a checkpoint into freshly built objects, whatever the layout of either; what is read is what this process
    holds.

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
        f"{name}: checkpoint {reader.state[name]}, this run {value}"
        for name, value in running.items()
        if reader.state[name] != value
    ]
    saved_shapes = {name: torch.Size(entry.shape) for name, entry in reader.index["weights"].items()}
    differences += _shape_differences(saved_shapes, layout.shapes)
    changes = _setting_changes(load_config(reader.path / CONFIG_FILE), config)
    meaningful = ("model.", "objective.", "optimizer.name")
    fixed = {field: change for field, change in changes.items() if field.startswith(meaningful)}
    differences += [f"{field}: {change}" for field, change in fixed.items() if field not in FREE_TO_CHANGE]
    if differences:
        raise CheckpointError(
            "the checkpoint in the run directory is of another run or model",
            found="; ".join(differences),
            change="use the configuration it was saved with (config.yaml in the run directory), or another run.dir",
        )
    if "optimizer" not in reader.index:
        raise CheckpointError(
            "the checkpoint has no optimizer state: it can be sampled and evaluated, not continued",
            found=f"{reader.path} has {', '.join(reader.index)}",
            change="put the whole checkpoint back, or start in another run.dir",
        )
    if ema and "ema" not in reader.index:
        raise CheckpointError(
            "the checkpoint has no averaged weights",
            found="training.ema_decay was 0 when it was saved",
            change="set training.ema_decay=0, or start in another run.dir",
        )

    weights = saved_part(reader, "weights", layout)
    with engine.writing() as trained:
        for name, tensor in engine.untrained().items():
            tensor.copy_(weights(name))
        engine.fill(trained, weights)
    keys = [key for key in reader.index["optimizer"] if layout.has(key)]
    engine.load_optimizer_state(keys, saved_part(reader, "optimizer", layout))
    if ema:
        engine.fill(ema.averages, saved_part(reader, "ema", layout))
    return [f"{field}: {change}" for field, change in changes.items() if not field.startswith(UNMENTIONED)]


def saved_part(reader: CheckpointReader, group: str, layout: Layout) -> Part:
    """Reads what this process holds of a tensor of a group, or a span of that."""
    entries = reader.index[group]

    def read(key: str, *span: int) -> Tensor:
        shard = layout.shard(key, len(entries[key].shape))
        return reader.read_span(group, key, shard, *span) if span else reader.read(group, key, shard)

    return read


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


def _shape_differences(saved: dict[str, torch.Size], running: dict[str, torch.Size]) -> list[str]:
    """At most a handful of lines: names on one side only, and tensors of other shapes."""
    lines = [f"{name} only in the checkpoint" for name in sorted(saved.keys() - running.keys())]
    lines += [f"{name} only in this run" for name in sorted(running.keys() - saved.keys())]
    lines += [
        f"{name}: checkpoint {tuple(saved[name])}, this run {tuple(running[name])}"
        for name in sorted(saved.keys() & running.keys())
        if saved[name] != running[name]
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
    shares: dict[str, float] = field(default_factory=dict)
    """Of a run on a mixture: what part of the samples each source gave when the checkpoint was saved."""

    def rows(self, folder: str, split: str) -> Rows:
        """The rows of a corpus, packed as those of the run. Raises InputError for one of another tokenizer."""
        data = self.config.data
        fetching = Fetching(data.cache, data.cache_gb, data.retries, data.timeout_s)
        corpus = TokenCorpus.open(folder, split, fetching=fetching)
        if corpus.tokenizer.hash != self.tokenizer.hash:
            raise InputError(
                f"the corpus {folder} was tokenised with another tokenizer than the model's",
                found=f"corpus {corpus.tokenizer.hash[:16]} ({corpus.vocab_size} ids), "
                f"model {self.tokenizer.hash[:16]} ({self.tokenizer.vocab_size} ids)",
                change=f"prepare the text with --tokenizer {self.path / 'tokenizer'}",
            )
        length, settings = data.sequence_length, {"oversized": data.oversized, "target_tokens": data.target_tokens}
        return Rows(corpus, length, data.packing, **settings)


def load_model(path: Path, device: torch.device, *, use_ema: bool = True) -> LoadedModel:
    """From a run directory (its newest valid checkpoint) or one checkpoint folder.

    Uses the averaged weights where there are any, unless `use_ema` is False.
    """
    path = find_checkpoint(path, ("weights", "encoder", *(["ema"] if use_ema else [])))
    with open_checkpoint(path, check_tensors=False) as reader:
        state, config = reader.state, load_config(path / CONFIG_FILE)
        tokenizer = load_tokenizer(path / TOKENIZER_FOLDER)
        tables = {name: reader.read("encoder", name) for name in reader.index.get("encoder", ())}
        encoder = saved_encoder(config, tokenizer, tables, path, device)
        if encoder is not None and encoder.fingerprint != state["encoder_fingerprint"]:
            raise CheckpointError(
                "the encoder is not the one the model was trained with",
                found=f"fingerprint {encoder.fingerprint}, the checkpoint's is {state['encoder_fingerprint']}",
                change=f"put the original back at {config.objective.encoder.path}",
            )
        objective = build_objective(config, tokenizer, encoder, device)
        averaged = reader.index.get("ema", {}) if use_ema else {}
        objective.load_state_dict(
            {name: reader.read("ema" if name in averaged else "weights", name) for name in reader.index["weights"]}
        )
    objective.begin_step(state["step"], config.training.steps)
    objective.eval()
    stages = state.get("loader", {}).get("stages")
    shares = Stage(**stages[-1]).fractions if stages else {}
    return LoadedModel(config, objective, tokenizer, state["step"], path, shares)


def find_checkpoint(path: Path, groups: Collection[str] | None = None, *, damaged: bool = False) -> Path:
    """The newest valid checkpoint of a run directory, or the checkpoint folder itself, whose tensors of `groups` (None:
    all) have just been verified; with `damaged`, a folder that is named may be in any state. Raises CheckpointError."""
    if (path / "checkpoints").is_dir():
        found = CheckpointStore(path / "checkpoints").latest_valid(report=print, groups=groups)
        if found is None:
            raise CheckpointError(
                f"no valid checkpoint in {path / 'checkpoints'}", change="train first: braid pretrain ..."
            )
        return found[1]
    if not (path / MANIFEST).is_file():
        raise CheckpointError(
            f"{path} is neither a run directory nor a checkpoint",
            found=f"no checkpoints/ and no {MANIFEST} in it" if path.exists() else "no such folder",
            change="give the run.dir of a training run, or one of its checkpoints/step-* folders",
        )
    problem = None if damaged else verify_folder(path, groups=groups)
    if problem is not None:
        raise refusal(path, problem)
    return path
