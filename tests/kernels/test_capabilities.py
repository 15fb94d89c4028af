"""The table tells the truth: about this machine, and about packages that lie, crash or hang."""

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, metadata, version

import pytest

from braid.kernels import capabilities, probes
from braid.kernels.capabilities import Capability, report, require
from braid.kernels.errors import BraidError
from braid.launch import doctor

PYTHON = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def machine():
    """`braid doctor --json`, run for real, once."""
    run = subprocess.run(
        [sys.executable, "-m", "braid.launch.cli", "doctor", "--json"], env=PYTHON, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Installs a module with the given source in front of everything, for this process and its children."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def install(name, source):
        path = tmp_path.joinpath(*name.split("."))
        path.mkdir(parents=True)
        if source is not None:
            (path / "__init__.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)  # the real one, which another test has imported

    return install


@pytest.fixture
def keep_entries(monkeypatch):
    """Shortens the table to the given names."""
    entries = capabilities.ENTRIES

    def keep(*names):
        monkeypatch.setattr(capabilities, "ENTRIES", tuple(entry for entry in entries if entry.name in names))

    return keep


def installed(distribution):
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def test_doctor_reports_this_machine(machine):
    import torch

    table = {line["name"]: Capability(**line) for line in machine["capabilities"]}
    assert len(table) == len(machine["capabilities"]) == len(capabilities.ENTRIES)
    assert all(line.choice and line.found for line in table.values())
    assert {line.status for line in table.values()} <= {"works", "missing", "broken"}
    assert table["torch"].status == "works" and table["torch"].version == torch.__version__
    assert table["attention"].status == "works" and "math" in table["attention"].found
    assert table["cuda"].status == ("works" if torch.cuda.is_available() else "missing")
    assert ("CPU" in table["cuda"].choice) == (not torch.cuda.is_available())
    for name in ("pyarrow", "transformers", "wandb", "mosaicml-streaming", "megatron-core", "deepspeed"):
        assert table[name].status == ("works" if installed(name) else "missing"), table[name]
        assert table[name].version == installed(name)


def test_doctor_says_what_shards(machine):
    """What each package for parallelism gives, and what goes without it."""
    table = {line["name"]: Capability(**line) for line in machine["capabilities"]}
    megatron, deepspeed = table["megatron-core"], table["deepspeed"]
    assert ("can be above 1" in megatron.choice) == (megatron.status == "works")
    assert ("can be chosen" in deepspeed.choice) == (deepspeed.status == "works")
    assert ("refused" in deepspeed.choice) == (deepspeed.status != "works")
    for name in ("transformer-engine", "apex", "flash-attn"):
        assert (table[name].status == "missing") == (installed(name) is None or not on_gpu()), table[name]
        assert ("can be chosen" in table[name].choice) == (table[name].status == "works")
        assert ("refused" in table[name].choice) == (table[name].status != "works")


def on_gpu():
    import torch

    return torch.cuda.is_available()


def test_another_version_of_megatron_is_broken(fake):
    fake("megatron.core", "__version__ = '0.17.1'\nparallel_state = 1")
    answers = capabilities._probe_all(["megatron-core"])
    assert answers == {"megatron-core": ("broken", "RuntimeError: Braid works with Megatron-core 0.16, this is 0.17.1")}


def test_doctor_imports_no_torch_until_it_probes():
    script = (
        "import sys, braid.launch.doctor\n"
        "from braid.kernels.capabilities import report\n"
        "table = {line.name: line for line in report(probe=False)}\n"
        "assert table['torch'].status == 'untried' and table['torch'].version, table['torch']\n"
        "heavy = {'torch', 'numpy', 'pyarrow', 'transformers', 'wandb', 'streaming', 'megatron', 'deepspeed', 'apex',"
        " 'flash_attn', 'transformer_engine'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], env=PYTHON, check=True)


def test_doctor_survives_a_broken_torch(fake, keep_entries, capsys):
    fake("torch", "raise OSError('libcudart.so.13: cannot open shared object file')")
    keep_entries("torch", "cuda", "wandb")
    assert doctor.main(argparse.Namespace(json=False)) == 2
    printed = capsys.readouterr().out
    assert printed.count("OSError: libcudart.so.13: cannot open shared object file") == 2
    assert "broken  torch" in printed and "-> nothing runs without it" in printed


def test_a_namespace_of_the_same_name_is_not_the_package(fake):
    """flash-attn-4 installs a `flash_attn` without flash_attn_func; PyPI's apex has no optimizers."""
    fake("flash_attn.cute", None)
    fake("apex", "")
    answers = capabilities._probe_all(["flash-attn", "apex"])
    assert answers["flash-attn"] == ("broken", "ImportError: the module flash_attn has no flash_attn_func, so it "
                                     "belongs to another package")  # fmt: skip
    assert answers["apex"] == ("broken", "ModuleNotFoundError: No module named 'apex.optimizers'")


def test_crashes_and_exits_cost_only_their_own_line(fake):
    fake("webdataset", "import os; os.abort()")
    fake("flash_attn", "raise SystemExit(3)")
    fake("wandb", "print('chatter', end='')\ndef init(): pass")
    fake("deepspeed", "class Odd(Exception): pass\nraise Odd('no nvcc\\nsecond line')")
    fake("streaming", "MDSWriter = 1")
    answers = capabilities._probe_all(["webdataset", "wandb", "flash-attn", "deepspeed", "mosaicml-streaming"])
    assert answers == {
        "webdataset": ("broken", "killed by SIGABRT"),
        "wandb": ("works", "imported"),
        "flash-attn": ("broken", "exit code 3"),
        "deepspeed": ("broken", "Odd: no nvcc"),
        "mosaicml-streaming": ("works", "imported"),
    }


def test_a_hanging_import_is_given_up(fake, monkeypatch):
    fake("webdataset", "import time; time.sleep(60)")
    fake("wandb", "init = 1")
    monkeypatch.setattr(capabilities, "PROBING_SECONDS", 2)
    answers = capabilities._probe_all(["webdataset", "wandb"])
    assert answers == {"webdataset": ("broken", "no answer within 2 s"), "wandb": ("works", "imported")}


def test_a_folder_in_the_working_directory_is_not_a_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text("raise RuntimeError('a run folder was imported')")
    monkeypatch.chdir(tmp_path)
    _, found = capabilities._probe_all(["wandb"])["wandb"]
    assert "run folder" not in found


def test_require_names_the_extra(monkeypatch):
    assert require("torch").__name__ == "torch"
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # what Python keeps of a module that must not be imported
    with pytest.raises(BraidError, match="pyarrow is needed here, but it is not installed") as caught:
        require("pyarrow")
    assert caught.value.change == "pip install 'braid-lm[parquet]'"


def test_require_tells_broken_from_missing(fake):
    fake("webdataset", "raise RuntimeError('built for another torch')")
    with pytest.raises(BraidError, match="cannot be imported") as caught:
        require("webdataset")
    assert caught.value.found == "RuntimeError: built for another torch"


def test_extras_named_in_the_table_exist():
    extras = set(metadata("braid-lm").get_all("Provides-Extra"))
    named = [entry.install.partition("braid-lm[")[2].partition("]")[0] for entry in capabilities.ENTRIES]
    assert {extra for extra in named if extra} <= extras and any(named)


def test_without_a_compiler_the_probe_says_where_it_looked(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(probes.NotHere, match="no no-such-compiler on the PATH"):
        probes.compiler()


def test_a_compiler_that_fails_is_broken(tmp_path, monkeypatch):
    script = tmp_path / "c++"
    script.write_text("#!/bin/sh\necho 'probe.cpp:1: fatal error: Python.h: No such file' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(RuntimeError, match="Python.h"):
        probes.compiler()


def test_both_prints_show_every_line(machine, capsys):
    lines = [Capability(**line) for line in machine["capabilities"]]
    for show in (doctor.print_plain, doctor.print_table):
        show(machine, lines)
        printed = capsys.readouterr().out
        assert all(line.name in printed and line.status in printed for line in lines)
        assert f"braid {version('braid-lm')}" in printed


def test_a_report_without_probes_only_looks_packages_up(keep_entries):
    keep_entries("cuda", "apex", "pyarrow")
    table = {line.name: line.status for line in report(probe=False)}
    assert table == {
        "cuda": "untried",
        "pyarrow": "untried" if installed("pyarrow") else "missing",
        "apex": "untried" if installed("apex") else "missing",
    }
