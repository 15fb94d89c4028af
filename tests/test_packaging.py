"""The wheel holds everything, works from elsewhere, and needs no compiler."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("pretrain", "parallel", "data_pipeline", "kernels", "launch")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def build_wheel(folder: Path, **environment: str) -> Path:
    """A wheel built from a copy of the sources, so that nothing is left in the repository or taken from old builds."""
    source = folder / "source"
    source.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    command = [*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True, cwd=folder, env=os.environ | environment)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with nothing but the unpacked wheel."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    command = [*pip, "--no-deps", "--no-index", "--target", str(folder), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, cwd=folder)
    return folder


def run_installed(installed, cwd, *words):
    """`braid` from the wheel. `-S` leaves out site-packages' .pth files, an editable installation's among them."""
    site = next(path for path in sys.path if path.endswith("site-packages"))
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(installed), site])}
    command = [sys.executable, "-S", "-P", "-m", "braid.launch.cli", *words]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def test_the_wheel_is_pure_and_holds_every_file(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"braid/{path.relative_to(ROOT)}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"braid/kernels/normal_table.inc", "braid/pretrain/recipes/tiny_ar.yaml"} <= expected
    assert any(name.startswith("braid/pretrain/report/assets/") for name in expected)
    assert sorted(expected - names) == []
    assert sorted(name for name in names - expected if ".dist-info/" not in name) == []
    assert any(name.endswith("LICENSE") for name in names)


def test_the_wheel_works_from_elsewhere(installed, tmp_path):
    done = run_installed(installed, tmp_path, "--help")
    assert done.returncode == 0, done.stderr
    done = run_installed(installed, tmp_path, "--version")
    assert done.returncode == 0 and done.stdout.startswith("braid "), done.stderr
    done = run_installed(installed, tmp_path, "pretrain", "--list")
    assert {path.stem for path in (ROOT / "pretrain" / "recipes").glob("*.yaml")} == {
        line.split()[0] for line in done.stdout.splitlines()
    }
    done = run_installed(installed, tmp_path, "pretrain", "--print-config", "tiny_ccdd")
    assert done.returncode == 0, done.stderr
    done = run_installed(installed, tmp_path, "pretrain", "--help")
    assert "optimizer.lr: float" in done.stdout, "the docstrings come from the installed schema"


def test_the_wheel_is_what_ran(installed, tmp_path):
    env = os.environ | {"PYTHONPATH": str(installed)}
    code = "import braid.kernels.errors as module; print(module.__file__)"
    command = [sys.executable, "-S", "-P", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_relative_to(installed)


def test_the_constraints_pin_what_we_depend_on():
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    pins = dict(re.fullmatch(r"([\w.-]+)==([\w.]+)", line).groups() for line in lines)
    assert lines[0] == "torch==2.13.0", "exact, without a local version, and first"
    assert not any(name.lower() in ("torchvision", "braid-lm") for name in pins)
    known = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    needed = {re.sub(r"[-_.]+", "-", name).lower() for name in re.findall(r'"([A-Za-z][\w.-]*)[><=]=', setup)}
    assert {"torch", "numpy", "pytest", "mosaicml-streaming"} <= known
    assert len(needed) > 15 and needed <= known, needed - known


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler")
def test_a_wheel_with_compiled_kernels_needs_no_compiler(tmp_path):
    wheel = build_wheel(tmp_path, BRAID_BUILD_KERNELS="1")
    assert wheel.name.split("-", 2)[2].startswith("py3-none-linux_")
    zipfile.ZipFile(wheel).extractall(tmp_path / "unpacked")
    (library,) = (tmp_path / "unpacked").rglob("compiled/braid-*.so")
    package, site = library.parents[3], Path(importlib.util.find_spec("torch").origin).parents[1]
    code = "from braid.kernels import library; print(library.load().path)"
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(package), str(site)]),
        "PATH": "",
        "BRAID_KERNELS_CACHE": str(tmp_path / "none"),
    }
    command = [sys.executable, "-S", "-P", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == f"{library}\n", done.stderr
