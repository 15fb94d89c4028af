"""Di-LADD: masked tokens with a few masked codes, the vector-quantised pooled representations of the text.

arXiv 2510.18114. Plain losses, as published: cross-entropies of masked tokens (over L) and of masked codes (over S),
without weights over time; tokens and codes have independent times, so that one network can be sampled on both paths.
The codes are a function of the text, so both NELBOs bound the text's likelihood without an entropy term.

With the learned encoder the codes are its nearest vectors, or drawn by Gumbel noise in training and the most probable
in evaluation. The release's contrastive loss, off in the published text runs, is not here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from braid.data_pipeline.loader import Batch
from braid.data_pipeline.tokenizers import Tokenizer
from braid.kernels.random import fold_key
from braid.parallel.layers import ALONE, Region
from braid.pretrain.config.schema import Config
from braid.pretrain.diffusion.absorbing import masked_cross_entropy
from braid.pretrain.diffusion.gumbel import temperature
from braid.pretrain.diffusion.ladd import Survival
from braid.pretrain.diffusion.times import BOUND_TIME_MIN, second_strata, to_range
from braid.pretrain.model.codebook import Codebook
from braid.pretrain.model.encoders import Encoder
from braid.pretrain.model.gumbel_codebook import GumbelCodebook
from braid.pretrain.model.joint_attention import JointDenoiser, SlotPrediction
from braid.pretrain.model.latent_encoder import LatentEncoder

from .base import Figure, LossTerms, Noise, Summed, special_ids, sum_terms
from .ladd import (
    LADD,
    LATENTS_OFF,
    SURVIVAL,
    TOKEN_BOUND,
    SlotCorrupted,
    build_latent_encoder,
    extra_passes,
    given_latents_figure,
    joint_figure,
    sequential_figure,
)

CODE_WORD = 3
"""Word of the token uniforms that decides which codes are masked."""


@dataclass(frozen=True, kw_only=True)
class DiCorrupted(SlotCorrupted):
    """Noised tokens and codes."""

    by_position = (*SlotCorrupted.by_position, "masked_codes")

    masked_codes: Tensor
    """bool [B, S]."""
    commitment: Tensor
    """Mean squared distance of the encoder's directions and their codes, [B]."""
    statistics: dict[str, Tensor]
    """For the codebook's update."""


