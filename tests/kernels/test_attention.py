"""Attention against its definition; the FlashAttention packages against torch, where they are installed."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from torch.nn.attention import _cur_sdpa_kernel_backends

from braid.kernels import attention as module
from braid.kernels.attention import attention, use_attention
from braid.kernels.errors import BraidError


@pytest.fixture(autouse=True)
def back_to_torch():
    yield
    use_attention("torch")


def operands(length, keys, dtype=torch.float32, device="cpu"):
    draws = torch.Generator().manual_seed(0)
    shapes = ((2, 4, length, 32), (2, 4, keys, 32), (2, 4, keys, 32))
    return [torch.randn(shape, generator=draws).to(device, dtype).requires_grad_() for shape in shapes]


def by_definition(q, k, v, mask=None, causal=False):
    scores = q.double() @ k.double().transpose(2, 3) / math.sqrt(q.shape[-1])
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v.double()


@pytest.mark.parametrize("causal", [False, True])
def test_it_is_what_its_name_says(causal):
    q, k, v = operands(24, 24)
    torch.testing.assert_close(attention(q, k, v, causal=causal).double(), by_definition(q, k, v, causal=causal),
                               rtol=1e-5, atol=1e-5)  # fmt: skip


def test_masks_and_keys_of_another_stream():
    q, k, v = operands(24, 10)
    mask = (torch.arange(10) < 7).expand(2, 1, 1, 10)
    torch.testing.assert_close(attention(q, k, v, mask).double(), by_definition(q, k, v, mask), rtol=1e-5, atol=1e-5)


PACKAGES = {"flash-attn": "flash_attn", "flash-attn-3": "flash_attn_interface"}


@pytest.mark.parametrize("library", PACKAGES)
def test_a_library_that_is_missing_is_an_error_that_says_how_to_install_it(library):
    if importlib.util.find_spec(PACKAGES[library]) is not None:
        pytest.skip("it is installed")
    with pytest.raises(BraidError, match=f"{library} is needed here, but it is not installed") as caught:
        use_attention(library)
    assert "install" in caught.value.change
    assert module._library == "torch"


@pytest.mark.parametrize(("capability", "cudnn_first"), [((9, 0), True), ((10, 0), True), ((8, 0), False)])
def test_from_hopper_on_cudnn_comes_first(monkeypatch, capability, cudnn_first):
    """What torch has been told is asked of torch; only the kind of GPU is made up."""
    before = _cur_sdpa_kernel_backends(with_priority=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    use_attention("torch", torch.device("cuda"))
    order = _cur_sdpa_kernel_backends(with_priority=True)
    assert order == (module.CUDNN_FIRST if cudnn_first else before)
    use_attention("torch", torch.device("cpu"))
    assert _cur_sdpa_kernel_backends(with_priority=True) == before


@pytest.mark.gpu
@pytest.mark.parametrize("library", ["torch", *PACKAGES])
@pytest.mark.parametrize(
    ("length", "keys", "causal"), [(256, 256, False), (256, 256, True), (256, 64, False), (1, 64, False)]
)
def test_what_is_chosen_is_torchs_default(library, length, keys, causal):
    """Values and gradients, each as far from float64 as those of torch's first kernel, but for a factor of two."""
    if library in PACKAGES:
        pytest.importorskip(PACKAGES[library])
    found: dict = {}
    for name, device in (("default", None), (library, torch.device("cuda"))):
        use_attention("torch" if name == "default" else name, device)
        q, k, v = operands(length, keys, torch.bfloat16, "cuda")
        out = attention(q, k, v, causal=causal)
        out.float().square().sum().backward()
        found[name] = [out, q.grad, k.grad, v.grad]
    exact = [x.detach().double().requires_grad_() for x in operands(length, keys, torch.bfloat16, "cuda")]
    out = by_definition(*exact, causal=causal)
    out.square().sum().backward()
    for truth, torchs, flashs in zip([out, *(x.grad for x in exact)], *found.values(), strict=True):
        error = (torchs.double() - truth).norm()
        assert (flashs.double() - truth).norm() <= 2 * error + 1e-3 * truth.norm()
        assert flashs.shape == torchs.shape


@pytest.mark.gpu
def test_flash_attn_leaves_to_torch_what_it_does_not_do():
    pytest.importorskip("flash_attn")
    use_attention("flash-attn")
    q, k, v = operands(24, 10, device="cuda")
    mask = (torch.arange(10, device="cuda") < 7).expand(2, 1, 1, 10)
    torch.testing.assert_close(attention(q, k, v, mask).double(), by_definition(q, k, v, mask), rtol=1e-4, atol=1e-4)
