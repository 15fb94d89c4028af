"""Long runs in bfloat16 with compiled kernels and with eager ones: is the loss the same, but for rounding?

    python benchmarks/stability.py --input TEXTS... --work runs/stability [--systems mdlm ccdd replaid elf]

Every system is trained three times on the same tokens: with compiled kernels, with eager ones (BRAID_KERNELS), and with
eager ones and another seed. Noise is the same to the bit in the first two, so they may part by rounding alone; how far
two runs part that differ in the seed is the noise to compare with. `stability.png` and `stability.json` in the work
folder have the losses, smoothed over a twentieth of the run, and the distances between them over its last half, root
mean square. Everything is done by the `braid` command; a run that is there already is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

RECIPES = {"mdlm": "tiny_mdlm", "ccdd": "tiny_ccdd", "replaid": "tiny_replaid", "elf": "tiny_elf"}
WAYS = {"compiled": ("compiled", 0), "eager": ("eager", 0), "eager, another seed": ("eager", 1)}
"""Name -> (BRAID_KERNELS, run.seed)."""


def braid(*words: object, **environment: str) -> None:
    command = ["braid", *map(str, words)]
    print("$", shlex.join([f"{name}={value}" for name, value in environment.items()] + command), flush=True)
    subprocess.run(command, check=True, env=os.environ | environment)


def losses(run: Path) -> list[float]:
    """Of all log lines."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["split"] == "train"]


def smoothed(values: list[float]) -> list[float]:
    """Each with those before it, a twentieth of the run together."""
    window = max(1, len(values) // 20)
    return [statistics.fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def distance(first: list[float], second: list[float]) -> float:
    """Root mean square over the last half."""
    half = len(first) // 2
    return statistics.fmean((a - b) ** 2 for a, b in zip(first[half:], second[half:], strict=True)) ** 0.5


def draw(curves: dict[str, dict[str, list[float]]], steps: int, path: Path) -> None:
    figure, grid = plt.subplots(
        1, len(curves), figsize=(3.4 * len(curves), 3.2), constrained_layout=True, squeeze=False
    )
    styles = {"compiled": "C0-", "eager": "C1--", "eager, another seed": "C7:"}
    for axes, (system, found) in zip(grid[0], curves.items(), strict=True):
        for name, values in found.items():
            axes.plot([steps * (i + 1) / len(values) for i in range(len(values))], values, styles[name], label=name)
        axes.set_title(system)
        axes.set_xlabel("step")
    grid[0][0].set_ylabel("training loss, nats per token (ELF: its own)")
    grid[0][-1].legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="text files or folders, as for `braid prepare`")
    parser.add_argument("--work", type=Path, default=Path("runs/stability"))
    parser.add_argument("--systems", nargs="*", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--settings", nargs="*", default=[], help="KEY=VALUE for every run")
    args = parser.parse_args()

    data, curves, table = args.work / "data", {}, {}
    braid("prepare", "--input", *args.input, "--tokenizer", "train:512", "--output", data)
    for system in args.systems:
        curves[system] = {}
        for name, (kernels, seed) in WAYS.items():
            run = args.work / f"{system}-{kernels}-{seed}"
            braid("pretrain", RECIPES[system], f"run.dir={run}", f"data.path={data}", f"run.seed={seed}",
                  "run.precision=bf16", f"training.steps={args.steps}", "training.log_every=10",
                  "training.validate_every=0", "training.sample_every=0", *args.settings,
                  BRAID_KERNELS=kernels)  # fmt: skip
            curves[system][name] = smoothed(losses(run))
        compiled, eager, other = curves[system].values()
        table[system] = {
            "last_losses": {name: values[-1] for name, values in curves[system].items()},
            "compiled_from_eager": distance(compiled, eager),
            "seed_from_seed": distance(other, eager),
        }
        record = {"steps": args.steps, "distances": table, "curves": curves}
        (args.work / "stability.json").write_text(json.dumps(record) + "\n")
        draw(curves, args.steps, args.work / "stability.png")
    print("| system | last loss, compiled | eager | distance of the curves | of two seeds |\n|---|---|---|---|---|")
    for system, row in table.items():
        last = row["last_losses"]
        print(f"| {system} | {last['compiled']:.4f} | {last['eager']:.4f} | {row['compiled_from_eager']:.5f} | "
              f"{row['seed_from_seed']:.5f} |")  # fmt: skip


if __name__ == "__main__":
    main()
