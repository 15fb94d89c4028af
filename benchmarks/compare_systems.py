"""All systems on one corpus: same tokenizer, rows, tokens and size; one table of what each is worth.

    python benchmarks/compare_systems.py --input TEXTS... --tokenizer GPT2_FOLDER --work runs/compare

Prepares the corpus, trains a judge (an autoregressive model of its own, larger and longer than any row), then every
row, evaluates its likelihood figure and its samples under the judge, and writes `table.md` and `table.json` into the
work folder. It goes on where it stopped: what is trained or evaluated is kept. Everything is done by the `braid`
command; the commands are printed, so that any line can be repeated by hand. Speeds are measured apart, one row after
the other with all cores; they are those of one machine, so compare them with each other only.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROWS: dict[str, list[str]] = {
    "AR": ["objective.name=ar"],
    "MDLM": ["objective.name=mdlm"],
    "Duo": ["objective.name=duo"],
    "GIDD p_u=0.2": ["objective.name=gidd", "objective.p_uniform=0.2"],
    "CCDD MDiT, table encoder": ["objective.name=ccdd"],
    "CCDD control: features, no latent diffusion": ["objective.name=ccdd", "objective.latent_mode=features"],
    "CCDD control: random table": ["objective.name=ccdd", "objective.encoder.kind=random"],
    "CCDD control: embeddings of the MDLM row": [
        "objective.name=ccdd",
        "objective.encoder.kind=embeddings",
        "objective.encoder.path={MDLM}",
    ],
    "RePlaid": ["objective.name=replaid"],
    "Co-LADD": ["objective.name=co_ladd"],
    "Di-LADD": ["objective.name=di_ladd"],
    "ELF": ["objective.name=elf", "model.cond_dim=128", "optimizer.name=muon", "sampling.sampler=sde_marginal"],
}
"""Row -> overrides of the recipe `compare_base`; {NAME} is the run of another row, which is trained before."""

OTHER_SAMPLERS: dict[str, dict[str, Callable[[int, Path], list[object]]]] = {
    "Di-LADD": {
        "all codes first": lambda calls, _: [
            "--sampler",
            "sequential",
            "--latent-steps",
            calls // 2,
            "--steps",
            calls // 2,
        ],
        "codes of real rows": lambda calls, data: ["--sampler", "sequential", "--latents-of", data, "--steps", calls],
    },
}
"""Row -> name -> options of `braid sample` that make samples in a number of network calls, given the corpus: another
way to sample the model of a row, judged beside the row's own."""

HEADLINES = ("nll", "bound", "token_bound")
"""The figure that stands for a row: what the tokens cost. Of joint models the bound whose latents come from the visible
tokens; that of tokens and latents together has a column of its own."""

JUDGE = [
    "objective.name=ar",
    "model.width=256",
    "training.global_batch_size=32",
    "optimizer.lr=1e-3",
]
"""What sets the judge apart: wider, and four times the tokens of a row."""


SPEED = ["training.steps=16", "training.log_every=1", "training.validate_every=0"]
SPEED += ["optimizer.warmup_steps=1", "optimizer.decay_steps=1"]
"""The short run that is timed."""


def timed_settings(overrides: list[str], settings: list[str]) -> list[str]:
    """The row's own model, in the short run."""
    return overrides + settings + SPEED


def speed_run(run: Path) -> Path:
    return run.with_name(run.name + "_speed")


def reads_another(overrides: list[str]) -> bool:
    """Whether a row needs the run of another one."""
    return any(override.startswith("objective.encoder.path=") for override in overrides)


