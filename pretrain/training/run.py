"""`braid pretrain`: one run from its configuration to its exit code. The same thing under torchrun."""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from braid.kernels.errors import BraidError, ConfigError, TrainingFailed
from braid.parallel.data_parallel import World, init_world
from braid.parallel.mesh import Mesh, build_mesh
from braid.pretrain.checkpoint.store import CheckpointStore
from braid.pretrain.config.load import load_config
from braid.pretrain.config.schema import Config
from braid.pretrain.config.validate import validate
from braid.pretrain.exits import INTERRUPTED, is_about_a_place

from .accelerators import use_accelerators
from .loop import Trainer
from .outcome import STATUS, clear_outcome, write_failed_start, write_outcome
from .precision import prepare_process


def main(recipe: str, overrides: Sequence[str]) -> int:
    """Load, validate, train. Returns 0; everything else is a BraidError with its documented exit code.

    A process that a library kills (SIGABRT, SIGSEGV, ...) says on stderr where each of its threads stood.
    """
    faulthandler.enable()
    config = load_config(recipe, overrides)
    return pretrain(config)


def pretrain(config: Config) -> int:
    """Train `config` in this process (and its peers, under torchrun) and leave outcome.json in the run directory."""
    run_dir = Path(config.run.dir)
    with ExitStack() as stack:
        try:
            world = init_world(config.run.device)
            stack.callback(world.close)
            validate(config, world_size=world.size)
            use_accelerators(config.accelerators, world.device)
            mesh = build_mesh(world, config.parallel)
            stack.callback(mesh.close)
        except BraidError as error:
            write_failed_start(run_dir, error)
            raise
        prepare_process(config.run)
        store = CheckpointStore(run_dir / "checkpoints", keep=config.checkpoint.keep)
        with _writing(store, run_dir, world):
            return _train(config, mesh, store)


@contextmanager
def _writing(store: CheckpointStore, run_dir: Path, world: World) -> Iterator[None]:
    """Rank 0 makes the run directory and holds its lock; a problem it meets is raised on every rank."""
    problem = None
    with ExitStack() as stack:
        if world.rank == 0:
            try:
                stack.enter_context(store)
                clear_outcome(run_dir)  # before any rank can end: a kill must not be taken for the last start's ending
            except BraidError as error:
                problem = error
        problem = world.broadcast_object(problem)
        if problem is not None:
            raise problem
        yield


@dataclass
class _Ending:
    """What is known of the run when it ends."""

    trainer: Trainer | None = None


@contextmanager
def _outcome(run_dir: Path, world: World) -> Iterator[_Ending]:
    """Write outcome.json when the block ends: rank 0 however it does, every other rank when it failed by itself."""
    ending = _Ending()
    status, code, message, own = "failed", 1, "", True
    try:
        yield ending
        status, code, own = "done", 0, False
    except BraidError as error:
        status, code, message, own = STATUS[error.exit_code], error.exit_code, str(error), not _lost_a_peer(error)
        raise
    except KeyboardInterrupt:
        code, message = INTERRUPTED, "interrupted"
        raise
    except BaseException as error:
        message = f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and is_about_a_place(error):  # `exits` reports it as wrong input
            status, code = STATUS[BraidError.exit_code], BraidError.exit_code
        raise
    finally:
        if own or world.rank == 0:
            step = ending.trainer.step if ending.trainer else None
            write_outcome(run_dir, status, code, step, message, world.rank)


def _lost_a_peer(error: BraidError) -> bool:
    """Whether a collective failed, so that the cause is some other rank's. `World` raises it from the backend's own."""
    return isinstance(error, TrainingFailed) and isinstance(error.__cause__, RuntimeError)


def _train(config: Config, mesh: Mesh, store: CheckpointStore) -> int:
    trainer = None
    try:
        with _outcome(Path(config.run.dir), mesh.world) as ending, mesh.world.watching():
            _check_unused(config, mesh.world, store)
            trainer = Trainer(config, mesh, store)
            ending.trainer = trainer
            trainer.train()
    finally:
        if trainer:
            trainer.close(failed=sys.exc_info()[0] is not None)
    trainer.say(f"done: step {trainer.step}, everything is in {config.run.dir}")
    return 0


def _check_unused(config: Config, world: World, store: CheckpointStore) -> None:
    """checkpoint.resume = never: refuse a directory that holds what this run would overwrite."""
    if config.checkpoint.resume != "never":
        return
    metrics = Path(config.run.dir) / "metrics.jsonl"
    held = None
    if world.rank == 0:
        held = "checkpoints" if store.steps() else None
        if held is None and metrics.exists() and metrics.stat().st_size:
            held = "metrics"
    held = world.broadcast_object(held)
    if held:
        raise ConfigError(
            f"the run directory already holds {held} and checkpoint.resume is never",
            found=config.run.dir,
            change="choose another run.dir, or checkpoint.resume=auto to continue"
            if held == "checkpoints"
            else f"choose another run.dir, or move {metrics} away",
        )
