"""`braid pretrain --help`: every field of the configuration with its type, default and docstring."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import get_type_hints

from braid.pretrain.config import schema
from braid.pretrain.config.load import recipe_path
from braid.pretrain.config.schema import OBJECTIVES, Config

WIDTH = 110


def help_text() -> str:
    """All fields, grouped by section; one group for each objective."""
    documentation = field_docstrings()
    lines: list[str] = []
    for section, cls in _sections():
        title = f"{section} ({cls.name})" if section == "objective" else section
        lines += ["", *textwrap.wrap(f"{title}: {inspect.getdoc(cls)}", WIDTH, subsequent_indent="  ")]
        lines += _describe(cls, section, documentation)
    return "\n".join(lines[1:]) + "\n"


def field_docstrings() -> dict[tuple[str, str], str]:
    """(class, field) -> the docstring written under the field in schema.py."""
    found = {}
    for cls in ast.parse(inspect.getsource(schema)).body:
        if isinstance(cls, ast.ClassDef):
            for field, below in zip(cls.body, cls.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                    assert isinstance(field.target, ast.Name) and isinstance(below.value, ast.Constant)
                    found[cls.name, field.target.id] = inspect.cleandoc(below.value.value)
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


def _describe(cls: type, path: str, documentation: dict[tuple[str, str], str]) -> Iterator[str]:
    hints = get_type_hints(cls)
    for field in fields(cls):
        kind, name = hints[field.name], f"{path}.{field.name}"
        if is_dataclass(kind):
            yield from _describe(kind, name, documentation)
            continue
        assert field.default is not MISSING, f"{name} has no default"
        yield f"  {name}: {kind.__name__} = {_show(field.default)}"
        indent = " " * 6
        text = documentation[cls.__name__, field.name]
        yield from textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)


def _show(value: object) -> str:
    """A default as it is written in a recipe."""
    if isinstance(value, str):
        return value or '""'
    return str(value).lower() if isinstance(value, bool) else str(value)
