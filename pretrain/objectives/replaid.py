"""RePlaid: Gaussian diffusion of learned token embeddings (arXiv 2605.18530, after Plaid, 2305.18619).

    z = alpha e + sigma eps,   logits = network(z) + (alpha / sigma^2) <z, E_v>,   estimate of e = softmax(logits) E

The loss is the bound itself, in nats per token: KL of z_1 to its prior, cross-entropy of the tokens given z_0, and the
diffusion term 1/2 gamma'(t) exp(-gamma) ||e - estimate||^2 between them. Some sequences of a batch are spent on the
second, the others on the third (replaid_terms.BatchSplit).

Who learns from what: the network, the embeddings and the schedule's endpoints follow the gradient of the bound. The
schedule's interior cannot change the bound, only how it is spread over time: it follows the gradient of the mean square
of the diffusion loss, whose minimum is a loss constant over time. From self-conditioned sequences the network alone
learns.

Tokens that are given and never noised (the source of a pair) enter as their clean embedding, scaled like any input.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from braid.data_pipeline.loader import Batch
from braid.data_pipeline.tokenizers import Tokenizer
from braid.kernels.random import fold_key
from braid.parallel.layers import ALONE, Region
from braid.pretrain.config.objectives.replaid import RePlaidConfig
from braid.pretrain.config.schema import Config
from braid.pretrain.diffusion import gamma as process
from braid.pretrain.diffusion.learned_schedule import Schedule
from braid.pretrain.model.blocks import DropoutKey
from braid.pretrain.model.embedding_network import EmbeddingNetwork
from braid.pretrain.model.encoders import Encoder
from braid.pretrain.model.token_logits import TokenLogits

from .base import Corrupted, Figure, LossTerms, Noise, Objective, Pass, special_ids, sum_positions, sum_terms
from .replaid_terms import BatchSplit, Interior, add_output_prior, mean_embedding

SELF_CONDITIONED_EVERY = 4
WARMUP_SHARE = 20
"""The output prior's warm-up takes at most one in so many steps of the run."""


@dataclass(frozen=True, kw_only=True)
class RePlaidCorrupted(Corrupted):
    """Noisy embeddings. In rows that are self-conditioned, what comes from schedule and embeddings is constant."""

    by_position = (*Corrupted.by_position, "z", "clean", "given", "estimates")

    z: Tensor
    """float32 [B, L, D]; clean where `given`."""
    clean: Tensor
    """Embeddings of the targets, float32 [B, L, D]."""
    embeddings: Tensor
    """The table, float32 [V, D]; of a divided vocabulary this process's rows."""
    given: Tensor
    """Positions that are not noised, bool [B, L]."""
    gamma: Tensor
    """float64 [B]."""
    gamma_rate: Tensor
    """gamma'(t), float64 [B]."""
    gamma_1: Tensor
    """The schedule's noise end, float64 [B]."""
    interior: Interior
    """g(t) and g'(t) as the schedule's network gave them, float64 [B]: where its gradient is reweighted."""
    self_conditioned: Tensor
    """bool [B]."""
    first_pass: Tensor
    """Rows that the network sees twice, int64 [K]: all self-conditioned ones, filled up to a number that depends on B
    alone (static shapes, the same work on every rank, no waiting for the device)."""
    estimates: Tensor
    """Of the clean embeddings, which the network is shown, float32 [B, L, D]: zeros until `passes` has made some."""
    row_weight: Tensor | None = None
    """In training: the global batch over the number of its rows of this kind (reconstruction or diffusion), float64
    [B]. It makes sums over all rows divided by the global batch means over those of one kind."""

    @property
    def reconstructs(self) -> Tensor:
        """Rows at t = 0, which the reconstruction term takes, bool [B]."""
        return self.times == 0


