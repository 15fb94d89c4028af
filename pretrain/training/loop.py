"""The training loop, top to bottom: build, resume, then step, log, validate, sample, save until done or told to stop.

What is saved and restored is only: weights, optimizer, EMA, the number of samples consumed, the sums since the last
log line, and the length of metrics.jsonl. Order of data, times, masks and noise follow from the seed and the number of
samples consumed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch

from braid.data_pipeline.loader import Batch, Loader
from braid.data_pipeline.packing import SINGLE
from braid.kernels.errors import CheckpointError, Preempted, TrainingFailed
from braid.kernels.random import fold_key
from braid.parallel.context import Context
from braid.parallel.engine import NotFinite
from braid.parallel.layers import whole_shape
from braid.parallel.mesh import Mesh
from braid.parallel.pipeline import Schedule, counts_here
from braid.pretrain.checkpoint.files import write_atomically
from braid.pretrain.checkpoint.folder import open_checkpoint
from braid.pretrain.checkpoint.layout import build_layout
from braid.pretrain.checkpoint.saver import Saver
from braid.pretrain.checkpoint.snapshot import checkpoint_files, describe, restore, tensors_to_save
from braid.pretrain.checkpoint.store import CheckpointStore
from braid.pretrain.config.load import dump_config
from braid.pretrain.config.schema import Config
from braid.pretrain.evaluation.bound import evaluate_rows
from braid.pretrain.evaluation.mixture import mixed_estimates, of_sources, sequences_of
from braid.pretrain.model.flops import mfu
from braid.pretrain.model.fp8 import use_fp8
from braid.pretrain.model.network import parameter_counts
from braid.pretrain.objectives.base import Noise
from braid.pretrain.objectives.build import build_objective, build_stage, training_encoder
from braid.pretrain.report.environment import collect_environment
from braid.pretrain.sampling.output import sampler_settings, write_samples
from braid.pretrain.sampling.prompts import no_prompt, source_prompt
from braid.pretrain.sampling.sampler import draw_samples
from braid.pretrain.telemetry.metrics_log import MetricsLog
from braid.pretrain.telemetry.progress import ProgressMeter, format_line
from braid.pretrain.telemetry.wandb_sink import WandbSink

from .data import describe_data, open_rows, training_order
from .direction import check_passes
from .ema import EMA
from .engines import build_engine, build_store
from .gradients import Gradients
from .optimizer import learning_rate_factor, set_learning_rate
from .precision import autocast
from .signals import StopRequest
from .step import Interval, StepSums

MAX_FAILED_SAVES = 3

T = TypeVar("T")


class Trainer:
    """One run on one rank. `train()` returns when the last step is done and saved."""

    def __init__(self, config: Config, mesh: Mesh, store: CheckpointStore) -> None:
        world = mesh.world
        self.config, self.mesh, self.world, self.device = config, mesh, world, world.device
        self.store = store
        self.run_dir = Path(config.run.dir)
        data, training = config.data, config.training

        # Data: rows of both splits, and the order that depends on (seed, position) alone.
        rows = open_rows(data, "train", self.run_dir)
        self.validation_rows = open_rows(data, "validation", self.run_dir)
        corpus = rows.parts[next(iter(data.sources), SINGLE)].corpus  # of the first source, as they are written
        self.tokenizer = corpus.tokenizer
        self.loader = Loader(
            rows,
            training_order(config, rows),
            global_batch_size=training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            data_rank=mesh.data.rank,
            data_size=mesh.data.size,
            workers=data.workers,
        )

        # Model and optimizer; the same initial weights on every layout, by construction.
        encoder = training_encoder(config, corpus, world)
        stage, self.context = build_stage(config, mesh), Context(mesh.context, config.parallel.context_by)
        divided = {"tensor": mesh.tensor, "sequence": config.parallel.sequence, "context": self.context, "stage": stage}
        divided["store"] = build_store(config.parallel, mesh)
        self.objective = build_objective(config, self.tokenizer, encoder, self.device, **divided)
        if config.accelerators.linears == "transformer-engine":
            use_fp8(self.objective.network)
        self.layout = build_layout(self.objective, mesh)  # before an engine may divide what else there is
        self.engine = build_engine(config, self.objective, mesh)
        check_passes(self.objective, self.engine, config.run.precision, data.sequence_length)
        schedule = Schedule(stage, config.parallel, config.model.width) if stage.divided else None
        self.gradients = Gradients(self.objective, self.engine, config.run.precision, schedule)
        own = [whole_shape(p).numel() for p in self.objective.parameters() if counts_here(p, mesh.pipeline)]
        self.parameters = parameter_counts(self.objective.network) | {"objective": stage.add_up([sum(own)])[0]}
        self.ema = EMA(self.engine, training.ema_decay) if training.ema_decay else None
        self.noise_key = fold_key(config.run.seed, "train")

        # State and records.
        self.step = 0
        self.interval = Interval(self.device)
        self.recent_sums: list[StepSums] = []  # of the last two steps
        self.failed_saves, self.saved_step = 0, -1
        self.checkpoint_files = checkpoint_files(config, self.tokenizer)
        self.saver = Saver(store, mesh, asynchronous=config.checkpoint.asynchronous, report=self.say)
        state = self._resume()
        self.objective.begin_step(self.step, training.steps)
        if world.rank == 0:  # not before the checkpoint was found to fit: the file describes what is there
            write_atomically(self.run_dir / "config.yaml", dump_config(config).encode())
        self.metrics = MetricsLog(self.run_dir / "metrics.jsonl", state.get("metrics_offset"), enabled=world.rank == 0)
        self.wandb = WandbSink.start(config, self.run_dir, enabled=world.rank == 0)
        self.meter = ProgressMeter(training.steps, self.step, state.get("seconds", 0.0))
        self.data_wait = 0.0
        # A forward pass costs half of a backward one, so a third of what the FLOPs of a training step count.
        forward_passes = 1 + self.objective.extra_forward_passes / 3
        self.flops_per_token = self.objective.network.training_flops(data.sequence_length).total * forward_passes

    # -- the run -----------------------------------------------------------------------------------------------

    def train(self) -> None:
        config = self.config
        self._write_descriptions()
        self.say(f"{config.objective.name}: {self.parameters['total']:,} parameters, "
                 f"{len(self.loader.rows):,} training rows of {config.data.sequence_length} tokens, "
                 f"{config.training.steps:,} steps on {self.world.size} x {self.device.type}")  # fmt: skip
        for line in describe_data(self.loader, config.data.packing):
            self.say(line)
        if self.step >= config.training.steps:
            self.say(f"nothing is left to do: step {self.step} of {config.training.steps} is saved already")
        with StopRequest() as stop:
            self.objective.train()
            batches = iter(self.loader)
            while self.step < config.training.steps:
                waiting, seen = time.perf_counter(), self.loader.num_real
                micro_batches = next(batches)
                self.data_wait += time.perf_counter() - waiting
                norm, rate = self._optimizer_step(micro_batches)
                self.step += 1
                self.objective.begin_step(self.step, config.training.steps)
                self.meter.step(self.loader.num_real - seen)
                if self._due(config.training.log_every):
                    self._log(norm, rate)
                with self.meter.paused():
                    if self._due(config.training.validate_every):
                        self._validate()
                    if config.training.sample_every and self._due(config.training.sample_every):
                        self._sample()
                    if self._due(config.checkpoint.every):
                        self._save(last=self.step == config.training.steps)
                self._settle(wait=False)
                reason = stop.poll(self.world)
                if reason and self.step < config.training.steps:
                    self._settle(wait=True)
                    if self.saved_step != self.step:
                        self._save(last=True)
                    raise Preempted(
                        f"stopped by {reason} after step {self.step} of {config.training.steps}; the state is saved",
                        change=f"run the same command again to continue from {self.run_dir}",
                    )

    def _due(self, every: int) -> bool:
        """At every `every` steps, and always at the last one."""
        return self.step == self.config.training.steps or (every > 0 and self.step % every == 0)

    def _optimizer_step(self, micro_batches: list[Batch]) -> tuple[torch.Tensor, float]:
        """One optimizer step on this rank's micro-batches. Returns (gradient norm, learning rate)."""
        config = self.config.training
        first_ordinal = self.loader.consumed - config.global_batch_size
        noises = [
            Noise.training(
                self.noise_key, first_ordinal, config.global_batch_size, batch.ordinals, self.objective.time_groups
            )
            for batch in micro_batches
        ]
        pieces = [
            (batch.to(self.device), noise.to(self.device)) for batch, noise in zip(micro_batches, noises, strict=True)
        ]
        # The one denominator, known before the first backward pass: the tokens that count in the global batch.
        count = self.mesh.data.all_reduce_sum(sum(self.objective.num_scored(*piece) for piece in pieces))
        sums = self.gradients.add_up(pieces, count)
        sums.reduce(self.mesh.reduction, self.mesh.data, self.mesh.pipeline)

        factor = learning_rate_factor(self.config.optimizer, self.step, config.steps)
        set_learning_rate(self.engine.optimizer, factor)
        self.recent_sums = [*self.recent_sums[-1:], sums]
        with self._stopping_unless_finite():
            norm = self.engine.step(self.config.optimizer.clip_norm)
        with torch.no_grad():
            self.objective.update_state(sums.statistics)
        if self.ema:
            self.ema.update(self.step + 1)
        self.interval.add(sums)
        return norm, factor * self.config.optimizer.lr

    @contextmanager
    def _stopping_unless_finite(self, step_ahead: int = 1) -> Iterator[None]:
        """In this block an engine may find that the gradient of step number `self.step + step_ahead`, or of the one
        before, was not finite."""
        try:
            yield
        except NotFinite as error:
            terms = self.recent_sums[-1 - error.steps_ago].read().terms
            raise TrainingFailed(
                f"the gradient is not finite at step {self.step + step_ahead - error.steps_ago}; the weights were left "
                "as they were",
                found=", ".join(f"{name} {value:g}" for name, value in terms.items()),
                change="lower optimizer.lr, lengthen optimizer.warmup_steps or lower optimizer.clip_norm, then resume",
            ) from None

    def _check_finite(self) -> None:
        """See that the last step's gradient was finite, before anything is made of it."""
        with self._stopping_unless_finite(step_ahead=0):
            self.engine.check_finite()

    # -- records -----------------------------------------------------------------------------------------------

    def _log(self, norm: torch.Tensor, rate: float) -> None:
        """One line of metrics.jsonl and of progress: means over the interval since the last one."""
        self._check_finite()
        interval, self.interval = self.interval.read(), Interval(self.device)
        terms = {name: value / interval.count for name, value in interval.terms.items()}
        pairs = zip(interval.bucket_sums, interval.bucket_counts, strict=True)
        speed = self.meter.lap()
        record = {
            "step": self.step,
            "split": "train",
            "tokens_seen": self.loader.num_real,
            **self.loader.bookkeeping(),
            "loss": interval.total / interval.count,
            "terms": terms,
            "loss_by_time": [value / number if number else None for value, number in pairs],
            "grad_norm": norm.item(),
            "lr": rate,
            "tokens_per_second": speed.tokens_per_second,
            "mfu": self._mfu(speed.tokens_per_second),
            "data_wait": self.data_wait / speed.seconds if speed.seconds else 0.0,
            "seconds": self.meter.elapsed,
        }
        self.data_wait = 0.0
        self._record(record)
        self.say(format_line(record, self.config.training.steps, speed.eta))

    def _mfu(self, tokens_per_second: float) -> float | None:
        """Full-head convention, no causal halving (model/flops.py); None where the device's peak is unknown."""
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.device)
        return mfu(tokens_per_second, self.flops_per_token, device_name=name, num_devices=self.world.size)

    def _record(self, record: dict) -> None:
        self.metrics.write(record)
        self.wandb.write(record)

    def _validate(self) -> None:
        """The objective's figures on a part of the validation rows, one draw each, with the averaged weights."""
        config = self.config.training
        shares = self.loader.shares
        by_source = self._look(
            lambda: {
                name: evaluate_rows(
                    self.objective,
                    rows,
                    num_sequences=sequences_of(rows, shares[name], config.validation_sequences),
                    draws=1,
                    seed=self.config.run.seed,
                    micro_batch_size=config.micro_batch_size,
                    peers=self.mesh.reduction,
                )
                for name, rows in self.validation_rows.parts.items()
                if shares[name]
            }
        )
        estimates = mixed_estimates(by_source, shares)
        first = estimates[0]
        self._record(
            {
                "step": self.step,
                "split": "validation",
                "tokens_seen": self.loader.num_real,
                "loss": first.value,
                "terms": {estimate.name: estimate.value for estimate in estimates},
                "unit": first.unit,
                "standard_error": first.standard_error,
                "bits_per_byte": first.bits_per_byte,
                **({"sources": of_sources(by_source)} if self.config.data.sources else {}),
            }
        )
        unit = "nats per token" if first.unit == "nats" else "per token"
        self.say(f"  validation: {first.label} {first.value:.4f} +- {first.standard_error:.4f} {unit} "
                 f"({len(first.sums)} sequences, one draw)")  # fmt: skip

    def _sample(self) -> None:
        """Every rank draws the same ones, because every rank may be needed to; the first writes them."""
        num, data, settings = self.config.training.num_samples, self.config.data, self.config.sampling
        pairs = data.packing == "pairs"
        prompt = source_prompt(self.validation_rows, num) if pairs else no_prompt(num, data.sequence_length)
        seed = self.config.run.seed
        samples = self._look(lambda: draw_samples(self.objective, settings, prompt, key=seed))
        if self.world.rank == 0:
            path = self.run_dir / "samples" / f"step-{self.step:08d}.jsonl"
            used = sampler_settings(settings, self.config.objective, self.config.run.precision)
            try:
                write_samples(path, samples, self.tokenizer, used, step=self.step, seed=seed)
            except OSError as error:
                self.say(f"warning: {path} could not be written, training goes on: {error}")
        self.world.barrier()

    def _look(self, compute: Callable[[], T]) -> T:
        """What `compute` returns, without gradient, with the averaged weights where there are any."""

        def looking() -> T:
            with torch.no_grad(), autocast(self.config.run.precision, self.device):
                return compute()

        with self.ema.applied() if self.ema else nullcontext():
            return self.engine.forward(looking)

    def _write_descriptions(self) -> None:
        """environment.json and schedule.json, which the report shows beside the metrics."""
        if self.world.rank == 0:
            environment = collect_environment(str(self.device)) | {"ranks": self.world.size}
            encoder = self.objective.encoder
            environment["parameters"] = self.parameters | {
                "frozen_encoder": encoder.num_parameters if encoder is not None else 0
            }
            write_atomically(self.run_dir / "environment.json", (json.dumps(environment, indent=2) + "\n").encode())
        self._write_schedule(self._schedule())

    def _schedule(self) -> dict[str, Any]:
        """The objective's curves over time, which may be learnt, as they are now."""
        times = torch.linspace(0, 1, 101, dtype=torch.float64, device=self.device)
        with torch.no_grad():
            curves = self.engine.forward(lambda: self.objective.schedule_curves(times))
        series = {name: values.tolist() for name, values in curves.items()}
        return {"step": self.step, "times": times.tolist(), "series": series}

    def _write_schedule(self, schedule: dict[str, Any]) -> None:
        """schedule.json."""
        if self.world.rank == 0:
            write_atomically(self.run_dir / "schedule.json", (json.dumps(schedule, indent=2) + "\n").encode())

    def say(self, text: str) -> None:
        if self.world.rank == 0:
            print(text, flush=True)

    # -- checkpoints -------------------------------------------------------------------------------------------

    def _save(self, *, last: bool) -> None:
        """Begin a checkpoint and, unless it is asynchronous and not the `last`, see it committed."""
        self._settle(wait=True)
        self._check_finite()
        state = {
            "interval": vars(self.interval.read()),
            "metrics_offset": self.metrics.offset,
            "seconds": self.meter.elapsed,
            "loader": self.loader.state_dict(),
        }
        state = describe(self.config, self.step, self.objective, state, self.tokenizer, self.world.size)
        groups, values = tensors_to_save(self.objective, self.engine, self.ema, self.layout)
        self.saver.start(self.step, groups, state, self.checkpoint_files, values)
        schedule = self._schedule()
        if self.world.rank == 0:
            try:
                self._write_schedule(schedule)
            except OSError as error:
                self.say(f"warning: {self.run_dir / 'schedule.json'} could not be written, training goes on: {error}")
        self._settle(wait=last or not self.saver.asynchronous, last=last)

    def _settle(self, *, wait: bool, last: bool = False) -> None:
        """See how the save in flight has ended. One that failed is reported and training goes on, unless nothing later
        could save."""
        ended = self.saver.settle(wait=wait)
        if ended is None:
            return
        if ended.problem is None:
            self.failed_saves, self.saved_step = 0, ended.step
            return
        self.failed_saves += 1
        if last or self.failed_saves >= MAX_FAILED_SAVES:
            raise TrainingFailed(
                f"no checkpoint could be saved at step {ended.step} ({self.failed_saves} in a row)",
                found=str(ended.problem),
                change="free space or choose another run.dir; the last valid checkpoint is intact, resume from it",
            )
        self.say(f"warning: the checkpoint of step {ended.step} could not be saved; training goes on\n{ended.problem}")

    def _resume(self) -> dict[str, Any]:
        """Continue from the newest valid checkpoint, if there is one. Returns its state, or {}.

        All ranks continue from the same one, and each reads what it holds of it. Checkpoints of which none is valid are
        an error: a run that silently began again would overwrite what is left of the first one.
        """
        found, steps = None, []
        if self.config.checkpoint.resume == "auto":
            found = self.store.latest_valid(report=self.say, world=self.world)
            steps = self.world.broadcast_object(self.store.steps())
        if found is None and steps:
            raise CheckpointError(
                f"none of the checkpoints in {self.store.folder} is valid",
                found=f"steps {', '.join(map(str, steps))}; what is wrong with each is said above",
                change=f"put a good copy back; to begin again, move {self.run_dir} away or choose another run.dir",
            )
        if found is None:
            return {}
        self.step, path = found
        with open_checkpoint(path, check_tensors=False) as reader:  # verified above
            changes = restore(reader, self.config, self.objective, self.engine, self.ema, self.tokenizer, self.layout)
        new_stage = self.loader.load_state_dict(reader.state["loader"])
        self.interval = Interval(self.device, reader.state["interval"])
        self.say(f"resumed from step {self.step} ({path})")
        for change in changes:
            self.say(f"  continuing with another setting than it was saved with: {change}")
        if new_stage:
            first = f"{self.loader.consumed:,}"
            self.say(f"  the sources have other weights than so far: a new stage begins at sample {first}")
        return reader.state

    def close(self, *, failed: bool) -> None:
        """See a save in flight through, unless a second Ctrl-C does not wait for it, and close the records; the run
        directory is complete."""
        self.saver.close(wait=sys.exc_info()[0] is not KeyboardInterrupt)
        self.metrics.close()
        self.wandb.close(exit_code=int(failed))
