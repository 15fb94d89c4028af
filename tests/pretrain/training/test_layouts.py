"""Training, saving and going on with weights and sequences divided among ranks: a layout like any other.

Against the same run of one process: samples and noise to the bit, losses and gradients to float32's rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from training_runs import Trainers, assert_same_run, last_checkpoint, samples, steps_of

from braid.pretrain.config.load import recipes
from braid.pretrain.telemetry.metrics_log import read_metrics

FIVE_STEPS = {
    "training__steps": 5,
    "training__log_every": 1,
    "training__validation_sequences": 7,
    "training__sample_every": 5,
    "training__num_samples": 2,
    "sampling__steps": 4,
    "model__num_layers": 2,
    "model__num_heads": 4,
    "training__micro_batch_size": 4,
    "recorded": True,
}
SEQUENCE = {"parallel__tensor": 2, "parallel__sequence": True}
MEGATRON = {"parallel__engine": "megatron"}
UNUSED = {"tiny_co_ladd_learned": ("network.blocks.1.latents.", "network.latent_head.")}
"""Where the latents have a denoiser of their own, what the joint network would say of them."""
FOUR_BLOCKS = {"model__num_layers": 4, "training__micro_batch_size": 2}
"""And four micro-batches in a global batch, or two on each of two data-parallel ranks."""
INTERLEAVED = FOUR_BLOCKS | {"parallel__pipeline": 2, "parallel__virtual": 2}
LAYOUTS = {
    "tensor 2": (2, {"parallel__tensor": 2}),
    "tensor 2 with sequence": (2, SEQUENCE),
    "tensor 2 with sequence, data 2": (4, SEQUENCE),
    "context 2": (2, {"parallel__context": 2}),
    "context 2 by gather": (2, {"parallel__context": 2, "parallel__context_by": "gather"}),
    "context 2, data 2": (4, {"parallel__context": 2}),
    "tensor 2 with sequence, context 2": (4, SEQUENCE | {"parallel__context": 2}),
    "pipeline 2": (2, FOUR_BLOCKS | {"parallel__pipeline": 2}),
    "pipeline 3": (3, FOUR_BLOCKS | {"parallel__pipeline": 3}),
    "pipeline 4": (4, FOUR_BLOCKS | {"parallel__pipeline": 4}),
    "pipeline 2 interleaved": (2, INTERLEAVED),
    "pipeline 2 interleaved, without overlap": (2, INTERLEAVED | {"parallel__overlap": False}),
    "pipeline 2, context 2": (4, FOUR_BLOCKS | {"parallel__pipeline": 2, "parallel__context": 2}),
    "pipeline 2, tensor 2 with sequence": (4, FOUR_BLOCKS | SEQUENCE | {"parallel__pipeline": 2}),
    "pipeline 2, tensor 2 with sequence, data 2": (8, FOUR_BLOCKS | SEQUENCE | {"parallel__pipeline": 2}),
    "megatron, data 2": (2, MEGATRON),
    "megatron, tensor 2 with sequence, data 2": (4, MEGATRON | SEQUENCE),
    "megatron, pipeline 2, data 2": (4, MEGATRON | FOUR_BLOCKS | {"parallel__pipeline": 2}),
    "megatron, pipeline 2 interleaved, tensor 2": (4, MEGATRON | INTERLEAVED | {"parallel__tensor": 2}),
    "megatron, context 2, data 2": (4, MEGATRON | {"parallel__context": 2}),
}
SYSTEMS = [name for name in recipes() if name.startswith("tiny_") and name != "tiny_t5"]
REFUSED = [("tiny_ar", "context 2 by gather")]
REFUSED += [("tiny_co_ladd_learned", name) for name in LAYOUTS if "pipe" in name]
# Every system's losses and gradients under every division are quick in tests/parallel, most engines in tests/parity;
# here what is left: whole runs of a few.
QUICK = [("tiny_co_ladd", "tensor 2 with sequence"), ("tiny_di_ladd_learned", "pipeline 2"), ("tiny_duo", "context 2")]
QUICK += [("tiny_ccdd", "context 2 by gather"), ("tiny_ccdd", "tensor 2 with sequence, context 2")]
QUICK += [("tiny_elf", "megatron, data 2"), ("tiny_ccdd", "megatron, context 2, data 2")]
QUICK += [("tiny_replaid", "pipeline 2 interleaved"), ("tiny_mdlm", "pipeline 3")]
ALL = [case for case in itertools.product(SYSTEMS, LAYOUTS) if case not in REFUSED]


def train(trainers: Trainers, recipe: str, run: str, ranks: int, **fields: object) -> Path:
    """The run's folder; the gradients of each step lie in `<run>.gradients`. No weight is zero at the start."""
    gradients = trainers.folder / f"{run}.gradients"
    gradients.mkdir(exist_ok=True)
    environment = {"GRADIENTS": str(gradients), "DENSE": "1"}
    trainers.train(recipe, run, ranks=ranks, env=environment, **{**FIVE_STEPS, **fields})
    return trainers.folder / run


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """alone(recipe, **fields): the folder of the run of one process, which is trained when it is first asked for."""
    trainers = Trainers(corpus, tmp_path_factory.mktemp("alone"))

    @cache
    def run(recipe: str, **fields: object) -> Path:
        return train(trainers, recipe, "-".join([recipe, *map(str, fields.values())]), 1, **fields)

    yield run
    trainers.close()


