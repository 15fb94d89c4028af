"""How a run is laid out over processes: the axes, who shards what, and by which engine. Data and arithmetic, no torch.

    rank = i_tensor + tensor (i_context + context (i_data + data i_pipeline))

Which plans are impossible, and why, is in plan_check.py.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

CONTEXT_BY = ("ulysses", "gather")
ENGINES = ("plain", "deepspeed", "megatron")
STAGES = (0, 1, 2, 3)
OFFLOADS = ("none", "cpu", "nvme")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Processes = tensor x context x data x pipeline; the data axis takes what the others leave."""

    tensor: int = 1
    """Processes that share every layer (Megatron-core's tensor parallelism): heads, MLP columns and the vocabulary are
    divided among them. Neighbours in rank, so that they share a node."""
    sequence: bool = False
    """Divide activations between the sharded layers along the sequence, among the processes of the tensor axis."""
    context: int = 1
    """Processes that divide each sequence among them, for long ones."""
    context_by: str = "ulysses"
    """How attention sees the whole sequence: `ulysses` (all-to-all: each process gets all positions of some heads) or
    `gather` (each gets all keys and values)."""
    pipeline: int = 1
    """Processes that hold consecutive blocks (Megatron-core's 1F1B schedule)."""
    virtual: int = 1
    """Pieces of each pipeline process: above 1, the interleaved schedule."""
    engine: str = "plain"
    """Who holds the optimizer state: `plain` (every data-parallel process all of it), `deepspeed` (ZeRO, `zero`) or
    `megatron` (its DistributedDataParallel and DistributedOptimizer)."""
    zero: int = 0
    """DeepSpeed's ZeRO stage: what the data axis divides. 1 optimizer state, 2 also gradients, 3 also weights."""
    offload: str = "none"
    """Where ZeRO keeps optimizer state between uses: `none`, `cpu` or, at stage 3, `nvme`. At stage 3 weights are then
    on the CPU between uses too."""
    offload_dir: str = ""
    """Folder on a fast local disk, for `offload=nvme`. What a process holds of a group of parameters goes there if it
    is more than a megabyte; DeepSpeed compiles what writes at the first use (libaio, a compiler and ninja)."""
    overlap: bool = True
    """Let communication run beside computation where the engine can: gradients are reduced beside the last backward
    pass by `megatron` (in a pipeline too) and by ZeRO 2 and 3; `plain` and ZeRO 0 and 1 reduce them when it has ended.
    Weights are gathered beside the forward pass by `megatron` and ZeRO 3. The interleaved schedule computes while it
    sends and receives; 1F1B has nothing to compute meanwhile."""
    fused_accumulation: bool = False
    """Under `megatron`: the products that make the gradients of the blocks' matrices add them to their float32 sums,
    and do not write them out. In bf16 they are then not rounded before; on a GPU that needs apex's kernel."""

    @property
    def model_processes(self) -> int:
        """Processes that hold one copy of the model between them: tensor x context x pipeline."""
        return self.tensor * self.context * self.pipeline

    @property
    def batched_transfers(self) -> bool:
        """Whether sends and receives between pipeline processes may travel as one batch. With two processes and the
        interleaved schedule a batch holds two sends and two receives between the same two ranks; they are mixed up
        and gradients are wrong without a word (megatron-core 0.16.1), so there each goes by itself."""
        return not (self.virtual > 1 and self.pipeline == 2)

    def data(self, num_processes: int) -> int:
        """Size of the data axis among `num_processes`."""
        return num_processes // self.model_processes


@dataclass(frozen=True, kw_only=True)
class PlanFacts:
    """What a plan must fit: the network's dimensions and the batch."""

    num_layers: int
    num_heads: int
    mlp_width: int
    sequence_length: int
    """Positions of a row in the network."""
    prefix_length: int = 0
    """Of these, the ones before the text; context parallelism divides both by themselves."""
    global_batch_size: int
    micro_batch_size: int
    precision: str = "bf16"
    """`fp32` or `bf16`."""
    num_slots: int = 0
    """Latent slots that are a sequence of their own beside the tokens; 0 for networks without."""
    alternates: bool = False
    """Blocks of two kinds take turns, so that a piece of the pipeline holds pairs."""
    causal: bool = False
    divisible: bool = True
    """False where the layers are another library's and stay whole."""

    @property
    def num_units(self) -> int:
        """What the pipeline deals out: blocks, or pairs of them."""
        return self.num_layers // (2 if self.alternates else 1)


def deal_blocks(
    num_layers: int, pipeline: int, virtual: int = 1, *, alternates: bool = False
) -> list[list[tuple[int, ...]]]:
    """Numbers of the blocks that each pipeline process holds, piece by piece: [process][piece].

    In order of the network, piece j of process i comes after piece j of process i - 1, and piece j + 1 of process 0
    after piece j of the last. Interleaved pieces are equal. Without interleaving what is left over goes one by one to
    the processes after the first (which keeps the most micro-batches), then to the first, then to the last (which has
    the heads). With `alternates` pairs of blocks are dealt.
    """
    group = 2 if alternates else 1
    assert num_layers % group == 0
    units, pieces = num_layers // group, pipeline * virtual
    share, rest = divmod(units, pieces)
    assert share and (virtual == 1 or rest == 0), "check_plan refuses it"
    favoured = [*range(1, pipeline - 1), 0, pipeline - 1][:rest]
    sizes = [group * (share + (piece in favoured)) for piece in range(pieces)]
    ends = list(itertools.accumulate(sizes))
    runs = [tuple(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    return [runs[process::pipeline] for process in range(pipeline)]
