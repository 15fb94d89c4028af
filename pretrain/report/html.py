"""`report.html` of a run: one file with its numbers, curves, samples and settings, that asks nothing of the network.

The same run directory gives the same bytes. What a run does not have, the page says it does not have.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from braid.kernels.errors import InputError

from . import formatting
from .curves import learns_schedule, schedule_charts, speed_charts, term_charts, time_chart, training_charts
from .data import data_of
from .denoising import trajectory_of
from .formatting import count, duration, fixed, known, plus_minus
from .quality import quality_of
from .reading import Run, read_run
from .results import results_of

ASSETS = Path(__file__).parent / "assets"
OBJECTIVES = {
    "ar": "Autoregressive language model",
    "mdlm": "Masked diffusion (MDLM)",
    "duo": "Uniform-state diffusion (Duo)",
    "gidd": "Hybrid masked and uniform diffusion (GIDD)",
    "ccdd": "Joint continuous and discrete diffusion (CCDD)",
    "replaid": "Continuous embedding diffusion (RePlaid)",
    "co_ladd": "Masked diffusion beside continuous latents (Co-LADD)",
    "di_ladd": "Masked diffusion beside discrete codes (Di-LADD)",
    "elf": "Embedded language flow (ELF)",
    "t5": "Encoder by span corruption (T5)",
}
MAX_SAMPLES, MAX_SAMPLE_TEXT, MAX_ALL_SAMPLES_TEXT = 24, 6_000, 300_000  # characters
MAX_CONFIG_TEXT = 100_000


def write_report(run_dir: Path, *, comparisons: Sequence[Path] = (), output: Path | None = None) -> Path:
    """Write the report of `run_dir` to `output` (default `<run_dir>/report.html`) and return its path.

    `comparisons` are other run directories, drawn in the same figures and listed in the same table. Raises InputError
    when a directory is missing or one of its files is damaged. The file appears whole or not at all.
    """
    run, *beside = (read_run(Path(folder)) for folder in (run_dir, *comparisons))
    path = Path(output) if output is not None else run.folder / "report.html"
    if not path.parent.is_dir():
        raise InputError("The folder of the report does not exist", found=str(path.parent), change="create it first")
    text = render(run, beside)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_bytes(text.encode("utf-8", errors="replace"))  # a text may hold half of a surrogate pair
    os.replace(unfinished, path)
    return path


def templates() -> jinja2.Environment:
    """The pages of ASSETS, which may show each other's assets."""
    loader = jinja2.FileSystemLoader(ASSETS)
    pages = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    pages.globals |= {"asset": lambda name: Markup((ASSETS / name).read_text(encoding="utf-8")), "show": formatting}
    return pages


def render(run: Run, beside: Sequence[Run] = ()) -> str:
    """The page as text."""
    names = _names(run, beside)
    return (
        templates()
        .get_template("report.html.jinja")
        .render(
            run=run,
            title=names[0],
            objective=_objective(run),
            facts=_facts(run),
            results=results_of(run, beside, names),
            quality=quality_of(run, beside, names),
            last_validation=_last_validation(run),
            training_charts=training_charts((run, *beside), names),
            data=data_of(run, beside, names),
            term_charts=term_charts(run),
            num_lost=sum(int(np.isnan(columns["loss"]).sum()) for columns in (run.train, run.validation)),
            mixed_objectives=len({each.objective for each in (run, *beside)}) > 1,
            time_chart=time_chart(run),
            schedule_charts=schedule_charts(run.schedule),
            schedule_note=_schedule_note(run),
            speed_charts=speed_charts(run),
            mfu_known=run.train.has("mfu"),
            trajectory=trajectory_of(run.trajectory),
            samples=_sample_groups(run),
            sample_entropy=_sample_entropy(run.evaluation),
            config_lines=list(_config_lines(run.config_text)),
            environment=_environment(run.environment),
        )
    )


# -- the head of the page --------------------------------------------------------------------------------------


def _names(run: Run, beside: Sequence[Run]) -> list[str]:
    """Folder names, with the folder above where two runs have the same."""
    short = [each.name for each in (run, *beside)]
    return [
        name if short.count(name) == 1 else f"{each.folder.parent.name}/{name}"
        for each, name in zip((run, *beside), short, strict=True)
    ]


def _objective(run: Run) -> str:
    return OBJECTIVES.get(run.objective or "", run.objective or "Objective not recorded")


