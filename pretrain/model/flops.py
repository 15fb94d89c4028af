"""Model FLOPs of a training step per token, and the share of the device's peak they are (MFU). No torch here.

    F = 6 N_mm + 12 layers d_attn s + 6 V d        forward and backward, matrix products only, per token

N_mm are the parameters of the per-token linear layers, without the embedding lookup and the head; s is the sequence
length. Every query sees every key, so attention is not halved as for causal models (for the causal baseline the same
full count is kept; many published MFUs do so too). The time conditioning (time embedding and adaLN) runs once per
*sequence*: its products are counted once per sequence and spread over the tokens, not put into N_mm, where they would
inflate MFU. Element-wise work and recomputation of activations count nothing.

The head is counted at every position, as others count it, though a loss of masked tokens needs it at those alone, and
computes no more (kernels/linear_loss.py). `TrainingFlops.needed` is the other convention: what this training needs.
"""

from __future__ import annotations

from dataclasses import dataclass

from braid.pretrain.config.schema import ModelConfig

SINUSOID_DIM = 256


@dataclass(frozen=True)
class TrainingFlops:
    """Forward and backward FLOPs of one token, by part."""

    linear: float
    """The linear layers of the blocks, and of latents where a network reads or predicts them."""
    attention: float
    """Scores and weighted values over the full square."""
    conditioning: float
    """Time embedding and adaLN, per sequence, divided by the sequence length."""
    head: float
    """The token head at every position."""

    @property
    def total(self) -> float:
        """FLOPs per token with the head at every position."""
        return self.linear + self.attention + self.conditioning + self.head

    def needed(self, token_share: float) -> float:
        """FLOPs per token with the head at that share of the positions (`Objective.token_share`)."""
        return self.linear + self.attention + self.conditioning + token_share * self.head


def training_flops(model: ModelConfig, *, vocab_size: int, sequence_length: int) -> TrainingFlops:
    """Model FLOPs per token of one training step of the backbone."""
    width, cond, layers = model.width, model.cond_dim, model.num_layers
    linear = layers * (4 * width**2 + 2 * width * round(model.width * model.mlp_ratio))
    adaln = cond * (6 * width * layers + 2 * width)
    # The first linear layer of the time embedding needs no gradient for its input: 4 FLOPs a parameter, not 6.
    per_sequence = 6 * (adaln + cond**2) + 4 * SINUSOID_DIM * cond
    return TrainingFlops(
        linear=6 * linear,
        attention=12 * layers * width * sequence_length,
        conditioning=per_sequence / sequence_length,
        head=6 * vocab_size * width,
    )


# Dense bfloat16 peaks in FLOP/s with float32 accumulation, from the makers' data sheets (figures "with sparsity"
# halved). A device matches the first row whose words are all in its name.
PEAKS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("A10", 125e12),
    ("RTX A6000", 154.8e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
    ("MI300X", 1307.4e12),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 peak in FLOP/s of the device of this name (`torch.cuda.get_device_name()`); None if unknown.

    A CPU is unknown, and so are a slice of a GPU (MIG) and the lesser variants that share a card's name.
    """
    words = set(device_name.lower().replace("-", " ").split())
    if words & {"mig", "laptop", "ti", "d"}:
        return None
    return next((peak for name, peak in PEAKS if words.issuperset(name.lower().split())), None)


def mfu(tokens_per_second: float, flops_per_token: float, *, device_name: str, num_devices: int = 1) -> float | None:
    """Model FLOPs utilisation: `tokens_per_second` of the whole run over what `num_devices` devices could do at their
    dense bfloat16 peak, whatever precision the run uses. None where the peak is not known: no guess is made."""
    peak = peak_flops(device_name)
    return None if peak is None else tokens_per_second * flops_per_token / (peak * num_devices)