def braid(*words: object, log: Path | None = None, threads: int | None = None) -> None:
    """Runs a command; what it prints goes to `log` where one is given."""
    command = ["braid", *map(str, words)]
    print("$", shlex.join(command), flush=True)
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with open(log or os.devnull, "a") as file:
        subprocess.run(command, check=True, env=environment, stdout=file if log else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="text files or folders, as for `braid prepare`")
    parser.add_argument("--tokenizer", required=True, help="as for `braid prepare`")
    parser.add_argument("--work", type=Path, default=Path("runs/compare"), help="where everything goes")
    parser.add_argument("--settings", nargs="*", default=[], help="KEY=VALUE for every row, as for `braid pretrain`")
    parser.add_argument("--judge-settings", nargs="*", default=[], help="KEY=VALUE for the judge")
    parser.add_argument("--rows", nargs="*", help="only rows whose name contains one of these words")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time; each gets its share of the cores")
    parser.add_argument("--sequences", type=int, default=128, help="validation rows scored")
    parser.add_argument("--samples", type=int, default=64, help="samples judged for each number of steps")
    parser.add_argument("--sample-steps", default="8,32,128", help="numbers of denoising steps")
    parser.add_argument("--table-only", action="store_true", help="train nothing: write the table of what is there")
    args = parser.parse_args()

    data, judge = args.work / "data", args.work / "judge"
    rows = {name: overrides for name, overrides in ROWS.items()
            if not args.rows or any(word.lower() in name.lower() for word in args.rows)}  # fmt: skip
    runs = {name: args.work / name.lower().translate(str.maketrans(" ,:=", "____")) for name in ROWS}
    rows = {name: [override.format_map(runs) for override in overrides] for name, overrides in rows.items()}
    threads = max(1, len(os.sched_getaffinity(0)) // args.jobs)

    def train(run: Path, settings: list[str]) -> None:
        braid("pretrain", "compare_base", f"run.dir={run}", f"data.path={data}", *settings,
              log=run.with_suffix(".log"), threads=threads)  # fmt: skip

    def time(name: str) -> None:
        if not speed_run(runs[name]).exists():
            braid("pretrain", "compare_base", f"run.dir={speed_run(runs[name])}", f"data.path={data}",
                  *timed_settings(rows[name], args.settings), log=runs[name].with_suffix(".log"))  # fmt: skip

    def evaluate(name: str) -> None:
        evaluation = runs[name] / "comparison.json"
        if not evaluation.exists():
            steps = [] if name == "AR" else ["--sample-steps", args.sample_steps]  # AR takes one call a token
            braid("evaluate", runs[name], "--metrics", "bound,generative", "--sequences", args.sequences, "--draws", 4,
                  "--judge", judge, *steps, "--samples", args.samples, "--json", evaluation,
                  log=runs[name].with_suffix(".log"), threads=threads)  # fmt: skip
        for other, options in OTHER_SAMPLERS.get(name, {}).items():
            evaluate_sampler(runs[name], other, options)

    def evaluate_sampler(run: Path, other: str, options: Callable[[int, Path], list[object]]) -> None:
        evaluation = sampler_file(run, other)
        if evaluation.exists():
            return
        files = []
        for calls in args.sample_steps.split(","):
            files += ["--samples-file", evaluation.with_suffix(f".{calls}.jsonl")]
            braid("sample", run, "--num", args.samples, *options(int(calls), data), "--output", files[-1],
                  log=run.with_suffix(".log"), threads=threads)  # fmt: skip
        braid("evaluate", run, "--metrics", "generative", "--judge", judge, *files, "--samples", args.samples,
              "--json", evaluation, log=run.with_suffix(".log"), threads=threads)  # fmt: skip

    if not args.table_only:
        braid("prepare", "--input", *args.input, "--tokenizer", args.tokenizer, "--output", data,
              "--validation-fraction", "0.03")  # fmt: skip
        trained = [(judge, JUDGE + args.judge_settings)]
        trained += [(runs[name], overrides + args.settings) for name, overrides in rows.items()]
        first = [one for one in trained if not reads_another(one[1])]
        with ThreadPoolExecutor(args.jobs) as pool:
            for some in (first, [one for one in trained if one not in first]):
                list(pool.map(lambda one: train(*one), some))
            list(pool.map(evaluate, rows))
        for name in rows:
            time(name)
    results = [row(name, run, json.loads((run / "comparison.json").read_text()))
               for name, run in runs.items() if name in rows and (run / "comparison.json").exists()]  # fmt: skip
    for name, run in runs.items():
        for other in OTHER_SAMPLERS.get(name, {}):
            if name in rows and sampler_file(run, other).exists():
                evaluation = json.loads(sampler_file(run, other).read_text())
                results.append(sampler_row(f"{name}, {other}", evaluation, args.sample_steps.split(",")))
    (args.work / "table.json").write_text(json.dumps(results, indent=2) + "\n")
    text = table(results)
    (args.work / "table.md").write_text(text)
    print(text)


def sampler_file(run: Path, other: str) -> Path:
    """Where the evaluation of another sampler of a run is."""
    return run / f"comparison_{other.replace(' ', '_')}.json"


def sampler_row(name: str, evaluation: dict, calls: list[str]) -> dict:
    """One line of the table for a sampler: its samples, by the most network calls it may make, and nothing of the
    model's."""
    judged = [entry for entry in evaluation["generative"] if entry["name"] != "data"]
    generative = [entry | {"steps": int(number)} for entry, number in zip(judged, calls, strict=True)]
    return {"name": name, "bound": None, "label": "the model of the row", "generative": generative}


def row(name: str, run: Path, evaluation: dict) -> dict:
    """One line of the table, from the run's records."""
    environment = json.loads((run / "environment.json").read_text())
    timed = train_records(speed_run(run))[4:] or train_records(run)  # the first steps find their memory
    speeds = sorted(record["tokens_per_second"] for record in timed)
    bounds = {figure["name"]: figure for figure in evaluation["figures"] if figure["is_bound"]}
    first = next((bounds[name] for name in HEADLINES if name in bounds), None)
    return {
        "name": name,
        "bound": first and first["value"],
        "standard_error": first and first["standard_error"],
        "bits_per_byte": first and first["bits_per_byte"],
        "label": first["label"] if first else "n/a",
        "joint_nelbo": bounds["joint_nelbo"]["value"] if "joint_nelbo" in bounds else None,
        "figures": {figure["name"]: figure["value"] for figure in evaluation["figures"]},
        "unigram_entropy": evaluation["unigram_entropy"]["value"],
        "generative": evaluation.get("generative", []),
        "tokens_per_second": speeds[len(speeds) // 2],
        "parameters": environment["parameters"]["objective"],
        "frozen_parameters": environment["parameters"]["frozen_encoder"],
        "tokens": train_records(run)[-1]["tokens_seen"],
    }


def train_records(run: Path) -> list[dict]:
    """The training lines of a run's metrics; none where there is no such run."""
    file = run / "metrics.jsonl"
    records = map(json.loads, file.read_text().splitlines() if file.exists() else [])
    return [record for record in records if record["split"] == "train"]


def table(results: list[dict]) -> str:
    """The table in Markdown; what does not exist is n/a."""
    steps = sorted({entry["steps"] for result in results for entry in result["generative"] if entry.get("steps")})
    head = ["system", "nats per token", "bits per byte", "joint NELBO"]
    head += [f"judge perplexity (entropy of what it read), {s} steps" for s in steps]
    head += ["tokens/s", "parameters", "of a frozen encoder"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for result in results:
        judged = [entry for entry in result["generative"] if entry["name"] != "data"]
        by_steps = {entry["steps"] or round(entry["network_calls"]): entry for entry in judged}  # AR has calls alone
        is_model = "parameters" in result
        cells = [result["name"]]
        if result["bound"] is not None:
            cells.append(f"{result['bound']:.3f} ± {result['standard_error']:.3f}")
        else:
            cells.append("n/a" if is_model else "-")
        cells.append(_figure(result.get("bits_per_byte"), ".3f", "n/a" if is_model else "-"))
        cells.append(_figure(result.get("joint_nelbo"), ".2f"))
        cells += [_judged(by_steps.get(s)) for s in steps]
        for name, form in (("tokens_per_second", ".0f"), ("parameters", ","), ("frozen_parameters", ",")):
            cells.append(_figure(result.get(name), form))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _figure(value: float | None, form: str, missing: str = "-") -> str:
    return missing if value is None else format(value, form)


def _judged(entry: dict | None) -> str:
    """Perplexity with its standard error, and the entropy of the same tokens."""
    if entry is None or entry["perplexity"] is None:
        return "n/a"
    error = entry["perplexity"] * entry["standard_error"]
    return f"{entry['perplexity']:.0f} ± {error:.0f} ({entry['judge_entropy']:.2f})"


if __name__ == "__main__":
    sys.exit(main())
