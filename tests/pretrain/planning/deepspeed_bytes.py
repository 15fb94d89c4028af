"""Run by torchrun: what a process of DeepSpeed holds, in bytes per parameter, for every ZeRO stage and precision.

Counts the storages that Python's collector can reach in the second micro-batch of a step, between the backward pass and
the step. Gradients that DeepSpeed keeps itself are among them, those that only autograd holds are not.
"""

import gc
import os

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist
from torch import nn


def live_bytes() -> int:
    gc.collect()
    storages = [each.untyped_storage() for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def main() -> None:
    deepspeed.ops.__compatible_ops__ = {}  # it would compile an all-reduce that training never calls
    deepspeed.init_distributed("gloo", verbose=False)
    small = {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000, "overlap_comm": False}
    nothing_gathered = {
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 0,
    }
    for zero in (1, 2, 3):
        for precision in ("fp32", "bf16"):
            before = live_bytes()
            network = nn.Sequential(*[nn.Linear(256, 256) for _ in range(6)])
            size = sum(parameter.numel() for parameter in network.parameters())
            settings = {
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 2,
                "zero_optimization": {"stage": zero, **small, **nothing_gathered},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
            }
            if precision == "bf16":
                settings |= {"bf16": {"enabled": True, "immediate_grad_update": True},
                             "data_types": {"grad_accum_dtype": "fp32"}}  # fmt: skip
            optimizer = torch.optim.AdamW(network.parameters())
            engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=settings)
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            for micro_batch in range(4):
                loss = engine(torch.randn(1, 256, dtype=dtype)).float().square().mean()
                engine.backward(loss)
                if micro_batch == 2:
                    held = live_bytes() - before
                engine.step()
            if dist.get_rank() == 0:
                print("held", zero, precision, f"{held / size:.3f}", flush=True)
            engine.destroy()
            del engine, network, optimizer, loss


if __name__ == "__main__":
    main()
