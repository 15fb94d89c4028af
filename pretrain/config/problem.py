"""One thing that is wrong with a configuration, and how a list of them is reported."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from braid.kernels.errors import ConfigError


@dataclass(frozen=True)
class Problem:
    """What is wrong, the values found, what to change: the three parts of every error message."""

    what: str
    found: str = ""
    change: str = ""


def configuration_error(problems: Sequence[Problem]) -> ConfigError:
    """One error that reports every problem, numbered when there are several."""
    assert problems, "an error needs a problem"
    if len(problems) == 1:
        (problem,) = problems
        return ConfigError(problem.what, found=problem.found, change=problem.change)
    lines = [f"the configuration has {len(problems)} problems"]
    for number, problem in enumerate(problems, 1):
        lines.append(f"{number:3}. {problem.what}")
        if problem.found:
            lines.append(f"     found:  {problem.found}")
        if problem.change:
            lines.append(f"     change: {problem.change}")
    return ConfigError("\n".join(lines))


def nearest(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The entries of `known` most like `word`, best first; none when nothing is alike."""
    return difflib.get_close_matches(word, list(known), n=count, cutoff=0.6)


def listed(words: Iterable[str], joint: str = "or") -> str:
    """`a`, `a or b`, `a, b or c`."""
    words = list(words)
    return f" {joint} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