class DiLADD(LADD):
    """Discrete latents. `encoder` is frozen, or None beside a `latent_encoder` that is learnt."""

    name = "di_ladd"

    def __init__(
        self,
        config: Any,
        network: JointDenoiser,
        encoder: Encoder | None,
        codebook: Codebook | GumbelCodebook,
        latent_encoder: LatentEncoder | None = None,
        **ids: int,
    ) -> None:
        super().__init__(config, network, encoder, latent_encoder, **ids)
        self.codebook = codebook
        self.mask_code = config.codebook_size - 1
        power = config.latent_power if config.latent_schedule == "poly" else 1.0
        self.code_survival, self.training_code_survival = Survival(power), Survival(power, config.time_eps)
        self.figures = self._figures()

    def _figures(self) -> tuple[Figure, ...]:
        kind = "learned" if self.encoder is None else "frozen"
        latents, note = "codes a function of the text", f"codes by the {kind} encoder; t in [1e-5, 1]"
        figures = [joint_figure(latents, note, "joint")]
        if self.config.independent_times:
            figures += [sequential_figure(latents, note, "sequential")]
        figures += [
            given_latents_figure("sequential" if self.config.independent_times else "joint"),
            TOKEN_BOUND,
            LATENTS_OFF,
        ]
        return tuple(figures)

    # -- latents -----------------------------------------------------------------------------------------------

    def codes(self, batch: Batch, hidden_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Code vectors [B, S, D] and codes int64 [B, S] of the text but for its hidden tokens."""
        with torch.autocast(batch.tokens.device.type, enabled=False):
            return self.codebook.quantise(self.raw_slots(batch, hidden_BL))[:2]

    def drawn_codes(self, slots: Tensor, noise: Noise) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """In training: code vectors [B, S, D], codes [B, S], commitment [B], and what the codebook's update needs."""
        if self.config.quantiser == "vq":
            found = self.codebook.quantise(slots)
            return *found, self.codebook.statistics(slots, found[1], noise.index, noise.shift, noise.batch_size)
        gumbel, config = noise.gumbels(*slots.shape[1:]), self.config
        tau = temperature(self.step, config.gumbel_start, config.gumbel_end, config.gumbel_steps)
        vectors, codes = self.codebook.draw(slots, gumbel, tau)
        return vectors, codes, slots.new_zeros(len(slots)), self.codebook.statistics(codes)

    def mask_codes(self, codes_BS: Tensor, noise: Noise, times: Tensor, survival: Survival) -> Tensor:
        """Where the codes are masked, bool [B, S]."""
        probability = survival.masked(times)
        return noise.noised_tokens(codes_BS, self.mask_code, mask_probability=probability, word=CODE_WORD)[1]

    def shown(self, vectors_BSD: Tensor, masked_BS: Tensor) -> Tensor:
        """What the network sees in the slots."""
        return torch.where(masked_BS[..., None], self.network.latent_mask, vectors_BSD)

    def code_nats(self, prediction: SlotPrediction, codes_BS: Tensor, masked_BS: Tensor) -> Tensor:
        """Cross-entropy of masked codes, [B, S]."""
        return masked_cross_entropy(prediction.latents, codes_BS, masked_BS, self.mask_code)

    # -- training ----------------------------------------------------------------------------------------------

    def corrupt(self, batch: Batch, noise: Noise) -> DiCorrupted:
        eps, length = self.config.time_eps, batch.tokens.shape[1]
        times = latent_times = to_range(noise.strata, eps)
        if self.config.independent_times:
            latent_times = to_range(second_strata(noise.index, noise.shift), eps)
        tokens, masked = self.mask_text(batch, noise, times, self.training_survival)
        dropout = noise.dropout_key(length)
        slots = self.raw_slots(batch, self.hidden_tokens(masked, noise), dropout)
        vectors, codes, commitment, statistics = self.drawn_codes(slots, noise)
        kept = self.latents_kept(noise)
        masked_codes = self.mask_codes(codes, noise, latent_times, self.training_code_survival) | ~kept[:, None]
        return DiCorrupted(
            tokens=tokens,
            targets=batch.tokens,
            loss_mask=batch.loss_mask,
            times=times,
            masked=masked,
            latents=self.shown(vectors, masked_codes),
            latent_times=latent_times,
            latent_targets=codes,
            latent_weight=kept.float(),
            masked_codes=masked_codes,
            commitment=commitment,
            statistics=statistics,
            without_tokens=self.blind_tokens(batch),
            dropout=dropout,
        )

    def loss(self, prediction: SlotPrediction, corrupted: DiCorrupted) -> LossTerms:
        """Sums over positions: what belongs to a sequence stands at each of its positions. Diagnostics beside the
        terms of the loss: the perplexity of the codes in use, and how many the last step replaced."""
        mask = corrupted.loss_mask
        independence = self.independence_terms(prediction, corrupted)
        nats = self.token_nats(prediction, corrupted.targets, corrupted.rows)
        code_nats = self.code_nats(prediction, corrupted.latent_targets, corrupted.masked_codes)
        latent_loss = self.latent_scale() * corrupted.latent_weight * self.context.mean(code_nats)
        terms = {"token_loss": Summed.of(nats), "latent_loss": latent_loss[:, None].expand_as(mask)} | independence
        if self.latent_encoder is not None and self.config.quantiser == "vq":
            terms["commitment_loss"] = self.config.commitment * corrupted.commitment[:, None].expand_as(mask)
        loss = sum_terms(terms, mask, corrupted.times, corrupted.statistics)
        perplexity, replaced = self.codebook.usage()
        usage = {"code_perplexity": perplexity * loss.count, "codes_replaced": replaced * loss.count}
        return replace(loss, terms=loss.terms | usage)

    def update_state(self, statistics: dict[str, Tensor]) -> None:
        self.codebook.update(statistics)

    # -- evaluation --------------------------------------------------------------------------------------------

    def evaluate(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        """Draws of the bounds; both NELBOs are sums of a token part and a code part."""
        times = to_range(noise.strata, BOUND_TIME_MIN)
        text = self.mask_text(batch, noise, times, SURVIVAL)
        vectors, codes = self.codes(batch, torch.zeros_like(batch.condition))
        masked = self.mask_codes(codes, noise, times, self.code_survival)
        all_masked, clean = torch.ones_like(masked), torch.zeros_like(times)
        token_weight = (1 - BOUND_TIME_MIN) * SURVIVAL.elbo_weight(times)
        code_weight = (1 - BOUND_TIME_MIN) * self.code_survival.elbo_weight(times)

        def code_part(prediction: SlotPrediction) -> Tensor:
            return code_weight * self.code_nats(prediction, codes, masked).double().sum(1)

        nats, prediction = self.bound_terms(batch, text, self.shown(vectors, masked), times, times)
        given_latents = token_weight * nats
        figures = {"joint_nelbo": given_latents + code_part(prediction)}
        if self.config.independent_times:
            _, prediction = self.bound_terms(
                batch, self.mask_all(batch), self.shown(vectors, masked), torch.ones_like(times), times
            )
            nats, _ = self.bound_terms(batch, text, vectors, times, clean)
            given_latents = token_weight * nats
            figures["sequential_nelbo"] = given_latents + code_part(prediction)
        figures["token_nats_given_latents"] = given_latents

        visible, _ = self.codes(batch, text[1])
        # Codes of visible tokens are part of the denoiser's input, not of what is modelled: they are shown as they are,
        # at the tokens' time where training knows no other.
        if self.config.independent_times:
            nats, _ = self.bound_terms(batch, text, visible, times, clean)
        else:
            nats, _ = self.bound_terms(batch, text, self.shown(visible, masked), times, times)
        figures["token_bound"] = token_weight * nats
        nats, _ = self.bound_terms(batch, text, self.shown(vectors, all_masked), times, torch.ones_like(times))
        figures["token_bound_latents_off"] = token_weight * nats
        return figures

    def schedule_curves(self, times: Tensor) -> dict[str, Tensor]:
        return {
            "token survival": self.training_survival.alpha(times),
            "code survival": self.training_code_survival.alpha(times),
        }


def build(config: Config, tokenizer: Tokenizer, encoder: Encoder | None, region: Region = ALONE) -> DiLADD:
    """From a configuration, the corpus's tokenizer and the frozen encoder, or none where it is learnt."""
    ladd, seed = config.objective, config.run.seed
    latent_dim = ladd.encoder.latent_dim
    network = JointDenoiser(
        config.model,
        vocab_size=tokenizer.vocab_size,
        num_slots=ladd.num_slots,
        latent_dim=latent_dim,
        latent_outputs=ladd.codebook_size,
        latent_positions=ladd.latent_positions,
        times=ladd.time_conditioning,
        masked_latents=True,
        seed=seed,
        region=region,
    )
    num_codes, key = ladd.codebook_size - 1, fold_key(seed, "codebook")
    if ladd.quantiser == "gumbel":
        codebook = GumbelCodebook(num_codes, latent_dim, seed=key)
    else:
        codebook = Codebook(
            num_codes,
            latent_dim,
            decay=ladd.codebook_decay,
            dead_below=ladd.codebook_dead_below,
            settling=ladd.codebook_settling,
            seed=key,
        )
    num_outputs = num_codes if ladd.quantiser == "gumbel" else latent_dim
    latent_encoder = build_latent_encoder(config, tokenizer, region, num_outputs)
    objective = DiLADD(ladd, network, encoder, codebook, latent_encoder, **special_ids(tokenizer))
    objective.extra_forward_passes = extra_passes(config, network, latent_encoder)
    return objective
