"""`braid pretrain --help`: every field of the configuration with its type, default and docstring."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import get_args, get_origin, get_type_hints

from braid.pretrain.config.load import entry_form, recipe_path
from braid.pretrain.config.objectives import OBJECTIVES
from braid.pretrain.config.schema import Config

WIDTH = 110


def help_text() -> str:
    """All fields, grouped by section; one group for each objective."""
    lines: list[str] = []
    for section, cls in _sections():
        title = f"{section} ({cls.name})" if section == "objective" else section
        lines += ["", *textwrap.wrap(f"{title}: {inspect.getdoc(cls)}", WIDTH, subsequent_indent="  ")]
        lines += _describe(cls, section)
    return "\n".join(lines[1:]) + "\n"


@functools.cache
def field_docstrings(cls: type) -> dict[str, str]:
    """Field -> the docstring written under it in the class, or in the one it is inherited from."""
    found = {}
    for owner in (owner for owner in reversed(cls.__mro__) if is_dataclass(owner)):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body
        for field, below in zip(body, body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                assert isinstance(field.target, ast.Name) and isinstance(below.value, ast.Constant)
                found[field.target.id] = inspect.cleandoc(below.value.value)
    return found


def recipe_summary(name: str) -> str:
    """The first sentence of the comment that opens a recipe."""
    comment = []
    for line in recipe_path(name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    return " ".join(comment).split(". ")[0].rstrip(".")


def _sections() -> Iterator[tuple[str, type]]:
    hints = get_type_hints(Config)
    for field in fields(Config):
        if field.name == "objective":
            yield from (("objective", cls) for cls in OBJECTIVES.values())
        else:
            yield field.name, hints[field.name]


def _describe(cls: type, path: str) -> Iterator[str]:
    hints = get_type_hints(cls)
    for field in fields(cls):
        kind, name = hints[field.name], f"{path}.{field.name}"
        if is_dataclass(kind):
            yield from _describe(kind, name)
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        assert default is not MISSING, f"{name} has no default"
        yield f"  {name}: {_kind(kind)} = {_show(default)}"
        indent = " " * 6
        text = field_docstrings(cls)[field.name]
        yield from textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)


def _kind(kind: type) -> str:
    """A type as a value of it is written in a recipe."""
    if get_origin(kind) is dict:
        return f"{{name: {get_args(kind)[1].__name__}, ...}}"
    return f"[{entry_form(get_args(kind)[0])}, ...]" if get_origin(kind) is tuple else kind.__name__


def _show(value: object) -> str:
    """A default as it is written in a recipe."""
    if isinstance(value, str):
        return value or '""'
    if isinstance(value, tuple):
        return str(list(value))
    return str(value).lower() if isinstance(value, bool) else str(value)
