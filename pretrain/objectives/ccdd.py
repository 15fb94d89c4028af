"""CCDD: joint diffusion of tokens (masked) and per-token representations (Gaussian), arXiv 2510.03206, leak-free.

One network sees x_t and z_t and predicts both clean strands. The clean representations contain the text, so training
draws p_r: each masked token is hidden from the encoder with probability p_r. At p_r = 1 the latents know nothing the
visible tokens do not tell, and the token term alone is a bound on the likelihood ("token bound").

Given tokens (a condition) are never masked and the encoder sees them. Their latents are noised representations of the
given tokens alone, which is what a sampler has; nothing is learnt or scored there.

With `p_uniform` tokens are replaced too, as in GIDD: the loss and the bounds are then about every token. In the place
of a replaced one the encoder reads, with the same probability p_r, what x_t shows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from braid.data_pipeline.loader import Batch
from braid.data_pipeline.tokenizers import Tokenizer
from braid.kernels.linear_loss import Rows
from braid.parallel.layers import ALONE, Region
from braid.pretrain.config.objectives.ccdd import CCDDConfig
from braid.pretrain.config.schema import Config, ModelConfig
from braid.pretrain.diffusion.gaussian import posterior_mean, reconstruction_nats
from braid.pretrain.diffusion.hybrid import Hybrid
from braid.pretrain.diffusion.schedules import GaussianSchedule, LogLinear, continuous_weight
from braid.pretrain.diffusion.times import BOUND_TIME_MIN, log_uniform_mixture, second_strata, to_range
from braid.pretrain.model.blocks import DropoutKey
from braid.pretrain.model.encoders import Encoder
from braid.pretrain.model.joint import JointNetwork, JointPrediction, MDiT, Routing
from braid.pretrain.model.mixture_of_experts import MoEDiT, balance_loss, routing_metrics
from braid.pretrain.model.token_logits import TokenLoss
from braid.pretrain.model.two_stream import MMDiT

from .base import Figure, LossTerms, Noise, Objective, Summed, TokenCorrupted, special_ids, sum_positions, sum_terms

FULL_VISIBILITY_COIN, P_R_COIN, LATENT_DROPOUT_COIN, TOKEN_DROPOUT_COIN = 1, 2, 3, 5
HIDDEN_WORD = 2
ERROR_CLIP = 10.0  # per-dimension squared error, as published
PUBLISHED_TIME_EPS = 1e-4
SURVIVAL = LogLinear(eps=0.0)


@dataclass(frozen=True, kw_only=True)
class JointCorrupted(TokenCorrupted):
    """Noised tokens and latents. `masked` are the tokens to be predicted; with token dropout, visible ones are masks in
    `tokens` too."""

    by_position = (*TokenCorrupted.by_position, "latents", "latent_targets")

    latents: Tensor
    """Noised latents, float32 [B, L, D]."""
    latent_times: Tensor
    """Their times, float64 [B]; `times` are the tokens'."""
    latent_targets: Tensor | None = None
    """Clean latents, float32 [B, L, D]; None where they are not learnt."""
    latent_weight: Tensor | None = None
    """0 where the latent loss is off (latent dropout), float32 [B]."""


