"""Everything that is wrong with the values of a configuration, found before anything is built.

Pure: no device, no files, no torch. What depends on the machine or on the data (is there a GPU, does the folder exist,
is the corpus long enough) is checked where it is used. A value that is not the neutral one (empty, 0, -1) and that the
chosen options would ignore is a problem too.
"""

from __future__ import annotations

import math
import re

from braid.kernels.errors import ConfigError
from braid.parallel.plan_check import check_plan
from braid.pretrain.config.accelerators import check_accelerators
from braid.pretrain.config.check import Check
from braid.pretrain.config.objectives import CHECKS, OBJECTIVES
from braid.pretrain.config.packing import DOCUMENT_PACKINGS, check_packing
from braid.pretrain.config.problem import Problem, configuration_error, listed, nearest
from braid.pretrain.config.sampling import check_sampling
from braid.pretrain.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
from braid.pretrain.planning.facts import plan_facts

SEEDS = range(2**64)
SHORTEST_ROW = {"wrap": 4, "stream": 2, "pairs": 4, "document": 3, "best_fit": 3, "paragraph": 3}
"""BOS + two tokens + EOS; one token to predict the next from; BOS and two EOS around one token; one token between BOS
and EOS; two and EOS."""

WITHOUT_CROSS_ENTROPY = ("duo", "gidd", "replaid")
"""Objectives whose loss is made of logits in another way."""


def validate(config: Config, *, world_size: int | None = None) -> None:
    """Raise ConfigError with all problems, if there are any."""
    found = problems(config, world_size=world_size)
    if found:
        raise configuration_error(found)


def check_seed(seed: int) -> None:
    """Raise ConfigError when the `--seed` of a command is no key of the random numbers."""
    if seed not in SEEDS:
        raise ConfigError(
            "--seed must be a key of 64 bits", found=str(seed), change=f"take a number from 0 to {SEEDS[-1]}"
        )


def problems(config: Config, *, world_size: int | None = None) -> list[Problem]:
    """All problems of a configuration that is to run on `world_size` processes, in the order of the schema.

    None is the smallest number of processes that its parallel plan takes. What is wrong there is wrong everywhere.
    """
    assert world_size is None or world_size >= 1
    check = Check()
    _run_and_data(check, config)
    _model(check, config.model)
    _objective(check, config)
    _optimizer(check, config.optimizer, config.training.steps)
    _training(check, config.training)
    _parallel(check, config, world_size)
    check_accelerators(check, config)
    check_packing(check, config)
    _rest(check, config)
    return check.problems


def _run_and_data(check: Check, config: Config) -> None:
    run, data = config.run, config.data
    check.filled("run.dir", run.dir)
    if run.seed not in SEEDS:
        check.add(f"run.seed = {run.seed} must be a key of 64 bits", change="take a number from 0 to 2^64 - 1")
    check.one_of("run.device", run.device, ("auto", "cpu", "cuda"))
    check.one_of("run.precision", run.precision, ("fp32", "bf16"))
    check.at_least("run.threads", run.threads, 0)
    if not data.sources:
        check.filled("data.path", data.path)
    _mixture(check, data, config.training)
    check.one_of("data.packing", data.packing, SHORTEST_ROW)
    shortest = SHORTEST_ROW.get(data.packing, min(SHORTEST_ROW.values()))
    if not data.sequence_length >= shortest:
        check.add(
            f"data.sequence_length = {data.sequence_length} is too short for data.packing = {data.packing!r}",
            change=f"use at least {shortest}"
            + (", the row being BOS + L-2 tokens + EOS" if data.packing == "wrap" else ""),
        )
    check.one_of("data.oversized", data.oversized, ("auto", "cut", "skip", "stop"))
    if data.oversized in ("cut", "skip") and data.packing not in ("pairs", *DOCUMENT_PACKINGS):
        found = f"data.oversized = {data.oversized!r} and data.packing = {data.packing!r}"
        change = "data.oversized=auto"
        check.add("data.oversized is ignored: nothing is too long for a row of the stream", found, change)
    _target_tokens(check, data)
    check.at_least("data.window", data.window, 1)
    check.at_least("data.workers", data.workers, 0)
    check.one_of("data.damaged", data.damaged, ("stop", "skip"))
    check.at_least("data.cache_gb", data.cache_gb, 0)
    check.at_least("data.retries", data.retries, 0)
    check.positive("data.timeout_s", data.timeout_s)


