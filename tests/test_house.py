"""Rules of the house that no single module can keep by itself."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("launch", "pretrain", "parallel", "data_pipeline", "kernels")
MAY_IMPORT = {
    "launch": {"launch", "pretrain", "parallel", "data_pipeline", "kernels"},
    "pretrain": {"pretrain", "parallel", "data_pipeline", "kernels"},
    "parallel": {"parallel", "kernels"},
    "data_pipeline": {"data_pipeline", "kernels"},
    "kernels": {"kernels"},
}
LONGEST_FILE = 500
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Absolute dotted names of everything a file imports, wherever in it."""
    names = set()
    package = ["braid", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def test_imports_go_one_way():
    assert len(SOURCES) > 10
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in SOURCES
        for name in sorted(imported(path))
        if name.startswith("braid.") and name.split(".")[1] not in MAY_IMPORT[path.relative_to(ROOT).parts[0]]
    ]
    assert wrong == []


def test_our_folders_are_never_imported_by_their_bare_names():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in [*SOURCES, *TESTS, ROOT / "setup.py"]
        for name in sorted(imported(path))
        if name.split(".")[0] in FOLDERS
    ]
    assert wrong == []


def test_files_are_short_enough_to_read():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in [*SOURCES, *TESTS]}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def test_no_file_mentions_a_path_of_somebodys_machine():
    pattern = re.compile(r"(?<![\w.~])/(?:work|root|home|Users)/\w|(?<![\w.])/tmp/\w+/(?:bin|lib)")
    ours = ("Makefile", "README.md", "constraints.txt", "pyproject.toml", "setup.py", ".ci/run", ".gitignore")
    files = [ROOT / name for name in ours]
    for folder in (*FOLDERS, "tests", "docker", "benchmarks"):
        files += [path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"]
    wrong = []
    for path in files:
        for number, line in enumerate(path.read_bytes().decode("utf-8", errors="replace").splitlines(), 1):
            if pattern.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert wrong == []


@pytest.mark.parametrize("module", ["braid.launch.cli", "braid.launch.doctor", "braid.pretrain.command",
                                    "braid.pretrain.config.load", "braid.pretrain.config.validate",
                                    "braid.pretrain.config.help", "braid.data_pipeline.prepare",
                                    "braid.data_pipeline.readers", "braid.data_pipeline.tokenizers",
                                    "braid.data_pipeline.embedded"])  # fmt: skip
def test_what_must_be_light_imports_no_torch(module, tmp_path):
    code = f"import sys, {module}; sys.exit('it imports torch' if 'torch' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# A top-level module called `kernels` hides the Hugging Face package of that name, which transformers looks for.

PROBE = f"import importlib.util; print([n for n in {FOLDERS} if importlib.util.find_spec(n)])"


@pytest.mark.parametrize("where", ["elsewhere", "repository"])
def test_the_folders_are_not_importable_by_their_bare_names(where, tmp_path):
    cwd = ROOT if where == "repository" else tmp_path
    code = f"import braid.kernels.errors, braid.pretrain.config.schema; {PROBE}"
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_package_called_kernels_stays_visible_from_the_repository(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("whose = 'theirs'\n")
    code = "import braid.kernels.errors as ours, kernels; print(kernels.whose, ours.__name__)"
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "theirs braid.kernels.errors\n"


def test_training_from_the_repository_hides_nothing_even_without_safe_path(tmp_path):
    """`python -m` and torchrun put the working directory first; `braid.pretrain` takes it away again."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    code = f"import runpy, sys; sys.argv[1:] = ['--list']; sys.path[0] = {str(ROOT)!r}\n"
    code += f"try: runpy.run_module('braid.pretrain', run_name='__main__')\nexcept SystemExit: {PROBE}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")


def test_the_test_runner_hides_nothing():
    assert [name for name in FOLDERS if name in sys.modules] == []
    assert str(ROOT / "tests") not in sys.path
