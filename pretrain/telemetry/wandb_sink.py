"""Weights & Biases, when it is asked for: the records of metrics.jsonl, sent on.

metrics.jsonl is the record of a run and is written first; W&B is a copy. So nothing that happens to W&B once the run
has started stops the run, but it is always said. What the user can put right before the start (the package is not
installed, no API key) is an error.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from braid.kernels.capabilities import require
from braid.kernels.errors import InputError
from braid.pretrain.checkpoint.files import write_atomically
from braid.pretrain.config.schema import Config

INIT_TIMEOUT_S = 30
"""Patience with the server at the start; after it the run is logged offline."""
FINISH_TIMEOUT_S = 20
"""Patience with uploads at the end, within the grace a scheduler gives; `wandb sync` sends the rest later."""


class WandbSink:
    """One W&B run for one run directory, however often that is resumed: the id is kept in `<run>/wandb_id`."""

    def __init__(self, run: Any, report: Callable[[str], None]) -> None:
        self._run, self._report = run, report

    @staticmethod
    def start(
        config: Config, run_dir: Path, *, enabled: bool = True, report: Callable[[str], None] = print
    ) -> WandbSink:
        """As `config.telemetry` says: `off`, `online` or `offline`. Where the server cannot be reached, offline.

        Args:
            enabled: False on the ranks that send nothing.
            report: told in one line what went wrong with W&B.

        Raises:
            BraidError: the package is missing; InputError: online is asked for without an API key.
        """
        telemetry = config.telemetry
        if telemetry.wandb == "off" or not enabled:
            return WandbSink(None, report)
        wandb = require("wandb")
        settings = {"init_timeout": INIT_TIMEOUT_S}
        if hasattr(wandb.Settings(), "finish_timeout"):  # not in every version that will do
            settings["finish_timeout"] = FINISH_TIMEOUT_S

        def begin(mode: str) -> Any:
            return wandb.init(
                project=telemetry.wandb_project,
                name=telemetry.wandb_name or run_dir.resolve().name,
                id=_run_id(run_dir),
                resume="allow",
                mode=mode,
                dir=str(run_dir),
                config=dataclasses.asdict(config),
                allow_val_change=True,  # a resumed run may be longer than it was planned to be
                settings=wandb.Settings(**settings),
            )

        def failed(error: Exception) -> None:
            if isinstance(error, (wandb.errors.UsageError, wandb.errors.AuthenticationError)):
                raise InputError(
                    f"telemetry.wandb is {telemetry.wandb}, and W&B refuses",
                    found=str(error),
                    change="run `wandb login` or set WANDB_API_KEY, or set telemetry.wandb=offline or off",
                ) from error
            report(f"W&B did not start ({_first_line(error)})")
            with _surviving(lambda error: None):
                wandb.teardown()  # the service that failed would go on holding the run's id

        with _surviving(failed):
            return WandbSink(begin(telemetry.wandb), report)
        if telemetry.wandb == "online":
            report(f"logging offline instead, below {run_dir / 'wandb'}: `wandb sync` sends it later")
            with _surviving(failed):
                return WandbSink(begin("offline"), report)
        report("the run goes on without W&B; metrics.jsonl has everything")
        return WandbSink(None, report)

    def write(self, record: dict[str, Any]) -> None:
        """Send one record: `train/loss`, `validation/terms/...`, at the record's step."""
        if self._run is None:
            return
        values = dict(_flat({key: value for key, value in record.items() if key not in ("step", "split")}))
        with _surviving(self._give_up):
            self._run.log({f"{record['split']}/{key}": value for key, value in values.items()}, step=record["step"])

    def close(self, exit_code: int = 0) -> None:
        """End the run on W&B's side: 0 finished, anything else failed."""
        if self._run is None:
            return
        with _surviving(self._give_up):
            self._run.finish(exit_code=exit_code)
        self._run = None

    def _give_up(self, error: Exception) -> None:
        self._report(f"W&B failed ({_first_line(error)}); the run goes on without it, metrics.jsonl has everything")
        self._run = None


@contextmanager
def _surviving(on_error: Callable[[Exception], None]) -> Iterator[None]:
    """Hand errors of W&B, its service or the network to `on_error`; our own mistakes pass through.

    W&B's exceptions have no common base class, but a common home.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.split(".")[0] != "wandb":
            raise
        on_error(error)


def _run_id(run_dir: Path) -> str:
    """The id of this run directory, made up once."""
    path = run_dir / "wandb_id"
    if not path.exists():
        write_atomically(path, f"{secrets.token_hex(4)}\n".encode())
    return path.read_text().strip()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Nested dictionaries and lists as `a/b/0` -> number; what is None is left out."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return [] if value is None else [(prefix, value)]
    return [pair for key, item in items for pair in _flat(item, f"{prefix}/{key}" if prefix else str(key))]