def _target_tokens(check: Check, data: DataConfig) -> None:
    found = f"data.packing = {data.packing!r}, data.oversized = {data.oversized!r}"
    if not data.target_tokens:
        return
    if (data.packing, data.oversized) != ("pairs", "cut"):
        check.add("data.target_tokens is ignored: no pair is cut", found, "data.oversized=cut, or data.target_tokens=0")
    elif not 2 <= data.target_tokens <= data.sequence_length - 2:
        check.add(
            f"data.target_tokens = {data.target_tokens} leaves no place for a source, or none for a target",
            found=f"data.sequence_length = {data.sequence_length}",
            change=f"use 2 to {data.sequence_length - 2}, or 0 for half the row",
        )


def _mixture(check: Check, data: DataConfig, training: TrainingConfig) -> None:
    """Sources, their weights and the stages of a curriculum."""
    if not data.sources:
        for name in ("weights", "temperature", "stages"):
            if getattr(data, name) != getattr(DataConfig(), name):
                found = f"data.{name} = {getattr(data, name)}, data.sources is empty"
                check.add(f"data.{name} is ignored: the run has one corpus", found, "name several in data.sources")
        return
    for name, folder in data.sources.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            check.add(f"data.sources: {name!r} is no name", change="use letters, digits, `-` and `_`")
        check.filled(f"data.sources.{name}", folder)
        twins = [other for other, path in data.sources.items() if path == folder and folder.strip()]
        if twins[:1] == [name] and len(twins) > 1:
            check.add(f"the sources {listed(twins, 'and')} are one folder", folder, "name it once, with their weights")
    check.positive("data.temperature", data.temperature)
    if data.weights:
        _weights(check, "data.weights", data.weights, data)
    before = 0
    for number, stage in enumerate(data.stages):
        path = f"data.stages[{number}]"
        if stage.from_sample <= before:
            change = "write stages in the order in which they begin; data.weights hold from sample 0"
            check.add(f"{path} is out of order", f"from_sample {stage.from_sample}, after {before}", change)
        before = max(before, stage.from_sample)
        _weights(check, f"{path}.weights", stage.weights, data)
    samples = training.steps * training.global_batch_size
    if data.stages and before >= samples >= 1:
        found = f"it begins at sample {before}, training.steps x training.global_batch_size = {samples}"
        check.add("the last of data.stages would never begin", found, "train longer, or leave the stage out")


def _weights(check: Check, path: str, weights: dict[str, float], data: DataConfig) -> None:
    for name in weights.keys() - data.sources.keys():
        alike = nearest(name, data.sources, count=1)
        change = f"did you mean {alike[0]}?" if alike else f"the sources are {listed(data.sources, 'and')}"
        check.add(f"{path}.{name} is the weight of no source", f"{weights[name]}", change)
    for name in data.sources.keys() - weights.keys():
        change = f"for example {name}: 1, or 0 for none of its samples"
        check.add(f"{path} has no weight for source {name}", f"weights of {listed(weights, 'and')}", change)
    if all([check.at_least(f"{path}.{name}", weight, 0) for name, weight in weights.items()]) and not any(
        weights.values()
    ):
        check.add(f"{path} adds up to nothing", f"{weights}", "give at least one source a weight above 0")


