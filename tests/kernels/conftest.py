"""The implementations of kernels on a GPU, for the tests that need one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from braid.kernels import dispatch, library, nvrtc, toolchain


@pytest.fixture(params=["compiled", "nvrtc", "triton", "eager"])
def on_gpu(request, monkeypatch) -> Iterator[str]:
    """Each implementation for a GPU that this machine has, in turn. Tensors start as NaN or the largest integer."""
    name = request.param
    if name == "compiled" and not library.load().cuda:
        pytest.skip(f"the library has no CUDA: {library.load().found}")
    if name == "nvrtc":
        try:
            nvrtc.library()
        except toolchain.BuildError as error:
            pytest.skip(str(error))
    if name == "triton":
        pytest.importorskip("triton")
    found = dispatch.choose("cpu")
    monkeypatch.setattr(dispatch, "choose", lambda kind: found if kind == "cpu" else dispatch.Choice(name, "a test"))
    dispatch._functions.cache_clear()
    torch.use_deterministic_algorithms(True)
    yield name
    torch.use_deterministic_algorithms(False)
    dispatch._functions.cache_clear()
