"""One small use of every library and device feature in the table of `capabilities.py`.

A probe returns what it saw. It raises NotHere where nothing is wrong but the machine or the build lacks the thing, and
whatever the library raises where it is broken. Probes run in a child process (see capabilities.py), so they may crash.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path


class NotHere(Exception):
    """The machine or the build lacks this, and that is no fault."""


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_itself() -> str:
    import torch

    assert torch.arange(4).sum().item() == 6
    return f"CPU kernels for {torch.backends.cpu.get_cpu_capability()}"


def cuda() -> str:
    import torch

    if torch.version.cuda is None:
        raise NotHere("this torch is built without CUDA")
    if not torch.cuda.is_available():
        raise NotHere(f"torch is built for CUDA {torch.version.cuda}, but it finds no device or no driver it can use")
    assert torch.ones(8, device="cuda").sum().item() == 8
    major, minor = torch.cuda.get_device_capability()
    name, count = torch.cuda.get_device_name(), torch.cuda.device_count()
    return f"CUDA {torch.version.cuda}, {count} x {name}, compute capability {major}.{minor}"


def bfloat16() -> str:
    import torch

    device = _device()
    if device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise NotHere("the GPU only emulates it")
    ones = torch.ones(64, 64, dtype=torch.bfloat16, device=device)
    assert (ones @ ones).eq(64).all()
    return f"matrix products on {device}"


def attention() -> str:
    """Which of torch's backends run a forward and a backward pass on the device training would use."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device = _device()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    working = []
    for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        q = torch.randn(1, 2, 64, 64, dtype=dtype, device=device, requires_grad=True)
        with contextlib.suppress(RuntimeError), warnings.catch_warnings(), sdpa_kernel(getattr(SDPBackend, backend)):
            warnings.simplefilter("ignore")  # each backend that cannot run says why
            torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
            working.append(backend.removesuffix("_ATTENTION").lower())
    assert working, "no backend of scaled_dot_product_attention runs"
    return f"{', '.join(working)} on {device}"


def compiler() -> str:
    """Builds a shared library against Python and OpenMP, which is what torch.compile asks of it."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise NotHere(f"no {compiler} on the PATH (the environment variable CXX names another)")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
        openmp = sys.platform != "darwin"
        threads = "#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n" if openmp else ""
        source.write_text("#include <Python.h>\n" + threads)
        include = f"-I{sysconfig.get_path('include')}"
        options = ["-shared", "-fPIC", *(["-fopenmp"] if openmp else ["-undefined", "dynamic_lookup"])]
        built = subprocess.run(
            [compiler, *options, include, str(source), "-o", str(library)], capture_output=True, text=True
        )
    if built.returncode:
        errors = [line for line in built.stderr.splitlines() if "error" in line] or ["it failed without a word"]
        raise RuntimeError(errors[0].replace(folder, ""))
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    return version.splitlines()[0] if version else compiler


def fused_kernels() -> str:
    """What `dispatch` picks, and whether it draws what NumPy draws."""
    import numpy as np
    import torch

    from braid.kernels import dispatch, random, reference

    wanted = reference.normal(3, [1 << 33], [5], 9, first_channel=2)
    found = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        choice = dispatch.choose(device)
        ordinals, position = torch.tensor([1 << 33], device=device), torch.tensor([5], device=device)
        drawn = random.normal(3, ordinals, position, 9, first_channel=2).cpu().numpy()
        if not np.array_equal(drawn.view(np.uint32), wanted.view(np.uint32)):
            raise RuntimeError(f"the kernels of {device} ({choice.name}) do not draw the noise contract's bits")
        found.append(f"{device}: {choice.name} ({choice.reason})")
    return "; ".join(found)


def triton() -> str:
    from triton.runtime import driver

    try:
        target = driver.active.get_current_target()
    except RuntimeError as error:
        raise NotHere("installed, but no GPU driver is active") from error
    return f"target {target.backend} {target.arch}"


def pyarrow() -> str:
    import pyarrow
    from pyarrow import parquet

    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), sink)
    assert parquet.read_table(pyarrow.BufferReader(sink.getvalue())).num_rows == 2
    return "a parquet table written and read"


def transformers() -> str:
    import torch
    from transformers import BertConfig, BertModel

    small = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    assert BertModel(small)(torch.zeros(1, 2, dtype=torch.int64)).last_hidden_state.shape == (1, 2, 8)
    return "a small encoder ran"


def webdataset() -> str:
    import webdataset

    assert list(webdataset.DataPipeline([1, 2])) == [1, 2]
    return "a pipeline ran"


def flash_attention() -> str:
    from flash_attn import flash_attn_func

    return _flash_attention(flash_attn_func)


def flash_attention_3() -> str:
    from flash_attn_interface import flash_attn_func

    return _flash_attention(flash_attn_func)


def _flash_attention(flash_attn_func: Callable) -> str:
    import torch

    if _device() == "cpu":
        raise NotHere("installed, but there is no CUDA device")
    q = torch.randn(1, 64, 2, 64, dtype=torch.bfloat16, device="cuda")
    out = flash_attn_func(q, q, q)
    assert (out[0] if isinstance(out, tuple) else out).isfinite().all()
    return "an attention ran"


def transformer_engine() -> str:
    import torch
    from transformer_engine.pytorch import Linear, autocast, is_fp8_available

    if _device() == "cpu":
        raise NotHere("installed, but there is no CUDA device")
    has_fp8, reason = is_fp8_available(return_reason=True)
    with autocast(enabled=has_fp8):
        assert Linear(64, 64)(torch.ones(64, 64, device="cuda")).isfinite().all()
    return "a linear layer ran" + (" in fp8" if has_fp8 else f", not in fp8: {reason}")


def apex() -> str:
    import torch
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine
    from apex.optimizers import FusedAdam

    if _device() == "cpu":
        raise NotHere("installed, but there is no CUDA device")
    weight = torch.nn.Parameter(torch.ones(8, device="cuda"))
    weight.grad = torch.ones_like(weight)
    FusedAdam([weight]).step()
    assert fused_layer_norm_affine(torch.ones(2, 8, device="cuda"), weight, weight, weight.shape).isfinite().all()
    return "a step of FusedAdam and a norm ran"


def megatron() -> str:
    import megatron.core

    if not megatron.core.__version__.startswith("0.16."):
        raise RuntimeError(f"Braid works with Megatron-core 0.16, this is {megatron.core.__version__}")
    return f"its layers, schedules and optimizers on {_device()}"


def deepspeed() -> str:
    import deepspeed.comm
    from deepspeed.accelerator import get_accelerator

    assert not deepspeed.comm.is_initialized()
    return f"its accelerator is {get_accelerator().device_name()}"
