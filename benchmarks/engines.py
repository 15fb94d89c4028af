"""What an engine costs: step time of DeepSpeed and Megatron-core beside plain torch, one process, in one sitting.

    python benchmarks/engines.py --data data/own [--recipe own_text] [--settings KEY=VALUE...] [--json engines.json]

Each engine trains the same few steps under torchrun with one process (NCCL on a GPU, gloo on a CPU), the engines in
turn, several times over. A figure is the median over all rounds of the median step; the overhead is its ratio to plain
torch's, with the smallest and the largest ratio of a round beside it: trust it no further than these agree.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ENGINES = {
    "plain": [],
    "ZeRO-1": ["parallel.engine=deepspeed", "parallel.zero=1"],
    "ZeRO-2": ["parallel.engine=deepspeed", "parallel.zero=2"],
    "ZeRO-3": ["parallel.engine=deepspeed", "parallel.zero=3"],
    "Megatron": ["parallel.engine=megatron"],
}
WARM_UP = 5
"""First steps, which are left out."""
ALWAYS = ["training.log_every=1", "training.validate_every=0", "training.sample_every=0", "training.ema_decay=0"]


def step_seconds(engine: str, recipe: str, data: str, steps: int, settings: list[str]) -> tuple[float, dict]:
    """Median seconds of a step, and what the run says of its machine."""
    run = Path(tempfile.mkdtemp(prefix="braid-engines-")) / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command += ["-m", "braid.pretrain", recipe, f"run.dir={run}", f"data.path={data}", f"training.steps={steps}"]
    command += ["optimizer.warmup_steps=1", *ALWAYS, *ENGINES[engine], *settings]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    environment = json.loads((run / "environment.json").read_text())
    train = [line for line in lines if line["split"] == "train"]
    tokens = train[0]["tokens_seen"]
    shutil.rmtree(run.parent)
    return statistics.median(tokens / line["tokens_per_second"] for line in train[WARM_UP:]), environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a prepared corpus")
    parser.add_argument("--recipe", default="own_text")
    parser.add_argument("--settings", nargs="*", default=[], help="KEY=VALUE, as for `braid pretrain`")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--json", type=Path, help="where the figures go")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {engine: [] for engine in args.engines}
    environment: dict = {}
    for number in range(args.rounds):
        for engine in args.engines:
            median, environment = step_seconds(engine, args.recipe, args.data, args.steps, args.settings)
            seconds[engine].append(median)
            print(f"round {number + 1}: {engine} {1000 * median:.1f} ms a step", file=sys.stderr, flush=True)
    print("| engine | ms a step | beside plain (least, most of a round) |\n|---|---|---|")
    for engine, found in seconds.items():
        ratios = [a / b for a, b in zip(found, seconds[args.engines[0]], strict=True)]
        ratio = statistics.median(found) / statistics.median(seconds[args.engines[0]])
        milliseconds = 1000 * statistics.median(found)
        print(f"| {engine} | {milliseconds:.1f} | {ratio:.3f} ({min(ratios):.3f}, {max(ratios):.3f}) |")
    if args.json:
        record = {"command": sys.argv, "environment": environment, "seconds": seconds}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
