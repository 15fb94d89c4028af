"""Which way does information flow? A probe of the real network on the real device, before the first step.

An attention mask that is wrong (causal where it should not be, or the reverse) trains without any error and only makes
the loss a little too bad, or far too good. So the run starts by looking.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

from braid.kernels.errors import BraidError
from braid.kernels.random import initial_normal
from braid.pretrain.model.network import Network

PROBE_LENGTH = 16
PROBE_KEY = 0x9E3779B97F4A7C15


class _Trunk(torch.nn.Module):
    """The network up to the heads, which work position by position; all positions, where sequences are divided."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens_BL: Tensor) -> Tensor:
        network, context = self.network, self.network.region.context
        return context.gather(network.stage.through(network.probe, context.part(tokens_BL)))


@torch.no_grad()
def check_direction(network: Network, *, length: int = PROBE_LENGTH) -> None:
    """Check that information flows as `network.causal` says; raise BraidError with the measured changes if not.

    Changing the last token must move the hidden state at position 0 of a bidirectional model and of a causal one leave
    every earlier position as it was; changing the first token must move the last position of both. (Of long sequences,
    the last and first sixteenth: what one token in 100,000 moves would be lost in bfloat16.) At the start the
    blocks' gates are zero and nothing would move, so the biases of the blocks' adaLN are shifted for the probe by fixed
    random numbers, through `functional_call`: the model itself is not touched and nothing large is copied. Call it
    under the autocast of the run. The noise of the device is measured by running the same input twice.
    """
    trunk, device = _Trunk(network), next(network.parameters()).device
    opened = {
        name: bias + initial_normal(PROBE_KEY, name, bias.shape).to(bias)
        for name, bias in trunk.named_parameters()
        if "blocks." in name and name.endswith("adaln.bias")
    }
    tokens_BL = torch.arange(length, device=device)[None] % network.vocab_size
    last_changed_BL, first_changed_BL = tokens_BL.clone(), tokens_BL.clone()
    end = max(1, length // PROBE_LENGTH)
    last_changed_BL[:, -end:] = (last_changed_BL[:, -end:] + 1) % network.vocab_size
    first_changed_BL[:, :end] = (first_changed_BL[:, :end] + 1) % network.vocab_size

    was_training = network.training
    network.eval()
    with torch.compiler.set_stance("force_eager"):  # a compilation for this length alone would be wasted
        plain, again, last_changed, first_changed = (
            functional_call(trunk, opened, (tokens,))[0].float()
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