@dataclass(frozen=True)
class Said:
    """What a call of the network says of the tokens: the logits of its head, and to these what z alone says added."""

    tokens: TokenLogits
    z: Tensor
    """float32 [B, L, D]."""
    slope: Tensor | None
    """Of the output prior, float64 [B]; None without it."""
    embeddings: Tensor
    """As of `RePlaidCorrupted`."""
    frozen: Tensor
    """bool [B]."""
    mask_id: int

    @property
    def logits(self) -> Tensor:
        """All of them, float32 [B, L, V], -inf for the mask; of a divided vocabulary this process's part."""
        slope = None if self.slope is None else self.slope[:, None].expand(self.z.shape[:2])
        return self._whole(self.tokens.whole, self.z, slope, self.frozen[:, None].expand(self.z.shape[:2]))

    def in_chunks(self, read: Callable[..., tuple[Tensor, ...]], *by_position: Tensor) -> tuple[Tensor, ...]:
        """As `TokenLogits.in_chunks`: read(logits [M, V], frozen [M], those of `by_position` [B, L]) -> [M, ...] each;
        together [B, L, ...]."""
        shape = self.z.shape[:2]
        each = [self.frozen] if self.slope is None else [self.frozen, self.slope]
        rows = [self.z.flatten(0, 1), *(of_row[:, None].expand(shape).flatten() for of_row in each)]
        others = [values.flatten() for values in by_position]

        def of(logits: Tensor, z: Tensor, *of_rows: Tensor) -> tuple[Tensor, ...]:
            frozen, *more = of_rows[: len(each)]
            return read(self._whole(logits, z, more[0] if more else None, frozen), frozen, *of_rows[len(each) :])

        found = self.tokens.in_chunks(of, *rows, *others)
        return tuple(values.unflatten(0, shape) for values in found)

    def _whole(self, logits: Tensor, z: Tensor, slope: Tensor | None, frozen: Tensor) -> Tensor:
        vocabulary = self.tokens.vocabulary
        if slope is not None:
            logits = add_output_prior(logits, z, slope, self.embeddings, frozen, vocabulary)
        return vocabulary.without_(logits, self.mask_id)


