"""Sampling of RePlaid: from noise at t = 1 to embeddings at t = 0 on an even grid of times, then the tokens.

Samplers: `ddpm` (ancestral, the default), `ddim`, `dpm2m` (DPM-Solver++, second order, one call a step) and `heun`
(second order, two calls a step). After the last step one more call at t = 0, with the schedule's gamma_0, gives the
tokens: the most probable ones, as published. Every call is shown the estimate of the one before it.

`temperature` and `top_p` act on the token distribution behind every estimate, `score_temperature` on its noise.
Known tokens: with `token_guidance` = 0 they follow the forward process of their embeddings with one fixed noise at
every step, or are shown clean if the model was trained on pairs; otherwise nothing is pinned, and every estimate
follows the gradient of the known tokens' log-probability with this weight (Plaid, arXiv 2305.18619). Either way the
text that is returned contains them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from braid.kernels.sampling_eager import nucleus
from braid.pretrain.diffusion import gamma as process
from braid.pretrain.objectives.replaid import RePlaid
from braid.pretrain.objectives.replaid_terms import mean_embedding

from .draws import Draws
from .prompts import Prompt


def sample(objective: RePlaid, prompt: Prompt, draws: Draws) -> Tensor:
    """Tokens int64 [N, L]; the state is float64 [N, L, D]."""
    denoiser = _Denoiser(objective, prompt, draws)
    times = draws.times(draws.settings.steps)
    gammas = objective.schedule(torch.tensor(times, dtype=torch.float64, device=draws.device))
    z = denoiser.start
    previous_x = None
    for step, s in enumerate(times[1:]):
        gamma_t, gamma_s = gammas[step], gammas[step + 1]
        x = denoiser.estimate(z, gamma_t, times[step])
        match draws.sampler:
            case "ddpm":
                z = process.ddpm_step(z, x, draws.normals(step, *z.shape[1:]), gamma_t, gamma_s)
            case "dpm2m" if previous_x is not None:
                z = process.dpm2m_step(z, x, previous_x, gammas[step - 1], gamma_t, gamma_s)
            case "ddim" | "dpm2m":
                z = process.ddim_step(z, x, gamma_t, gamma_s)
            case "heun":
                ahead = denoiser.estimate(process.ddim_step(z, x, gamma_t, gamma_s), gamma_s, s)
                z = process.heun_step(z, x, ahead, gamma_t, gamma_s)
        previous_x = x
        if s == 0:
            denoiser.estimate(z, gamma_s, s)
        draws.frame(s, denoiser.tokens(), z)
        draws.progress(step + 1, draws.settings.steps)
    return denoiser.tokens()


class _Denoiser:
    """The network's estimates of the clean embeddings, each shown the one before, and what is known."""

    def __init__(self, objective: RePlaid, prompt: Prompt, draws: Draws) -> None:
        self.objective, self.prompt, self.draws = objective, prompt, draws
        self.embeddings = objective.network.embedding()
        self.rows = objective.vocabulary.rows(self.embeddings)
        self.frozen = torch.zeros(len(prompt.tokens), dtype=torch.bool, device=draws.device)
        self.start = draws.fixed_normals(draws.length, self.embeddings.shape[1]).double()
        self.clean = self.embeddings[prompt.tokens].double()
        self.known = prompt.known[..., None]
        # Where nothing is known there is nothing to follow, and no backward pass to pay for.
        self.guided = draws.settings.token_guidance > 0 and bool(prompt.known.any())
        self.pinned = prompt.known & (not self.guided)
        self.shown_clean = self.pinned & objective.given_clean
        self.earlier = torch.zeros_like(self.start, dtype=torch.float32)
        self.best: Tensor

    def estimate(self, z: Tensor, gamma: Tensor, t: float) -> Tensor:
        """x, float64 [N, L, D], for z float64 at gamma (a scalar) and time t: one call of the network."""
        settings = self.draws.settings
        with torch.set_grad_enabled(self.guided):
            z = self._with_known(z.detach(), gamma).requires_grad_(self.guided)
            logits = self._logits(z, gamma, t)
            towards_known = self._gradient_of_known(logits, z) if self.guided else 0.0
        logits, z = logits.detach(), z.detach()
        self.best = logits.argmax(-1)
        x = mean_embedding(logits.softmax(-1), self.embeddings, self.frozen[:, None])
        if self.objective.config.self_conditioning:
            self.earlier = x
        if settings.temperature != 1.0 or settings.top_p < 1.0:
            tempered = nucleus(logits / settings.temperature, settings.top_p)
            x = mean_embedding(tempered.softmax(-1), self.embeddings, self.frozen[:, None])
        x = x.double()
        # The posterior mean of e, given the known tokens too, by Bayes' rule and Tweedie's formula.
        x = x + settings.token_guidance * torch.sigmoid(gamma) / process.alpha(gamma) * towards_known
        if settings.score_temperature != 1.0:
            x = process.with_score_temperature(z, x, gamma, settings.score_temperature)
        return x

    def tokens(self) -> Tensor:
        """The most probable tokens by the last estimate, int64 [N, L], and the known ones."""
        return torch.where(self.prompt.known, self.prompt.tokens, self.best)

    def _with_known(self, z: Tensor, gamma: Tensor) -> Tensor:
        """The state with pinned positions where the forward process of their tokens has them."""
        pinned = process.alpha(gamma) * self.clean + process.sigma(gamma) * self.start
        z = torch.where(self.pinned[..., None], pinned, z)
        return torch.where(self.shown_clean[..., None], self.clean, z)

    def _logits(self, z: Tensor, gamma: Tensor, t: float) -> Tensor:
        self.draws.call()
        logits = self.objective.logits(
            z.float(), gamma.expand(len(z)), self.draws.batch_times(t), self.earlier, self.rows,
            given=self.shown_clean, frozen=self.frozen,
        )  # fmt: skip
        return self.draws.whole(logits)

    def _gradient_of_known(self, logits: Tensor, z: Tensor) -> Tensor:
        """d/dz of the sum of log p(known token | z), float64 [N, L, D]."""
        log_probability = logits.log_softmax(-1).gather(-1, self.prompt.tokens[..., None]).squeeze(-1)
        return torch.autograd.grad(log_probability.where(self.prompt.known, 0.0).sum(), z)[0]
