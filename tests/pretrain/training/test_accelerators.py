"""What a run says that asks for kernels which are not here; apex's AdamW against torch's, where it is installed."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from braid.kernels.errors import BraidError
from braid.pretrain.config.accelerators import AcceleratorsConfig
from braid.pretrain.training.accelerators import use_accelerators
from braid.pretrain.training.apex_adam import apex_adam

ASKED = [
    ("flash_attn", {"attention": "flash-attn"}, "flash-attn is needed here"),
    ("apex", {"norms": "apex"}, "apex is needed here"),
    ("apex", {"optimizer": "apex"}, "apex is needed here"),
    ("transformer_engine", {"linears": "transformer-engine"}, "transformer-engine is needed here"),
]


@pytest.mark.parametrize(("package", "asked", "what"), ASKED)
def test_a_missing_library_is_named_with_how_to_install_it(package, asked, what):
    if importlib.util.find_spec(package) is not None:
        pytest.skip("it is installed")
    with pytest.raises(BraidError, match=what) as caught:
        use_accelerators(AcceleratorsConfig(**asked), torch.device("cuda"))
    assert package.replace("_", "-") in caught.value.change


def test_a_run_without_a_gpu_says_so(run_braid, tmp_path):
    words = ["accelerators.norms=apex", "accelerators.optimizer=apex", "run.device=auto", f"run.dir={tmp_path / 'run'}"]
    done = run_braid("pretrain", "tiny_mdlm", *words, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "accelerators are for GPUs" in done.stderr and "the run is on a CPU" in done.stderr
    assert "change: accelerators.norms=torch accelerators.optimizer=torch" in done.stderr


def test_torch_needs_nothing():
    use_accelerators(AcceleratorsConfig(), torch.device("cpu"))


@pytest.mark.gpu
def test_apexs_adamw_is_torchs_and_goes_on_from_its_state():
    pytest.importorskip("apex.optimizers")
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}
    draws = torch.Generator("cuda").manual_seed(0)
    shapes = ((64, 32), (32,))
    gradients = [[torch.randn(shape, generator=draws, device="cuda") for shape in shapes] for _ in range(8)]

    def run(makers):
        """Eight steps, four with each optimizer, which gets the state of the one before it."""
        weights = [torch.nn.Parameter(torch.full(shape, 0.5, device="cuda")) for shape in shapes]
        state = {}
        for make, part in zip(makers, (gradients[:4], gradients[4:]), strict=True):
            groups = [{"params": weights[:1], "weight_decay": 0.1}, {"params": weights[1:], "weight_decay": 0.0}]
            optimizer = make(groups, **settings)
            for weight, kept in state.items():
                optimizer.state[weight] = {key: value.clone() for key, value in kept.items()}
            for step in part:
                for weight, gradient in zip(weights, step, strict=True):
                    weight.grad = gradient.clone()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                assert all(weight.grad is None for weight in weights)
            state = {weight: dict(optimizer.state[weight]) for weight in weights}
        return [weight.detach() for weight in weights], [state[weight] for weight in weights]

    plain, expected = run([torch.optim.AdamW] * 2)
    for makers in ([apex_adam()] * 2, [apex_adam(), torch.optim.AdamW], [torch.optim.AdamW, apex_adam()]):
        weights, state = run(makers)
        torch.testing.assert_close(weights, plain, rtol=1e-5, atol=1e-6)
        for found, known in zip(state, expected, strict=True):
            assert found.keys() == known.keys() and float(found["step"]) == float(known["step"]) == 8
            torch.testing.assert_close(found["exp_avg"], known["exp_avg"], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found["exp_avg_sq"], known["exp_avg_sq"], rtol=1e-5, atol=1e-6)