def _facts(run: Run) -> list[tuple[str, str]]:
    """Label and value, in the order shown; a fact the run did not record says so."""
    parameters = ((run.environment or {}).get("parameters") or {}).get("total")
    step, planned = run.train.last("step"), run.setting("training", "steps")
    steps = None
    if step is not None:
        steps = fixed(step, 0) + (f" of {planned:,}" if isinstance(planned, int) else "")
    width, layers = run.setting("model", "width"), run.setting("model", "num_layers")
    entries = [
        ("Parameters", count(parameters) if known(parameters) else None),
        ("Shape", f"{layers} layers × {width}" if layers and width else None),
        ("Tokens seen", count(run.train.last("tokens_seen")) if run.train.has("tokens_seen") else None),
        ("Steps", steps),
        ("Training time", duration(run.train.last("seconds")) if run.train.has("seconds") else None),
        ("Device", (run.environment or {}).get("device")),
    ]
    return [(label, str(value) if value is not None else "not recorded") for label, value in entries]


def _last_validation(run: Run) -> dict[str, str] | None:
    if not run.validation.has("loss"):
        return None
    loss = plus_minus(run.validation.last("loss"), run.validation.last("standard_error"))
    name = run.headline.replace("_", " ")
    unit = "nats per token" if run.unit(run.headline) == "nats" else f"mean per token ({name}, no likelihood)"
    return {"loss": loss, "unit": unit, "step": fixed(run.validation.last("step"), 0)}


def _schedule_note(run: Run) -> str:
    """When a schedule that is learned was like this; empty for one that is not."""
    if not learns_schedule(run) or not run.schedule:
        return ""
    step = run.schedule.get("step")
    when = f"at step {step:,}" if known(step) else "when training began, or was last resumed"
    return f"The noise schedule is learned with the model; the curves show it {when}."


# -- samples, configuration, environment -----------------------------------------------------------------------


def _sample_groups(run: Run) -> dict[str, Any] | None:
    """Samples by step, newest first, within the page's budget; None where there are none."""
    if not run.samples:
        return None
    groups: dict[str, list[dict[str, Any]]] = {}
    budget = MAX_ALL_SAMPLES_TEXT
    num_shown = 0
    for sample in run.samples:
        text = formatting.printable(str(sample.get("text") or ""))
        shown = text[:MAX_SAMPLE_TEXT]
        if num_shown == MAX_SAMPLES or len(shown) > budget:
            break
        budget -= len(shown)
        num_shown += 1
        step = f"Step {sample['step']:,}" if known(sample.get("step")) else "Step not recorded"
        facts = _about(sample)
        groups.setdefault(step, []).append({"text": shown, "cut": len(text) - len(shown), "facts": facts})
    return {"groups": list(groups.items()), "num_shown": num_shown, "num_all": len(run.samples)}


def _about(sample: dict[str, Any]) -> list[str]:
    tokens = sample.get("tokens")
    num_tokens = len(tokens) if isinstance(tokens, list) else tokens
    facts = [
        *_sampler(sample.get("sampler")),
        f"{sample['network_calls']:,} network calls" if known(sample.get("network_calls")) else None,
        f"{num_tokens:,} tokens" if known(num_tokens) else None,
        f"entropy {fixed(sample['entropy'], 2)} nats" if known(sample.get("entropy")) else None,
        f"seed {sample['seed']}" if sample.get("seed") is not None else None,
    ]
    return [fact for fact in facts if fact]


def _sampler(settings: Any) -> list[str]:
    """The sampler's settings, without those that change nothing at their value."""
    if not isinstance(settings, dict):
        return [str(settings)] if settings else []
    return [
        f"{value:,} steps" if name == "steps" else f"{name.replace('_', ' ')} {value}"
        for name, value in settings.items()
        if value not in (False, "") and not (name not in ("steps", "latent_steps") and value == 1)
    ]


def _sample_entropy(evaluation: dict[str, Any] | None) -> str:
    """A sentence on the entropy of the samples an evaluation drew; empty when it drew none."""
    drawn = (evaluation or {}).get("samples")
    if not isinstance(drawn, dict) or not known(drawn.get("entropy")):
        return ""
    size = plus_minus(drawn["entropy"], drawn.get("standard_error"))
    return f"The evaluation drew {drawn.get('num')}: {size} nats, {drawn.get('network_calls')} network calls each."


def _config_lines(text: str) -> Iterator[Markup]:
    """Lines of YAML with their keys marked."""
    for line in text[:MAX_CONFIG_TEXT].splitlines():
        key = re.match(r"(\s*(?:- )?)([\w.-]+:)(.*)$", line)
        yield Markup("{}<b>{}</b>{}").format(*key.groups()) if key else Markup("{}").format(line)


def _environment(environment: dict[str, Any] | None) -> list[tuple[str, str]]:
    names = {"cuda": "CUDA", "cudnn": "cuDNN", "memory_gib": "Memory (GiB)"}
    entries = []
    for key, value in (environment or {}).items():
        if value is not None and not isinstance(value, (dict, list)):
            shown = ("yes" if value else "no") if isinstance(value, bool) else value
            entries.append((names.get(key, key.replace("_", " ").capitalize()), str(shown)))
    return entries
