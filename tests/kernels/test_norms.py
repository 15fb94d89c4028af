"""Norms against their definition; apex against torch, where it is installed."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from braid.kernels.errors import BraidError
from braid.kernels.norms import LAYER_EPS, layer_norm, rms_norm, use_norms

EPS = 1e-6


@pytest.fixture(autouse=True)
def back_to_torch():
    yield
    use_norms("torch")


def operands(device="cpu", dtype=torch.float32):
    draws = torch.Generator().manual_seed(0)
    x = (3 + 2 * torch.randn(4, 7, 96, generator=draws)).to(device, dtype).requires_grad_()
    weight = (1 + 0.1 * torch.randn(96, generator=draws)).to(device).requires_grad_()
    return x, weight


def layer_by_definition(x, weight):
    centred = x.double() - x.double().mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + LAYER_EPS).sqrt() * weight.double()


def rms_by_definition(x, weight):
    return x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


NORMS = [(layer_norm, layer_by_definition), (lambda x, weight: rms_norm(x, weight, EPS), rms_by_definition)]


@pytest.mark.parametrize(("norm", "definition"), NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_what_their_names_say_in_float32(norm, definition, dtype):
    x, weight = operands(dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = norm(x, weight)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), definition(x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("apex") is not None, reason="apex is installed")
def test_a_library_that_is_missing_is_an_error_that_says_how_to_install_it():
    with pytest.raises(BraidError, match="apex is needed here, but it is not installed") as caught:
        use_norms("apex")
    assert "NVIDIA's apex" in caught.value.change
    x, weight = operands()
    assert layer_norm(x, weight).isfinite().all(), "torch's go on"


@pytest.mark.gpu
@pytest.mark.parametrize(("norm", "definition"), NORMS)
def test_apexs_are_torchs(norm, definition):
    """Values and gradients in float32, under autocast too."""
    pytest.importorskip("apex.normalization.fused_layer_norm")
    found = {}
    for library in ("torch", "apex"):
        use_norms(library)
        x, weight = operands("cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = norm(x, weight)
        assert out.dtype == torch.float32
        out.square().sum().backward()
        found[library] = (out, x.grad, weight.grad)
    torch.testing.assert_close(found["apex"], found["torch"], rtol=1e-4, atol=1e-4)
