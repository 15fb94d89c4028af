"""Sudoku: masked and joint diffusion trained on (puzzle, solution) pairs; exact match against denoising steps.

    python benchmarks/sudoku.py --input PUZZLES.csv.gz... --work runs/sudoku [--overrides KEY=VALUE...]

A line of the input is `puzzle,solution`, 81 digits each, 0 where a cell is blank. Some puzzles are held out; the
others are written several times under symmetries that keep them a Sudoku (relabelled digits, permuted bands, stacks,
rows and columns, transposed). `--clues` makes all of them easier: cells of the solution are given away until a puzzle
has so many. Everything is done by the `braid` command, and goes on where it stopped.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RECIPES = ("sudoku_mdlm", "sudoku_ccdd")


def read(paths: list[Path]) -> list[tuple[str, str]]:
    """(puzzle, solution) pairs of CSV files."""
    pairs = []
    for path in paths:
        opened = gzip.open(path, "rt") if path.suffix == ".gz" else open(path)
        with opened as file:
            pairs += [tuple(line.strip().split(",")[:2]) for line in file if line.strip()]
    pairs = [pair for pair in pairs if len(pair) == 2 and all(len(grid) == 81 and grid.isdigit() for grid in pair)]
    assert pairs, "no line of the input is `puzzle,solution` with 81 digits each"
    return pairs


def symmetry(rng: random.Random) -> tuple[list[int], str]:
    """A cell permutation and a relabelling that turn a Sudoku into another one."""

    def lines() -> list[int]:
        return [3 * band + line for band in rng.sample(range(3), 3) for line in rng.sample(range(3), 3)]

    rows, columns, transposed = lines(), lines(), rng.random() < 0.5
    cells = [(c * 9 + r) if transposed else (r * 9 + c) for r in rows for c in columns]
    return cells, "0" + "".join(rng.sample("123456789", 9))


def with_clues(puzzle: str, solution: str, num: int, rng: random.Random) -> str:
    """The puzzle with blank cells filled in at random, until `num` are filled."""
    blank = [cell for cell, digit in enumerate(puzzle) if digit == "0"]
    given = set(rng.sample(blank, max(0, num - (81 - len(blank)))))
    return "".join(solution[cell] if cell in given else digit for cell, digit in enumerate(puzzle))


def write_pairs(pairs: list[tuple[str, str]], copies: int, clues: int, path: Path, seed: int) -> None:
    """JSON lines {"source": puzzle, "target": solution}: every pair, and `copies` - 1 symmetric ones of it."""
    rng = random.Random(seed)
    with open(path, "w") as file:
        for grids in pairs:
            for copy in range(copies):
                cells, digits = symmetry(rng) if copy else (list(range(81)), "0123456789")
                puzzle, solution = ("".join(digits[int(grid[cell])] for cell in cells) for grid in grids)
                puzzle = with_clues(puzzle, solution, clues, rng)
                file.write(json.dumps({"source": puzzle, "target": solution}) + "\n")


def braid(*words: object) -> None:
    command = ["braid", *map(str, words)]
    print("$", shlex.join(command), flush=True)
    subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/sudoku"))
    parser.add_argument("--copies", type=int, default=4, help="symmetric versions of each training puzzle")
    parser.add_argument("--clues", type=int, default=0, help="give cells away until each puzzle has so many")
    parser.add_argument("--steps", default="1,2,3,5,10,20,81", help="numbers of denoising steps")
    parser.add_argument("--puzzles", type=int, default=500, help="held-out puzzles answered")
    parser.add_argument("--overrides", nargs="*", default=[], help="key=value for both recipes")
    parser.add_argument("--jobs", type=int, default=1, help="recipes at a time")
    args = parser.parse_args()

    args.work.mkdir(parents=True, exist_ok=True)
    pairs = read(args.input)
    random.Random(0).shuffle(pairs)
    corpora = {"heldout": (pairs[: 2 * args.puzzles], 1), "data": (pairs[2 * args.puzzles :], args.copies)}
    for name, (some, copies) in corpora.items():
        source = args.work / f"{name}.jsonl"
        if not source.exists():
            write_pairs(some, copies, args.clues, source, seed=0)
        fraction = 0.5 if name == "heldout" else 0.001
        braid("prepare", "--pairs", "--input", source, "--tokenizer", "bytes", "--output", args.work / name,
              "--validation-fraction", fraction)  # fmt: skip

    def train_and_answer(recipe: str) -> None:
        run = args.work / recipe
        braid("pretrain", recipe, f"run.dir={run}", f"data.path={args.work / 'data'}", *args.overrides)
        braid("evaluate", run, "--data", args.work / "heldout", "--metrics", "bound,conditional",
              "--sequences", args.puzzles, "--samples", args.puzzles, "--sample-steps", args.steps,
              "--batch-size", 100, "--json", run / "sudoku.json")  # fmt: skip

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(train_and_answer, RECIPES))


if __name__ == "__main__":
    main()