@pytest.mark.parametrize(
    ("recipe", "layout"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in ALL],
)
def test_every_layout_trains_as_one_process(
    trainers: Trainers, alone: Callable[..., Path], recipe: str, layout: str
) -> None:
    ranks, fields = LAYOUTS[layout]
    common = {name: fields[name] for name in FOUR_BLOCKS if name in fields}
    if recipe == "tiny_ccdd_mmdit" and "model__num_layers" in common:
        common["model__num_layers"] = 8  # its pieces are of pairs of blocks
    whole = alone(recipe, **common)
    divided = train(trainers, recipe, "divided", ranks, **fields | common)
    assert samples(divided) == samples(whole)
    lines, others = (read_metrics(run_dir / "metrics.jsonl") for run_dir in (divided, whole))
    for line, other in zip(lines, others, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["terms"] == pytest.approx(other["terms"], rel=1e-4, abs=1e-5)
        if line["split"] == "train":
            assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    found, wanted = (torch.load(f"{run_dir}.gradients/1.pt") for run_dir in (divided, whole))
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0 or name.startswith(UNUSED.get(recipe, "nothing")), name
        bound = 1e-4 * gradient.abs().max().item() + 1e-8
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=bound, msg=name)
    written, expected = ((run_dir / "samples" / "step-00000005.jsonl").read_text() for run_dir in (divided, whole))
    assert written.count("\n") == expected.count("\n") == 2


TENSOR = [(2, {"parallel__tensor": 2}), (1, {}), LAYOUTS["tensor 2 with sequence, data 2"]]
ENGINES = [LAYOUTS["megatron, data 2"], (1, {}), LAYOUTS["megatron, tensor 2 with sequence, data 2"]]
CHAINS = [
    *(("tensor", recipe, TENSOR) for recipe in ("tiny_elf", "tiny_ccdd", "tiny_di_ladd")),
    *(("engines", recipe, ENGINES) for recipe in ("tiny_ccdd", "tiny_mdlm", "tiny_replaid", "tiny_elf")),
]