def _model(check: Check, model: ModelConfig) -> None:
    width, heads = model.width, model.num_heads
    sized = [check.at_least("model.width", width, 1), check.at_least("model.num_heads", heads, 1)]
    if all(sized) and width % (2 * heads):
        lower, upper = _around(width, 2 * heads)
        head_dim = f"{width} / {heads} = {width / heads:g}"
        fitting = [n for n in range(1, width // 2 + 1) if width % (2 * n) == 0]
        closest = min(fitting, key=lambda n: abs(n - heads), default=None)
        check.add(
            "model.width / model.num_heads, the head dimension, must be "
            + ("even: RoPE rotates pairs of channels" if width % heads == 0 else "a whole number"),
            found=f"{head_dim}, remainder {width % heads}" if width % heads else f"{head_dim}, which is odd",
            change=f"model.width={listed(map(str, [lower, upper] if lower else [upper]))}"
            + (f", or model.num_heads={closest}" if closest else ""),
        )
    check.at_least("model.num_layers", model.num_layers, 1)
    if check.positive("model.mlp_ratio", model.mlp_ratio) and sized[0] and width * model.mlp_ratio < 1:
        check.add(
            "the MLP has no width",
            found=f"model.width * model.mlp_ratio = {width} * {model.mlp_ratio} = {width * model.mlp_ratio:g}",
            change="raise model.mlp_ratio",
        )
    check.at_least("model.cond_dim", model.cond_dim, 1)
    check.within("model.dropout", model.dropout, "[)", 0, 1)
    if not 1 < model.rope_base < math.inf:
        check.add(f"model.rope_base = {model.rope_base} must be above 1", change="the usual base is 10000")
    check.at_least("model.z_loss", model.z_loss, 0)
    check.one_of("model.activation_checkpointing", model.activation_checkpointing, ("none", "block"))


def _objective(check: Check, config: Config) -> None:
    objective = config.objective
    check.one_of("objective.name", objective.name, OBJECTIVES)
    if objective.name in OBJECTIVES and type(objective) is not OBJECTIVES[objective.name]:
        found = f"objective.name = {objective.name!r} in a {type(objective).__name__}"
        check.add("the objective's name does not fit its class", found, f"use {OBJECTIVES[objective.name].__name__}")
    if objective.name in OBJECTIVES and type(objective) is OBJECTIVES[objective.name]:
        CHECKS[objective.name](check, config)
    if config.model.z_loss and objective.name in WITHOUT_CROSS_ENTROPY:
        found = f"objective.name = {objective.name!r}, model.z_loss = {config.model.z_loss}"
        check.add("model.z_loss is ignored: the loss is no cross-entropy of the head's logits", found, "model.z_loss=0")


def _optimizer(check: Check, optimizer: OptimizerConfig, steps: int) -> None:
    check.one_of("optimizer.name", optimizer.name, ("adamw", "muon"))
    check.positive("optimizer.lr", optimizer.lr)
    check.within("optimizer.momentum", optimizer.momentum, "[)", 0, 1)
    if optimizer.name == "adamw" and optimizer.momentum != OptimizerConfig.momentum:
        found = f"optimizer.momentum = {optimizer.momentum} and optimizer.name = 'adamw'"
        check.add("optimizer.momentum is ignored: only muon has it", found, "optimizer.name=muon")
    check.within("optimizer.beta1", optimizer.beta1, "[)", 0, 1)
    check.within("optimizer.beta2", optimizer.beta2, "[)", 0, 1)
    check.positive("optimizer.eps", optimizer.eps)
    check.at_least("optimizer.weight_decay", optimizer.weight_decay, 0)
    check.at_least("optimizer.clip_norm", optimizer.clip_norm, 0)
    check.one_of("optimizer.schedule", optimizer.schedule, ("constant", "cosine", "wsd"))
    ratio_fits = check.within("optimizer.min_lr_ratio", optimizer.min_lr_ratio, "[]", 0, 1)
    if ratio_fits and optimizer.schedule == "constant" and optimizer.min_lr_ratio != OptimizerConfig.min_lr_ratio:
        check.add(
            f"optimizer.min_lr_ratio = {optimizer.min_lr_ratio} is ignored: the rate does not fall",
            found="optimizer.schedule = 'constant'",
            change=f"optimizer.min_lr_ratio={OptimizerConfig.min_lr_ratio}, or optimizer.schedule=cosine",
        )
    warmup, decay = optimizer.warmup_steps, optimizer.decay_steps
    counted = [check.at_least("optimizer.warmup_steps", warmup, 0), check.at_least("optimizer.decay_steps", decay, 0)]
    if not all(counted) or steps < 1:
        return
    if warmup > steps:
        check.add(
            "the warm-up is longer than the run",
            found=f"optimizer.warmup_steps = {warmup} > training.steps = {steps}",
            change=f"optimizer.warmup_steps={steps // 10}, or training.steps={10 * warmup}",
        )
    elif optimizer.schedule == "wsd" and decay and warmup + decay > steps:
        check.add(
            "warm-up and decay do not fit into the run",
            found=f"optimizer.warmup_steps + optimizer.decay_steps = {warmup} + {decay} = {warmup + decay} > "
            f"training.steps = {steps}",
            change=f"training.steps={warmup + decay}"
            + (f", or optimizer.decay_steps={steps - warmup}" if steps > warmup else ""),
        )
    if optimizer.schedule == "wsd" and not decay:
        example = max(1, steps // 10)
        check.add("optimizer.schedule = 'wsd' needs a decay", change=f"for example optimizer.decay_steps={example}")
    if optimizer.schedule in ("constant", "cosine") and decay:
        check.add(
            f"optimizer.decay_steps = {decay} is ignored by optimizer.schedule = {optimizer.schedule!r}",
            change="optimizer.decay_steps=0, or optimizer.schedule=wsd",
        )


def _training(check: Check, training: TrainingConfig) -> None:
    check.at_least("training.steps", training.steps, 1)
    check.at_least("training.global_batch_size", training.global_batch_size, 1)
    check.at_least("training.micro_batch_size", training.micro_batch_size, 1)
    check.within("training.ema_decay", training.ema_decay, "[)", 0, 1)
    check.at_least("training.log_every", training.log_every, 1)
    check.at_least("training.validate_every", training.validate_every, 0)
    check.at_least("training.validation_sequences", training.validation_sequences, 1)
    check.at_least("training.sample_every", training.sample_every, 0)
    check.at_least("training.num_samples", training.num_samples, 1)


def _parallel(check: Check, config: Config, world_size: int | None) -> None:
    """The plan against the sizes of model and batch, once those are sizes."""
    model, training = config.model, config.training
    sizes = (
        model.num_layers,
        model.num_heads,
        model.width * model.mlp_ratio,
        config.data.sequence_length,
        training.global_batch_size,
        training.micro_batch_size,
    )
    if all(1 <= size < math.inf for size in sizes):
        for problem in check_plan(config.parallel, plan_facts(config), world_size):
            check.add(*problem)


def _rest(check: Check, config: Config) -> None:
    checkpoint, telemetry = config.checkpoint, config.telemetry
    check.at_least("checkpoint.every", checkpoint.every, 0)
    check.at_least("checkpoint.keep", checkpoint.keep, 0)
    check.one_of("checkpoint.resume", checkpoint.resume, ("auto", "never"))
    check_sampling(check, config.sampling, config.objective)
    check.one_of("telemetry.wandb", telemetry.wandb, ("off", "online", "offline"))
    if telemetry.wandb != "off":
        check.filled("telemetry.wandb_project", telemetry.wandb_project)


def _around(number: int, factor: int) -> tuple[int, int]:
    """The multiples of `factor` below and above `number`; the lower one may be 0."""
    return number // factor * factor, -(-number // factor) * factor