class CCDD(Objective):
    """CCDD with any of its three networks."""

    name = "ccdd"

    def __init__(
        self, config: CCDDConfig, network: JointNetwork, encoder: Encoder, *, conditional: bool = True, **ids: int
    ) -> None:
        """`conditional` False promises that no batch has given tokens, which spares a pass of the encoder."""
        super().__init__(config, network, **ids)
        self.encoder, self.conditional = encoder, conditional
        self.schedule = GaussianSchedule(config.schedule)
        # None where tokens are masked and nothing else.
        self.hybrid = Hybrid(config.p_uniform, config.gamma, network.vocab_size - 1) if config.p_uniform > 0 else None
        self.token_share = 0.5 if self.hybrid is None else 1.0
        self.features = config.latent_mode == "features"
        # Latents that are never noised are never generated either: the sampler encodes what is visible at every step.
        self.diffused = not self.features and config.latent_times != "clean"
        self.tau = self.schedule.time_of_snr(1 / config.latent_sigma**2)
        """Smallest time of the joint bound, where z_t is as far from z_0 as z_0 from E(x)."""
        self.splits_loss = config.architecture == "moedit"  # of the routing each piece of the network knows its layers'
        self.figures = self._figures()

    # -- the network and its times -----------------------------------------------------------------------------

    def denoise(
        self,
        tokens: Tensor,
        times: Tensor,
        latents: Tensor,
        latent_times: Tensor | None = None,
        dropout: DropoutKey | None = None,
        segments: Tensor | None = None,
    ) -> JointPrediction:
        """The network on noised tokens [B, L] and latents [B, L, D] at their times [B]; the latents' are those of
        `path` unless they are given."""
        if self.config.latent_times == "shared":
            return self.network(tokens, times, latents, dropout, segments=segments)
        latent_times = self.path(times) if latent_times is None else latent_times
        return self.network(tokens, times, latents, dropout, latent_times=latent_times, segments=segments)

    def path(self, times: Tensor) -> Tensor:
        """The latents' time while tokens are sampled or scored at `times`."""
        return times if self.diffused else torch.zeros_like(times)

    def call(self, corrupted: JointCorrupted) -> JointPrediction:
        dropout = corrupted.dropout if self.training else None
        c = corrupted
        return self.denoise(c.tokens, c.times, c.latents, c.latent_times, dropout, c.segments)

    # -- training ----------------------------------------------------------------------------------------------

    def corrupt(self, batch: Batch, noise: Noise) -> JointCorrupted:
        config = self.config
        times = to_range(noise.strata, config.time_eps, 1 - config.time_eps)
        latent_times = self.path(times)
        if self.diffused and config.latent_times == "independent":
            latent_times = to_range(second_strata(noise.index, noise.shift), config.time_eps, 1 - config.time_eps)
        corrupted = self._corrupt(batch, noise, times, latent_times, self._p_r(noise))

        # A strand that is dropped is hidden from the network; latents are then not learnt either, tokens are.
        latents_kept = (noise.coins(LATENT_DROPOUT_COIN) >= config.latent_dropout).float()
        tokens_kept = noise.coins(TOKEN_DROPOUT_COIN) >= config.token_dropout
        return replace(
            corrupted,
            tokens=torch.where(tokens_kept[:, None] | batch.condition, corrupted.tokens, self.mask_id),
            latents=corrupted.latents * latents_kept[:, None, None],
            latent_targets=None if self.features else self._clean(batch),
            latent_weight=latents_kept,
        )

    def _p_r(self, noise: Noise) -> Tensor:
        """Probability that a masked token is hidden from the encoder, for each sequence, float64 [B]."""
        config = self.config
        if self.features:
            return torch.ones_like(noise.shift)
        coins = noise.coins if config.p_r_per == "sequence" else noise.batch_coins
        always = coins(FULL_VISIBILITY_COIN) < config.full_visibility_probability
        return torch.where(always, 1.0, config.p_r_max * coins(P_R_COIN))

    def _corrupt(self, batch: Batch, noise: Noise, times: Tensor, latent_times: Tensor, p_r: Tensor) -> JointCorrupted:
        """Noise the tokens, show the encoder x_t in the place of x_0 with probability p_r [B], noise what it says."""
        length = batch.tokens.shape[1]
        tokens, masked = self._noised_tokens(batch, noise, times)
        as_noised = noise.uniforms(length, word=HIDDEN_WORD) < p_r.float()[:, None]
        text = batch.tokens if self.hybrid is None else torch.where(as_noised & ~masked, tokens, batch.tokens)
        source = self._with_given(self.encoder.encode(text, masked & as_noised, batch.segments), batch)
        return JointCorrupted(
            tokens=tokens,
            targets=batch.tokens,
            loss_mask=batch.loss_mask,
            segments=batch.segments,
            times=times,
            masked=masked if self.hybrid is None else None,
            latents=self._noised(source, noise, latent_times),
            latent_times=latent_times,
            dropout=noise.dropout_key(length),
        )

    def _noised_tokens(self, batch: Batch, noise: Noise, times: Tensor) -> tuple[Tensor, Tensor]:
        """x_t, and where it is masked."""
        if self.hybrid is None:
            probability = 1 - SURVIVAL.alpha(times)
            return noise.noised_tokens(batch.tokens, self.mask_id, mask_probability=probability, keep=batch.condition)
        return noise.noised_tokens(
            batch.tokens,
            self.mask_id,
            mask_probability=self.hybrid.mask_probability(times),
            uniform_probability=self.hybrid.num_tokens * self.hybrid.noise(times),
            num_tokens=self.hybrid.num_tokens,
            keep=batch.condition,
        )

    def _clean(self, batch: Batch) -> Tensor:
        """E(x), the representations of the whole text."""
        return self.encoder.encode(batch.tokens, torch.zeros_like(batch.condition), batch.segments)

    def _with_given(self, latents: Tensor, batch: Batch) -> Tensor:
        """At given tokens, the representations of the given tokens alone."""
        if not self.conditional:
            return latents
        return torch.where(batch.condition[..., None], self.encoder.encode(batch.tokens, ~batch.condition), latents)

    def _noised(self, latents: Tensor, noise: Noise, times: Tensor) -> Tensor:
        return noise.noised_latents(latents, self.schedule.alpha(times), self.schedule.sigma(times))

    def token_weight(self, times: Tensor) -> Tensor:
        """Training weight of a masked token's cross-entropy; float64."""
        match self.config.token_weight:
            case "dynamic":
                return 2 * (1 - times)
            case "elbo":
                return SURVIVAL.elbo_weight(times)
            case "uniform":
                return torch.ones_like(times)
        raise AssertionError(self.config.token_weight)

    def latent_weight(self, times: Tensor) -> Tensor:
        """Training weight of the mean squared error of the latents at *their* time (the published code takes the
        tokens' even where they differ); float64."""
        return self.config.continuous_scale * continuous_weight(self.config.continuous_weight, times, self.schedule)

    def _token_term(self, prediction: JointPrediction, corrupted: JointCorrupted) -> Summed:
        if self.hybrid is None:
            weight, place = self.token_weight(corrupted.times).float()[:, None], (corrupted.targets, corrupted.rows)
            return Summed.of(prediction.tokens.cross_entropy(*place, weight, without=self.mask_id), weight)
        where = corrupted.tokens, corrupted.targets, corrupted.times, self.mask_id
        match self.config.token_weight:
            case "dynamic":
                weight_BL = self.hybrid.dynamic_weight(*where)
            case "elbo":
                weight_BL = self.hybrid.elbo_weight(*where)
            case _:
                weight_BL = torch.ones_like(corrupted.targets, dtype=torch.float64)
        return Summed.of(self._divergence(prediction, corrupted, weight_BL), weight_BL)

    def _divergence(
        self, prediction: JointPrediction, corrupted: JointCorrupted, weight_BL: Tensor, *, precise: bool = False
    ) -> TokenLoss:
        """With uniform noise: KL plus Itakura-Saito divergence of true and predicted marginals."""
        tokens, targets, times = corrupted.tokens, corrupted.targets, corrupted.times
        common = {"mask_id": self.mask_id, "vocabulary": self.vocabulary, "precise": precise}
        divergence = self.hybrid.divergence(tokens, targets, times, weight_BL, **common)
        return prediction.tokens.loss(divergence, corrupted.rows, targets.shape)

    def loss(self, prediction: JointPrediction, corrupted: JointCorrupted) -> LossTerms:
        terms = {"token_loss": self._token_term(prediction, corrupted)}
        if not self.features:
            error = (prediction.latents - corrupted.latent_targets).square().clamp(max=ERROR_CLIP).mean(-1)
            weight = self.latent_weight(corrupted.latent_times).float() * corrupted.latent_weight
            terms["latent_loss"] = weight[:, None] * error
        return self._with_experts(terms, prediction.routing, corrupted)

    def loss_of_piece(self, aside: Routing, corrupted: JointCorrupted) -> LossTerms:
        nothing_BL = torch.zeros_like(corrupted.loss_mask, dtype=torch.float32)
        names = ("token_loss",) if self.features else ("token_loss", "latent_loss")
        loss = self._with_experts(dict.fromkeys(names, nothing_BL), aside, corrupted)
        return replace(loss, count=0 * loss.count, bucket_counts=0 * loss.bucket_counts)

    def _with_experts(
        self, terms: dict[str, Tensor | Summed], routing: Routing | None, corrupted: JointCorrupted
    ) -> LossTerms:
        """The sums of these terms and of what the routing adds to them."""
        if self.config.experts.balance:
            balance = balance_loss(routing, corrupted.loss_mask, self.context)
            terms["balance_loss"] = self.config.experts.balance * balance[:, None].expand_as(corrupted.loss_mask)
        loss = sum_terms(terms, corrupted.loss_mask, corrupted.times)
        if self.splits_loss:
            use = routing_metrics(routing).items()
            sums = {name: sum_positions(value, corrupted.loss_mask).sum() for name, value in use}
            loss = replace(loss, terms=loss.terms | sums)
        return loss

    # -- evaluation --------------------------------------------------------------------------------------------

    def _figures(self) -> tuple[Figure, ...]:
        """Token term with latents and without, the joint bound where latents are generated, and the token term on the
        published range of times, which leaves out its ends.

        With a leaky encoder nothing is called a bound, not even what would be one by itself.
        """
        config, leaky = self.config, self.encoder.leaky
        equal_times = "; both strands at one time, as in the sampler" if config.latent_times == "independent" else ""
        span = "t in [1e-5, 1]"
        if self.hybrid is not None:
            span = (
                "from the time where the odds of uniform noise are 1e-5 of their scale, and what decoding there costs"
            )
        token = f"discrete NELBO at p_r = 1, {span}" + equal_times
        if self.diffused:
            token += "; of unmasking beside latents that are made anew from the visible tokens at every step, which no "
            token += "sampler of this model does"
        else:
            token += "; the latents are clean, and there is no joint bound because nothing generates them"
        off = "the same with z = 0, as for guidance: what the latents are worth to the trained network"
        joint = "what the sampler joint_nelbo pays for in many steps: token and latent terms on t in [tau, 1], "
        joint += "SNR(tau) = 1/s^2, and decoding both strands at tau" + equal_times
        law = f"q(z|x) = N(E(x), {config.latent_sigma:g}^2 I)"
        if leaky:
            bar = "; a run with a leaky encoder reports no bound"
            figures = [
                Figure("leaky_token_nats", "leaky token cross-entropy", False, "hidden tokens were seen" + bar),
                Figure("token_nats_latents_off", "token cross-entropy, latents switched off", False, off + bar),
                Figure("joint_nats", f"joint cost of tokens and latents, {law}", False, joint + bar),
            ]
        else:
            figures = [
                Figure("token_bound", "token bound, latents from visible tokens only", True, token),
                Figure("token_bound_latents_off", "token bound, latents switched off", True, off),
                Figure("joint_nelbo", f"joint NELBO of tokens and latents, {law}", True, joint),
            ]
        figures = figures if self.diffused else figures[:2]
        note = "mean over t in [1e-4, 1 - 1e-4] of the token term's density at p_r = 1; no bound without its ends"
        note += equal_times + ("; hidden tokens were seen" if leaky else "")
        return (*figures, Figure("published", "published convention", False, note))

    def evaluate(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        values = [*self._token_bounds(batch, noise)]
        if self.diffused:
            values.append(self._joint_nelbo(batch, noise))
        values.append(self._published(batch, noise))
        return {figure.name: value for figure, value in zip(self.figures, values, strict=True)}

    def _token_bounds(self, batch: Batch, noise: Noise) -> tuple[Tensor, Tensor]:
        """1/t-weighted cross-entropy of masked tokens with latents and without.

        Given x_t the latents at p_r = 1 are noise that knows no more of the text, so averaging over them outside the
        logarithm keeps the bound. That holds at any time of theirs; `path` is the one that is sampled.
        """
        if self.hybrid is None:
            times, span, end = to_range(noise.strata, BOUND_TIME_MIN), 1 - BOUND_TIME_MIN, 0.0
        else:
            (times, span), end = self.hybrid.bound_times(noise.strata), self.hybrid.end_nats()
        corrupted = self._corrupt(batch, noise, times, self.path(times), torch.ones_like(times))
        without = replace(corrupted, latents=torch.zeros_like(corrupted.latents))
        end_nats = end * batch.loss_mask.sum(1)
        return span * self._token_density(corrupted) + end_nats, span * self._token_density(without) + end_nats

    def _published(self, batch: Batch, noise: Noise) -> Tensor:
        times = to_range(noise.strata, PUBLISHED_TIME_EPS, 1 - PUBLISHED_TIME_EPS)
        return self._token_density(self._corrupt(batch, noise, times, self.path(times), torch.ones_like(times)))

    def _token_density(self, corrupted: JointCorrupted) -> Tensor:
        """The integrand of the discrete NELBO at the times of each sequence, float64 [B]."""
        return self._density_of(self.predict(corrupted), corrupted)

    def _density_of(self, prediction: JointPrediction, corrupted: JointCorrupted) -> Tensor:
        if self.hybrid is None:
            place = corrupted.targets, corrupted.rows
            nats = prediction.tokens.cross_entropy(*place, without=self.mask_id).values_BL
            return SURVIVAL.elbo_weight(corrupted.times) * sum_positions(nats, corrupted.loss_mask)
        weight_BL = self.hybrid.elbo_weight(corrupted.tokens, corrupted.targets, corrupted.times, self.mask_id)
        nats = self._divergence(prediction, corrupted, weight_BL, precise=True).values_BL
        return sum_positions(weight_BL * nats, corrupted.loss_mask)

    def _decoding_nats(self, prediction: JointPrediction, corrupted: JointCorrupted) -> Tensor:
        """-log p(x_0 | x_t, z_t) when all tokens are decoded at once, of each sequence, float64 [B]."""
        targets, tokens = corrupted.targets, corrupted.tokens
        clean = prediction.tokens.cross_entropy(targets, corrupted.rows, without=self.mask_id).values_BL
        if self.hybrid is not None:
            masked = tokens == self.mask_id
            visible = torch.where(masked, targets, tokens)
            shown = prediction.tokens.cross_entropy(visible, Rows(corrupted.loss_mask), without=self.mask_id).values_BL
            clean = self.hybrid.posterior_nats(clean, shown, tokens == targets, masked, corrupted.times)
        return sum_positions(clean, corrupted.loss_mask)

    def _joint_nelbo(self, batch: Batch, noise: Noise) -> Tensor:
        """-log p(x) <= token and latent terms on [tau, 1] plus decoding both strands at tau, SNR(tau) = 1/s^2.

        For the sampler's path, both strands at one time. At t = 1 both are pure noise, so there is no prior term. The
        network estimates E(x); the latent z_0 the bound is about is E(x) plus noise of deviation s, whose posterior
        mean follows in closed form.
        """
        s, tau = self.config.latent_sigma, self.tau
        times, density = log_uniform_mixture(noise.strata, tau)
        z_0 = self._clean(batch) + s * noise.normals(batch.tokens.shape[1], self.encoder.latent_dim, purpose="z_0")
        prediction, corrupted, error = self._jointly(batch, noise, times, z_0)
        token_density = self._density_of(prediction, corrupted)
        diffusion = (token_density + self.schedule.snr_rate(times) / 2 * error) / density
        prediction, corrupted, error_at_tau = self._jointly(batch, noise, torch.full_like(times, tau), z_0)
        nats_at_tau = self._decoding_nats(prediction, corrupted)
        num_dims = self.encoder.latent_dim * batch.loss_mask.sum(1).double()
        latent_decoding = reconstruction_nats(error_at_tau, num_dims, s, 1 / s**2)
        return diffusion + nats_at_tau + latent_decoding

    def _jointly(
        self, batch: Batch, noise: Noise, times: Tensor, z_0: Tensor
    ) -> tuple[JointPrediction, JointCorrupted, Tensor]:
        """What the network says of x_t and z_t, both, and ||z_0 - estimate||^2 of each sequence, float64 [B]."""
        tokens, masked = self._noised_tokens(batch, noise, times)
        z_t = self._noised(self._with_given(z_0, batch), noise, times)
        corrupted = JointCorrupted(
            tokens=tokens,
            targets=batch.tokens,
            loss_mask=batch.loss_mask,
            segments=batch.segments,
            times=times,
            masked=masked if self.hybrid is None else None,
            latents=z_t,
            latent_times=times,
        )
        prediction = self.denoise(tokens, times, z_t, segments=batch.segments)
        estimate = posterior_mean(z_t, prediction.latents, times, self.config.latent_sigma, self.schedule)
        error = (z_0.double() - estimate).square().sum(-1)
        return prediction, corrupted, sum_positions(error, batch.loss_mask)

    def schedule_curves(self, times: Tensor) -> dict[str, Tensor]:
        curves = {"token survival": (SURVIVAL.alpha if self.hybrid is None else self.hybrid.survival)(times)}
        if self.hybrid is not None:
            curves["mask probability"] = self.hybrid.mask_probability(times)
            curves["uniform probability"] = self.hybrid.num_tokens * self.hybrid.noise(times)
        if self.diffused:
            curves |= {"latent alpha": self.schedule.alpha(times), "latent sigma": self.schedule.sigma(times)}
        if self.hybrid is None:
            curves["token loss weight"] = self.token_weight(times.clamp(min=1e-2))
        if self.diffused:
            curves["latent loss weight"] = self.latent_weight(times.clamp(1e-2, 1 - 1e-2))
        return curves


def build(config: Config, tokenizer: Tokenizer, encoder: Encoder | None, region: Region = ALONE) -> CCDD:
    """From a configuration, the corpus's tokenizer and the frozen encoder."""
    assert encoder is not None, "a joint objective needs an encoder"
    objective = config.objective
    settings = {
        "vocab_size": tokenizer.vocab_size,
        "latent_dim": encoder.latent_dim,
        "separate_times": objective.latent_times != "shared",
        "seed": config.run.seed,
        "region": region,
    }
    network = build_network(objective, config.model, **settings)
    conditional = config.data.packing == "pairs"
    return CCDD(objective, network, encoder, conditional=conditional, **special_ids(tokenizer))


def build_network(objective: CCDDConfig, model: ModelConfig, **settings: Any) -> JointNetwork:
    """The network of `objective.architecture`; `settings` are those of `JointNetwork`."""
    match objective.architecture:
        case "mdit":
            return MDiT(model, **settings)
        case "mmdit":
            return MMDiT(model, **settings)
        case "moedit":
            return MoEDiT(model, objective.experts, **settings)
    raise AssertionError(objective.architecture)