@pytest.mark.slow  # a chain of tests/parity is quick
@pytest.mark.parametrize(
    ("recipe", "chain"), [pytest.param(recipe, chain, id=f"{name}-{recipe}") for name, recipe, chain in CHAINS]
)
def test_a_run_goes_on_under_another_layout(trainers: Trainers, recipe: str, chain: list[tuple[int, dict]]) -> None:
    """From one layout to the next and the next. What is loaded is what was saved, to the bit; then the run is the one
    that was never interrupted."""
    first, second, third = chain
    train(trainers, recipe, "whole", 1, training__steps=15)
    train(trainers, recipe, "moved", first[0], **first[1])
    saved = last_checkpoint(trainers.folder / "moved")
    # No step is left to do: what was loaded is evaluated, and nothing is saved again.
    for ranks, fields in (second, third):
        train(trainers, recipe, "moved", ranks, **fields)
        again = last_checkpoint(trainers.folder / "moved")
        assert again.step == saved.step == 5
    train(trainers, recipe, "moved", second[0], training__steps=10, **second[1])
    train(trainers, recipe, "moved", third[0], training__steps=15, **third[1])
    whole, moved = trainers.folder / "whole", trainers.folder / "moved"
    assert steps_of(moved) == steps_of(whole)
    assert samples(moved) == samples(whole)
    losses, expected = (
        {line["step"]: line["loss"] for line in read_metrics(run_dir / "metrics.jsonl") if line["split"] == "train"}
        for run_dir in (moved, whole)
    )
    assert losses == pytest.approx(expected, rel=1e-5)
    found, wanted = (last_checkpoint(run_dir).groups for run_dir in (moved, whole))
    assert found.keys() == wanted.keys()
    for group, tensors in wanted.items():
        assert {name: tensor.shape for name, tensor in found[group].items()} == {
            name: tensor.shape for name, tensor in tensors.items()
        }


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_an_engine_that_divides_its_state_resumes_bit_for_bit(trainers: Trainers, precision: str) -> None:
    fields = {"run__precision": precision, "training__validate_every": 6, "training__log_every": 2}
    for run, steps in (("pieces", 6), ("pieces", 12), ("straight", 12)):
        trainers.train("tiny_mdlm", run, ranks=2, **MEGATRON, **fields, training__steps=steps)
    assert_same_run(trainers.folder / "pieces", trainers.folder / "straight")


ZERO = [
    {"parallel__zero": 3},
    pytest.param({"parallel__zero": 1}, marks=pytest.mark.slow),
    pytest.param({"parallel__zero": 2, "parallel__offload": "cpu"}, marks=pytest.mark.slow),
    pytest.param({"parallel__zero": 3, "parallel__offload": "cpu"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("fields", ZERO)
def test_zero_goes_on_bit_for_bit(trainers: Trainers, fields: dict) -> None:
    """In pieces as in one piece; and DeepSpeed, which says much, is not heard."""
    options = {"training__log_every": 2, "training__validate_every": 4, "checkpoint__every": 4, "recorded": True}
    options |= {"ranks": 2, "parallel__engine": "deepspeed", "optimizer__schedule": "constant"} | fields
    options |= {"optimizer__warmup_steps": 2}
    trainers.train("tiny_replaid", "straight", training__steps=8, **options)
    trainers.train("tiny_replaid", "pieces", training__steps=4, **options)
    process = trainers.train("tiny_replaid", "pieces", training__steps=8, **options)
    assert "resumed from step 4" in process.out
    assert_same_run(trainers.folder / "pieces", trainers.folder / "straight")
    for said in (process.out, process.err):
        assert "deepspeed" not in said.lower() and "deprecated" not in said and "INFO" not in said


@pytest.mark.slow
def test_a_run_with_its_state_on_a_disk_goes_on_bit_for_bit(trainers: Trainers, asynchronous_io, tmp_path: Path):
    options = {"training__log_every": 1, "training__validate_every": 5, "checkpoint__every": 5}
    options |= {"optimizer__schedule": "constant", "recorded": True}
    options |= {"ranks": 2, "parallel__engine": "deepspeed", "parallel__zero": 3}
    # Only what is larger than a megabyte goes to a disk.
    options |= {"parallel__offload": "nvme", "parallel__offload_dir": tmp_path / "disk", "model__width": 256}
    trainers.train("tiny_mdlm", "straight", training__steps=10, **options)
    trainers.train("tiny_mdlm", "pieces", training__steps=5, **options)
    process = trainers.train("tiny_mdlm", "pieces", training__steps=10, **options)
    assert "resumed from step 5" in process.out
    assert_same_run(trainers.folder / "pieces", trainers.folder / "straight")
    assert list((tmp_path / "disk").rglob("*.swp")), "nothing was put there"
