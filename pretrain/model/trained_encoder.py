"""A frozen encoder that was pretrained here: the encoder of a run with `objective.name=t5`.

ELF's paper (arXiv 2605.10938) normalises the channels of an encoder it trained itself. Here their mean and standard
deviation are measured once, over training text of the first run that reads the encoder, and lie from then on beside its
checkpoint (nothing is ever written into one): whoever reads it afterwards, with or without a corpus, gets the same
latents.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.packing import Rows
from braid.kernels.errors import ConfigError, InputError
from braid.pretrain.checkpoint.files import write_atomically
from braid.pretrain.config.objectives.encoder import EncoderConfig
from braid.pretrain.model.frozen_run import load_frozen_run, require_width
from braid.pretrain.model.huggingface_encoder import HuggingFaceEncoder

if TYPE_CHECKING:
    from braid.pretrain.checkpoint.snapshot import LoadedModel

MEASURED_TOKENS = 1 << 17
ROWS_AT_A_TIME = 16


class NormalisedStack(nn.Module):
    """A T5 encoder as transformers has it, whose output (float32) has mean 0 and standard deviation 1 in every channel
    over text. Without `mean` and `std` [W] it is what the stack says."""

    def __init__(self, stack: Any, mean: Tensor | float = 0.0, std: Tensor | float = 1.0) -> None:
        super().__init__()
        self.stack, self.config = stack, stack.config
        self.register_buffer("mean", torch.as_tensor(mean))
        self.register_buffer("std", torch.as_tensor(std))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.stack.get_input_embeddings()

    def forward(self, **inputs: Any) -> Any:
        """Takes what the stack takes; `last_hidden_state` [B, L, W] is normalised, other hidden states are not."""
        output = self.stack(**inputs)
        output.last_hidden_state = (output.last_hidden_state.float() - self.mean) / self.std
        return output


def load_trained_encoder(
    config: EncoderConfig, *, corpus_folder: Path, mask_id: int, leaky: bool, device: torch.device
) -> HuggingFaceEncoder:
    """The encoder of the run directory or checkpoint `config.path`, with its averaged weights where it has any; hidden
    tokens get zero input embeddings. Its channels are measured if they were not yet, on the corpus.

    Raises ConfigError (no path, not of a `t5` run, narrower than the latents), InputError (other tokenizer than the
    corpus's, nothing to measure on, folder not writable) and CheckpointError (nothing valid there).
    """
    wanted = "a run with objective.name=t5"
    model = load_frozen_run(config, corpus_folder=corpus_folder, device=device, wanted=wanted)
    name = model.config.objective.name
    if name != "t5":
        raise ConfigError(
            "A trained encoder is that of a t5 run",
            found=f"objective.name = {name!r} in {config.path}",
            change="train one with `braid pretrain t5_small_owt`, or a recipe of your own with objective.name=t5",
        )
    require_width(config.latent_dim, model.config.model.width)
    stack = model.objective.network.encoder.eval().requires_grad_(False)
    stack.embed_tokens = model.objective.network.embedding.requires_grad_(False)
    return HuggingFaceEncoder(
        NormalisedStack(stack, **_channels(stack, model, corpus_folder)).to(device),
        native_mask_id=None,
        layer=-1,
        latent_dim=config.latent_dim,
        mask_id=mask_id,
        variance_floor=config.variance_floor,
        leaky=leaky,
    )


def _channels(stack: Any, model: LoadedModel, corpus_folder: Path) -> dict[str, Tensor]:
    """`mean` and `std` of every channel, float32 [W]: those beside the checkpoint, else measured and put there."""
    file = model.path.with_name(f"channels-{model.path.name}.safetensors")
    if not file.is_file():
        if not (corpus_folder / "train").is_dir():
            raise InputError(
                "The encoder's channels were not measured yet, and here is no text to do it on",
                found=f"no {file}",
                change="put it back, or name the checkpoint that the model was trained with",
            )
        data = model.config.data
        rows = Rows(TokenCorpus.open(corpus_folder, "train"), data.sequence_length, data.packing)
        try:
            write_atomically(file, safetensors.torch.save(_measure(stack, rows)))
        except OSError as error:
            raise InputError(
                "The encoder's channels cannot be kept", found=f"{file}: {error}", change="make its folder writable"
            ) from error
    return safetensors.torch.load_file(file)


@torch.no_grad()
def _measure(stack: Any, rows: Rows) -> dict[str, Tensor]:
    """Over rows spread evenly over the corpus. A channel that never changes has deviation 1."""
    num = min(len(rows), -(-MEASURED_TOKENS // rows.sequence_length))
    spread, encoder = torch.arange(num) * len(rows) // num, NormalisedStack(stack)
    device, sums, squares = encoder.stack.device, 0.0, 0.0
    for some in spread.split(ROWS_AT_A_TIME):
        tokens_BL = torch.from_numpy(rows.read(some.tolist()).astype("int64")).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            output = encoder(input_ids=tokens_BL, attention_mask=torch.ones_like(tokens_BL))
        states_NW = output.last_hidden_state.flatten(0, 1).double()
        sums, squares = sums + states_NW.sum(0), squares + states_NW.square().sum(0)
    total = num * rows.sequence_length
    variance = squares / total - (sums / total).square()
    std = torch.where(variance > 1e-12, variance.clamp(min=0).sqrt(), 1.0)
    return {"mean": (sums / total).float().cpu(), "std": std.float().cpu()}
