"""Which way does information flow? A probe of the real network on the real device, before the first step.

An attention mask that is wrong (causal where it should not be, or the reverse) trains without any error and only makes
the loss a little too bad, or far too good. So the run starts by looking.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from braid.kernels.errors import BraidError
from braid.kernels.random import initial_normal
from braid.pretrain.model.network import Network

PROBE_LENGTH = 16
PROBE_KEY = 0x9E3779B97F4A7C15


@torch.no_grad()
def check_direction(network: Network, *, length: int = PROBE_LENGTH, as_trained: bool = False) -> None:
    """Check that information flows as `network.causal` says; raise BraidError with the measured changes if not.

    Changing the last token must move the hidden state at position 0 of a bidirectional model and of a causal one leave
    every earlier position as it was; changing the first token must move the last position of both. (Of long sequences,
    the last and first sixteenth: what one token in 100,000 moves would be lost in bfloat16.) At the start the
    blocks' gates are zero and nothing would move, so that what the blocks' adaLN gives is shifted for the probe by
    fixed random numbers; the model itself is not touched. Call it under the autocast of the run, and where an engine
    has the weights whole. The noise of the device is measured by running the same input twice.

    as_trained: run the passes of training, which record gradients, and so with sequence parallelism divide hidden
    states along the positions; without, those that sample and evaluate.
    """
    device = next(network.parameters()).device
    tokens_BL = torch.arange(length, device=device)[None] % network.vocab_size
    last_changed_BL, first_changed_BL = tokens_BL.clone(), tokens_BL.clone()
    end = max(1, length // PROBE_LENGTH)
    last_changed_BL[:, -end:] = (last_changed_BL[:, -end:] + 1) % network.vocab_size
    first_changed_BL[:, :end] = (first_changed_BL[:, :end] + 1) % network.vocab_size

    was_training = network.training
    network.eval()
    # Eagerly, for a compilation for this length alone would be wasted.
    with _opened(network), torch.compiler.set_stance("force_eager"):
        plain, again, last_changed, first_changed = (
            _hidden(network, tokens, as_trained)[0].float()
            for tokens in (tokens_BL, tokens_BL, last_changed_BL, first_changed_BL)
        )
    network.train(was_training)

    noise = (again - plain).abs().max().item()
    backward = (last_changed - plain).abs()[:-end]
    to_first, to_any = backward[0].max().item(), backward.max().item()
    to_last = (first_changed - plain).abs()[-1].max().item()
    measured = (
        f"changing the last token moves position 0 by {to_first:.3g} and earlier positions by up to {to_any:.3g}; "
        f"changing the first token moves the last position by {to_last:.3g}; noise of the device {noise:.3g}"
    )
    change = "the attention mask: Attention.causal in every block, or the attention backend that runs it"
    if network.causal and to_any > noise:
        raise BraidError("A causal model sees later tokens", found=measured, change=change)
    if not network.causal and not to_first > noise:
        raise BraidError(
            "A bidirectional model does not see the last token from position 0", found=measured, change=change
        )
    if not to_last > noise:
        raise BraidError("The last position does not see the first token", found=measured, change=change)


def _hidden(network: Network, tokens_BL: Tensor, as_trained: bool) -> Tensor:
    """The hidden states [B, L, W] before the heads, which work position by position; all positions, where sequences are
    divided."""
    context = network.region.context

    def probe(tokens: Tensor) -> Tensor:
        with torch.set_grad_enabled(as_trained):
            return network.probe(tokens).detach()

    return context.gather(network.stage.through(probe, context.part(tokens_BL)))


@contextmanager
def _opened(network: Network) -> Iterator[None]:
    """The gates of all blocks are open, and not alike."""
    with ExitStack() as hooks:
        for name, module in network.named_modules():
            if "blocks." in name and name.endswith("adaln"):
                hooks.callback(module.register_forward_hook(partial(_shifted, name)).remove)
        yield


def _shifted(name: str, adaln: nn.Module, inputs: Any, vectors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What an adaLN gives, and fixed random numbers."""
    shifts = initial_normal(PROBE_KEY, name, (len(vectors), vectors[0].shape[-1]))
    return tuple(vector + shift.to(vector) for vector, shift in zip(vectors, shifts, strict=True))