class RePlaid(Objective):
    """Continuous diffusion with a learned schedule, learned embeddings, self-conditioning and a likelihood bound."""

    name = "replaid"
    follows_row_losses = True
    figures = (
        Figure("bound", "token bound", True, "prior, reconstruction and diffusion, t in [0, 1]"),
        Figure("prior", "prior term of the bound", False, "KL of z_1 to a standard normal"),
        Figure("reconstruction", "reconstruction term of the bound", False, "cross-entropy of the tokens given z_0"),
        Figure("diffusion", "diffusion term of the bound", False, "denoising of the embeddings from t = 1 to t = 0"),
    )

    def __init__(
        self,
        config: RePlaidConfig,
        network: EmbeddingNetwork,
        *,
        seed: int,
        given_clean: bool = False,
        mask_id: int,
        bos_id: int,
        eos_id: int,
    ) -> None:
        """`given_clean`: the model is trained on pairs whose source it sees without noise."""
        super().__init__(config, network, mask_id=mask_id, bos_id=bos_id, eos_id=eos_id)
        self.given_clean = given_clean
        self.schedule = Schedule(config.gamma_schedule, gamma_0=config.gamma_0, gamma_1=config.gamma_1, seed=seed)
        self.split = BatchSplit()
        network.embedding.requires_grad_(not config.fixed_embeddings)
        self.extra_forward_passes = 1 / SELF_CONDITIONED_EVERY if config.self_conditioning else 0.0
        self.time_groups = SELF_CONDITIONED_EVERY if config.self_conditioning else 1

    # -- training ----------------------------------------------------------------------------------------------

    def corrupt(self, batch: Batch, noise: Noise) -> RePlaidCorrupted:
        size, num_reconstructed = noise.batch_size, self.split.num_reconstructed(noise.batch_size)
        reconstructs = noise.index < num_reconstructed
        grid = (noise.index - num_reconstructed + noise.shift) / (size - num_reconstructed)
        corrupted = self._corrupt(batch, noise, torch.where(reconstructs, 0.0, grid), *self._self_conditioned(noise))
        num_alike = torch.where(reconstructs, num_reconstructed, size - num_reconstructed)
        return replace(corrupted, row_weight=size / num_alike)

    def _self_conditioned(self, noise: Noise) -> tuple[Tensor, Tensor]:
        """Which rows are self-conditioned, bool [B], and those of the first pass, int64 [K].

        Every fourth sequence of the global order, from a start that is drawn for each step. A micro-batch holds
        consecutive sequences, so one in four of it, rounded up, has room for all of them. Their times are every fourth
        of the batch's (`time_groups`): an even grid, and what is left for the others is even too.
        """
        if not self.config.self_conditioning:
            return torch.zeros_like(noise.ordinals, dtype=torch.bool), noise.ordinals[:0]
        start = fold_key(noise.key, "self-conditioning", self.step) % SELF_CONDITIONED_EVERY
        chosen = (noise.ordinals + start) % SELF_CONDITIONED_EVERY == 0
        room = -(-len(chosen) // SELF_CONDITIONED_EVERY)
        rows = chosen.byte().argsort(descending=True, stable=True)[:room]
        return torch.zeros_like(chosen).scatter(0, rows, chosen[rows]), rows

    def _corrupt(
        self, batch: Batch, noise: Noise, times: Tensor, frozen: Tensor, first_pass: Tensor, purpose: str = "latent"
    ) -> RePlaidCorrupted:
        """Noise at `times` [B]. What the rows of `frozen` [B] get from schedule and embeddings carries no gradient."""
        length = batch.tokens.shape[1]
        # In a pipeline several processes have a part of this gradient, and one the losses that reweight it.
        interior = Interior(self.schedule.normalised(times), waits=self.stage.divided)
        g, g_rate = interior.values
        gamma = _constant_where(frozen, self.schedule.gamma(torch.where(times > 0, g, 0.0)))
        table = self.network.embedding()
        clean = _constant_where(frozen[:, None, None], F.embedding(batch.tokens, table))
        z = noise.noised_latents(clean, process.alpha(gamma), process.sigma(gamma), purpose=purpose)
        return RePlaidCorrupted(
            targets=batch.tokens,
            loss_mask=batch.loss_mask,
            segments=batch.segments,
            times=times,
            dropout=noise.dropout_key(length),
            z=torch.where(batch.condition[..., None], clean, z),
            clean=clean,
            embeddings=self.vocabulary.rows(table),
            given=batch.condition,
            gamma=gamma,
            gamma_rate=_constant_where(frozen, self.schedule.span * g_rate),
            gamma_1=_constant_where(frozen, self.schedule.gamma(torch.ones_like(times))),
            interior=interior,
            self_conditioned=frozen,
            first_pass=first_pass,
            estimates=torch.zeros_like(z),
        )

    def passes(self, corrupted: RePlaidCorrupted) -> Generator[Pass, Tensor, RePlaidCorrupted]:
        """One that gives self-conditioned rows their estimates."""
        rows = corrupted.first_pass
        if not len(rows):
            return corrupted
        found = yield Pass(partial(self._first_estimates, corrupted), len(rows))
        return replace(corrupted, estimates=corrupted.estimates.index_copy(0, rows, found))

    def _first_estimates(self, corrupted: RePlaidCorrupted) -> Tensor:
        said = self.call(corrupted, corrupted.first_pass)
        if not self.stage.at_end:
            return said
        constant = corrupted.self_conditioned[corrupted.first_pass]
        [found] = said.in_chunks(lambda logits, frozen: (self._estimate(logits, corrupted.embeddings, frozen),))
        return found.masked_fill(~constant[:, None, None], 0)

    def call(self, corrupted: RePlaidCorrupted, rows: Tensor | slice = slice(None)) -> Said:
        """Of all rows or some."""
        c = corrupted
        dropout = replace(c.dropout, ordinals=c.dropout.ordinals[rows])
        seen = (c.z, c.gamma, c.times, c.estimates, c.given, c.self_conditioned)
        z, gamma, times, estimates, given, frozen = (each[rows] for each in seen)
        segments = None if c.segments is None else c.segments[rows]
        masks = {"given": given, "frozen": frozen, "segments": segments}
        return self.say(z, gamma, times, estimates, c.embeddings, **masks, dropout=dropout)

    def say(
        self,
        z: Tensor,
        gamma: Tensor,
        times: Tensor,
        estimates: Tensor,
        embeddings: Tensor,
        *,
        given: Tensor,
        frozen: Tensor,
        segments: Tensor | None = None,
        dropout: DropoutKey | None = None,
    ) -> Said:
        """One call of the network, from z float32 [B, L, D] (clean where `given`), gamma and times float64 [B], and an
        estimate of the clean embeddings or zeros. Rows of `frozen` take the table float32 [V, D] as a constant. Of a
        divided vocabulary, table and logits are this process's part. Of a piece that is not the network's last, its
        hidden states."""
        scale = process.unit_scale(gamma, z.shape[-1]).float()[:, None, None]
        inputs = torch.where(given[..., None], z.shape[-1] ** 0.5 * z, scale * z)
        level = gamma if self.config.time_input == "gamma" else times
        tokens = self.network(inputs, estimates, level, dropout if self.training else None, segments)
        if not self.stage.at_end:
            return tokens
        strength = self.output_prior_strength
        slope = strength * process.likelihood_slope(gamma) if strength > 0 else None
        return Said(tokens, z, slope, embeddings, frozen, self.mask_id)

    def logits(self, *args: Tensor, **masks: Tensor) -> Tensor:
        """Of a call as `say` makes it, all logits at once: `Said.logits`."""
        return self.say(*args, **masks).logits

    @property
    def output_prior_strength(self) -> float:
        """kappa: from 0 to 1 in the first steps of training, 1 for the bound and for sampling."""
        if not self.config.output_prior:
            return 0.0
        warmup = min(self.config.output_prior_warmup_steps, self.total_steps // WARMUP_SHARE)
        return min(1.0, self.step / warmup) if self.training and warmup else 1.0

    def _estimate(self, logits: Tensor, embeddings: Tensor, frozen: Tensor) -> Tensor:
        """The embedding that logits [..., V] expect, on every process whole, [..., D]."""
        return self.vocabulary.sum(mean_embedding(self.vocabulary.softmax(logits), embeddings, frozen))

    def loss(self, prediction: Said, corrupted: RePlaidCorrupted) -> LossTerms:
        """Call it once for each `corrupted`: it reweights the gradient of the interior from then on, where that does
        not wait for `finish_gradients`."""
        reconstructs, mask = corrupted.reconstructs, corrupted.loss_mask
        nats, diffusion = self._nats_and_diffusion(prediction, corrupted)
        auxiliary = self.config.auxiliary_weight * nats
        of_row = torch.where(reconstructs[:, None], nats, diffusion + auxiliary).detach()
        of_row = self.context.sum(sum_positions(of_row, mask)) / self.context.sum(mask.sum(1)).clamp(min=1)
        corrupted.interior.follow_mean_square(of_row)

        weight = corrupted.row_weight[:, None]
        terms = {
            "prior": self._prior(corrupted),
            "reconstruction": torch.where(reconstructs[:, None], weight * nats, 0.0),
            "diffusion": torch.where(reconstructs[:, None], 0.0, weight * diffusion),
        }
        if self.config.auxiliary_weight > 0:
            terms["auxiliary"] = torch.where(reconstructs[:, None], 0.0, weight * auxiliary)
        total = sum_terms(terms, mask, None, {"split": self.split.statistics(of_row, reconstructs)})
        # Over time, the diffusion loss alone: what a learned schedule makes constant.
        by_time = sum_terms({"diffusion": diffusion.detach()}, mask & ~reconstructs[:, None], corrupted.times)
        buckets = {"bucket_sums": by_time.bucket_sums, "bucket_counts": by_time.bucket_counts}
        return replace(total, **buckets, row_losses=of_row)

    def finish_gradients(self, corrupted: RePlaidCorrupted, row_losses: Tensor) -> None:
        corrupted.interior.back_propagate(row_losses)

    def _nats_and_diffusion(self, said: Said, corrupted: RePlaidCorrupted) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the targets, and 1/2 gamma' exp(-gamma) ||e - estimate||^2: float64 [B, L]."""

        def read(logits: Tensor, frozen: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            log_probabilities = self.vocabulary.log_softmax(logits)
            nats = -self.vocabulary.take(log_probabilities, targets[:, None]).squeeze(-1)
            estimate = mean_embedding(log_probabilities.exp(), corrupted.embeddings, frozen)
            return nats, self.vocabulary.sum(estimate)

        nats, estimate = said.in_chunks(read, corrupted.targets)
        error = (corrupted.clean.double() - estimate.double()).square().sum(-1)
        return nats.double(), (corrupted.gamma_rate * process.snr(corrupted.gamma) / 2)[:, None] * error

    def _prior(self, corrupted: RePlaidCorrupted) -> Tensor:
        """KL(q(z_1 | x) || N(0, I)), float64 [B, L]."""
        squared_length = corrupted.clean.double().square().sum(-1)
        return process.prior_nats(corrupted.gamma_1[:, None], squared_length, corrupted.clean.shape[-1])

    def update_state(self, statistics: dict[str, Tensor]) -> None:
        self.split.update(statistics["split"])

    def parameter_rates(self) -> dict[str, tuple[float, float]]:
        config, rates = self.config, {}
        if not config.fixed_embeddings:
            rates["network.embedding"] = (config.embedding_lr, 0.0)
        if config.gamma_schedule == "learned":
            rates["schedule.interior"] = (config.schedule_lr, 0.0)
            rates["schedule.gamma_0"] = rates["schedule.gamma_1"] = (config.bounds_lr, 0.0)
        return rates

    # -- evaluation --------------------------------------------------------------------------------------------

    def evaluate(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        """Every sequence gets all three terms; its times are stratified over the draws."""
        rows = torch.arange(len(noise.ordinals), device=noise.ordinals.device)
        everywhere = torch.full_like(rows, self.config.self_conditioning, dtype=torch.bool)
        first_pass = rows if self.config.self_conditioning else rows[:0]
        noisy = self._corrupt(batch, noise, noise.strata, everywhere, first_pass)
        at_start = self._corrupt(batch, noise, torch.zeros_like(noise.strata), everywhere, first_pass, "reconstruction")
        nats, _ = self._nats_and_diffusion(self.predict(at_start), at_start)
        _, diffusion = self._nats_and_diffusion(self.predict(noisy), noisy)
        terms = {"prior": self._prior(noisy), "reconstruction": nats, "diffusion": diffusion}
        sums = {name: sum_positions(values, batch.loss_mask) for name, values in terms.items()}
        return {"bound": sum(sums.values()), **sums}

    def schedule_curves(self, times: Tensor) -> dict[str, Tensor]:
        gamma = self.schedule(times.double())
        return {"gamma": gamma, "alpha": process.alpha(gamma), "sigma": process.sigma(gamma)}


def _constant_where(frozen: Tensor, values: Tensor) -> Tensor:
    """The same values, without gradient where `frozen`."""
    return torch.where(frozen, values.detach(), values)


def build(config: Config, tokenizer: Tokenizer, encoder: Encoder | None, region: Region = ALONE) -> RePlaid:
    """From a configuration and the corpus's tokenizer."""
    settings = config.objective
    network = EmbeddingNetwork(
        config.model,
        vocab_size=tokenizer.vocab_size,
        num_dims=settings.embedding_dim,
        seed=config.run.seed,
        region=region,
    )
    given_clean = config.data.packing == "pairs"
    return RePlaid(settings, network, seed=config.run.seed, given_clean=given_clean, **special_ids(tokenizer))
