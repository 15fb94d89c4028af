"""`braid pretrain`: one run from its configuration to its exit code. The same thing under torchrun."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from braid.kernels.errors import BraidError, ConfigError
from braid.parallel.data_parallel import World, init_world
from braid.pretrain.checkpoint.store import CheckpointStore
from braid.pretrain.config.load import load_config
from braid.pretrain.config.schema import Config
from braid.pretrain.config.validate import validate
from braid.pretrain.exits import INTERRUPTED

from .loop import Trainer
from .outcome import clear_outcome, write_outcome
from .precision import prepare_process

STATUS = {2: "bad_config", 3: "preempted", 4: "failed", 5: "data_exhausted"}
"""What outcome.json calls each exit code."""


def main(recipe: str, overrides: Sequence[str]) -> int:
    """Load, validate, train. Returns 0; everything else is a BraidError with its documented exit code."""
    config = load_config(recipe, overrides)
    return pretrain(config)


def pretrain(config: Config) -> int:
    """Train `config` in this process (and its peers, under torchrun) and leave outcome.json in the run directory."""
    world = init_world(config.run.device)
    try:
        with _outcome(config, world):
            validate(config, world_size=world.size)
        prepare_process(config.run)
        store = CheckpointStore(Path(config.run.dir) / "checkpoints", keep=config.checkpoint.keep)
        with _writing(store, config, world):
            return _train(config, world, store)
    finally:
        world.close()


@dataclass
class _Ending:
    """What is known of the run when it ends."""

    trainer: Trainer | None = None


@contextmanager
def _outcome(config: Config, world: World) -> Iterator[_Ending]:
    """Write outcome.json when the block fails, or has trained: torchrun does not pass exit codes through."""
    ending = _Ending()
    status, code, message = "failed", 1, ""
    try:
        yield ending
        status, code = "done", 0
    except BraidError as error:
        status, code, message = STATUS[error.exit_code], error.exit_code, str(error)
        raise
    except KeyboardInterrupt:
        code, message = INTERRUPTED, "interrupted"
        raise
    except BaseException as error:
        message = f"{type(error).__name__}: {error}"
        raise
    finally:
        if world.rank == 0 and (code or ending.trainer):
            step = ending.trainer.step if ending.trainer else None
            write_outcome(Path(config.run.dir), status, code, step, message)


@contextmanager
def _writing(store: CheckpointStore, config: Config, world: World) -> Iterator[None]:
    """Rank 0 makes the run directory and holds its lock; a problem it meets is raised on every rank."""
    problem = None
    with ExitStack() as stack:
        if world.rank == 0:
            try:
                stack.enter_context(store)
                if config.checkpoint.resume == "never" and store.steps():
                    problem = ConfigError(
                        "the run directory already holds checkpoints and checkpoint.resume is never",
                        found=config.run.dir,
                        change="choose another run.dir, or checkpoint.resume=auto to continue",
                    )
            except BraidError as error:
                problem = error
        problem = world.broadcast_object(problem)
        if problem is not None:
            raise problem
        yield


def _train(config: Config, world: World, store: CheckpointStore) -> int:
    if world.rank == 0:
        clear_outcome(Path(config.run.dir))  # a kill must not be taken for the ending of the start before it
    trainer = None
    try:
        with _outcome(config, world) as ending:
            trainer = Trainer(config, world, store)
            ending.trainer = trainer
            trainer.train()
    finally:
        if trainer:
            trainer.close(failed=sys.exc_info()[0] is not None)
    trainer.say(f"done: step {trainer.step}, everything is in {config.run.dir}")
    return 0
