"""The corpus every Python has: the language's documentation topics and the standard library's docstrings and source.

About ten megabytes of English and code that are there without a network. Files are read and parsed, never imported:
importing a standard module may print, open a window or start a browser.
"""

from __future__ import annotations

import ast
import platform
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import xxhash

from braid.data_pipeline.readers import Piece
from braid.kernels.errors import InputError

LEFT_OUT = frozenset({
    "site-packages", "dist-packages",  # not the standard library
    "test", "tests", "idle_test", "__phello__",
    "encodings",  # a hundred nearly equal tables, which would land on both sides of the split
    "pydoc_data",  # its text is taken as documentation topics
})  # fmt: skip
"""Folders that are not read."""

SMALLEST_USEFUL = 1 << 20
"""Bytes of text below which this Python is taken to lack its standard library's source."""


class EmbeddedCorpus:
    """The documents, with the interface of `readers.TextFiles`. A package is one group: its modules quote one another,
    so a validation text is never a copy of a training text."""

    num_ignored = 0
    has_pairs = False
    first_validation = None

    def __init__(self, library: Path | None = None) -> None:
        """`library`: the folder of the standard library's .py files; by default the running interpreter's."""
        self.library = library or Path(sysconfig.get_paths()["stdlib"])
        self.position = 0

    @cached_property
    def _documents(self) -> list[tuple[str, str, str]]:
        found = sorted([*_topics(self.library), *_modules(self.library)])
        size = sum(len(text.encode("utf-8")) for _, _, text in found)
        if size < SMALLEST_USEFUL:
            raise InputError(
                "this Python comes without the source of its standard library",
                found=f"{len(found)} documents, {size} bytes in {self.library}",
                change="install it (on Debian: apt install libpython3-stdlib), or prepare your own text with --input",
            )
        return found

    @cached_property
    def total_bytes(self) -> int:
        return sum(len(text.encode("utf-8")) for _, _, text in self._documents)

    def describe(self) -> list[dict]:
        """One entry for the whole library, in the form of `TextFiles.describe`."""
        digest = xxhash.xxh3_64()
        for group, document, text in self._documents:
            digest.update("\0".join((group, document, text, "")).encode("utf-8"))
        name = f"standard library of Python {platform.python_version()}"
        return [{"name": name, "bytes": self.total_bytes, "xxh3": digest.hexdigest()}]

    def pieces(self, first_file: int = 0) -> Iterator[Piece]:
        """Every document is one piece of a file of its own."""
        self.position = 0
        for number, (group, document, text) in enumerate(self._documents):
            num_bytes = len(text.encode("utf-8"))
            self.position += num_bytes
            if number >= first_file:
                yield Piece(number, 0, 0, document, group, text, num_bytes, True)


def _topics(library: Path) -> Iterator[tuple[str, str, str]]:
    """(group, document id, text) of the topics behind `help("with")` and the like."""
    path = library / "pydoc_data" / "topics.py"
    source = _source(path) if path.is_file() else None
    if source is None:  # some distributions leave it out; the rest of the library is enough
        return
    for statement in ast.parse(source).body:
        targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "topics" for target in targets):
            for topic, text in ast.literal_eval(statement.value).items():
                yield f"topic:{topic}", f"topic:{topic}", text


def _modules(library: Path) -> Iterator[tuple[str, str, str]]:
    """(group, document id, text) of each module: its docstrings as one document, its source as another."""
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        # _sysconfigdata holds the paths and compiler flags of one build, nothing to learn and different everywhere.
        if LEFT_OUT.intersection(parts[:-1]) or parts[-1].startswith("_sysconfigdata"):
            continue
        source = _source(path)
        tree = _parsed(source) if source and source.strip() else None
        if tree is None:
            continue
        module = ".".join(parts).removesuffix(".__init__")
        if docstrings := _docstrings(tree, module):
            yield parts[0], f"{module}:docstrings", docstrings
        yield parts[0], f"{module}:source", source


def _source(path: Path) -> str | None:
    """Text of a Python file in the encoding it declares; None where that cannot be had: a few old files are broken."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (UnicodeDecodeError, SyntaxError, PermissionError):
        return None


def _parsed(source: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old modules write "\d"
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):  # templates and files of other Python versions
            return None


def _docstrings(tree: ast.Module, module: str) -> str:
    """`name`, newline, docstring of the module and of every class and function in it, in their order."""
    found = []

    def visit(node: ast.AST, name: str) -> None:
        if docstring := ast.get_docstring(node):
            found.append(f"{name}\n\n{docstring}\n")
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, f"{name}.{child.name}")

    visit(tree, module)
    # An escape like "\ud800" makes a character that UTF-8 does not have.
    return "\n\n".join(found).encode("utf-8", "backslashreplace").decode("utf-8")
