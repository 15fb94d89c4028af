"""RePlaid's learned noise schedule against a frozen and a linear one: the diffusion loss over time, as a figure.

    python benchmarks/learned_schedule.py --input TEXTS... --work runs/schedules

Trains `own_text` with `objective.name=replaid` for each schedule. `schedules.png` and `schedules.json` in the work
folder have the loss in ten intervals of time over the last fifth of each run, its unevenness (standard deviation over
mean), and the validation bound. Everything is done by the `braid` command; a run that is there already is kept.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

SCHEDULES = ("learned", "frozen", "linear")


def braid(*words: object) -> None:
    command = ["braid", *map(str, words)]
    print("$", shlex.join(command), flush=True)
    subprocess.run(command, check=True)


def result(run: Path) -> dict:
    """What a run's metrics say: the loss over time late in training, and the last validation."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training = [record for record in records if record["split"] == "train"]
    late = [record["loss_by_time"] for record in training if record["step"] > 0.8 * training[-1]["step"]]
    columns = [[value for value in column if value is not None] for column in zip(*late, strict=True)]
    curve = [statistics.fmean(column) for column in columns]
    validation = [record for record in records if record["split"] == "validation"][-1]
    return {
        "loss_by_time": curve,
        "unevenness": statistics.pstdev(curve) / statistics.fmean(curve),
        "bound": validation["loss"],
        "standard_error": validation["standard_error"],
        "tokens": training[-1]["tokens_seen"],
    }


def draw(results: dict[str, dict], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.6), constrained_layout=True)
    for name, found in results.items():
        times = [(index + 0.5) / len(found["loss_by_time"]) for index in range(len(found["loss_by_time"]))]
        axes.plot(times, found["loss_by_time"], marker="o", label=f"{name}: deviation / mean {found['unevenness']:.2f}")
    axes.set_xlabel("diffusion time t")
    axes.set_ylabel("diffusion loss, nats per token")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="text files or folders, as for `braid prepare`")
    parser.add_argument("--tokenizer", default="train:512", help="as for `braid prepare`")
    parser.add_argument("--work", type=Path, default=Path("runs/schedules"))
    parser.add_argument("--schedules", nargs="*", default=SCHEDULES, help="which of learned, frozen and linear")
    parser.add_argument("--settings", nargs="*", default=[], help="KEY=VALUE for every run")
    args = parser.parse_args()

    data = args.work / "data"
    braid("prepare", "--input", *args.input, "--tokenizer", args.tokenizer, "--output", data)
    results = {}
    for name in args.schedules:
        run = args.work / name
        braid("pretrain", "own_text", f"run.dir={run}", f"data.path={data}", "objective.name=replaid",
              f"objective.gamma_schedule={name}", *args.settings)  # fmt: skip
        results[name] = result(run)
        (args.work / "schedules.json").write_text(json.dumps(results, indent=2) + "\n")
        draw(results, args.work / "schedules.png")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
