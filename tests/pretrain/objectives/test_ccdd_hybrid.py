"""CCDD with uniform noise on its tokens: leaks, the loss and the bounds against matrices, enumeration, samplers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from braid.data_pipeline.loader import Batch
from braid.kernels.random import fold_key
from braid.parallel.vocabulary import Vocabulary
from braid.pretrain.config.schema import SamplingConfig
from braid.pretrain.diffusion.hybrid import Hybrid
from braid.pretrain.diffusion.times import log_uniform_mixture
from braid.pretrain.model.joint import JointPrediction
from braid.pretrain.objectives.base import Noise
from braid.pretrain.sampling.prompts import Prompt, no_prompt
from braid.pretrain.sampling.sampler import draw_samples

from ..diffusion.chains import Chain
from .ccdd_cases import make, recorded_calls, with_condition
from .conftest import LATENT_DIM, MASK, VOCAB, batch_and_noise
from .noisy_oracles import Bayes, Wanted, exact_figure, law_of_samples
from .references import toy_law

P_UNIFORM = 0.3
CHAIN, SMALL = Chain(VOCAB, MASK, p_uniform=P_UNIFORM), Chain(4, 3, p_uniform=P_UNIFORM)
STATES = torch.cartesian_prod(*[torch.arange(4)] * 2)
SEQUENCES, LAW = toy_law(length=2, vocabulary=3, seed=0)
ENTROPY = float(-(LAW * LAW.log()).sum())
K = VOCAB - 1


def hybrid(*args, **options):
    return make(*args, p_uniform=P_UNIFORM, **options)


class JointBayes(Bayes):
    """The Bayes denoiser beside an estimate of the clean latents that is always 0."""

    vocabulary = Vocabulary(4)

    def forward(self, tokens, times, latents, dropout=None, segments=None) -> JointPrediction:
        return JointPrediction(super().forward(tokens, times).tokens, torch.zeros_like(latents))


def with_bayes(law: torch.Tensor = LAW, *, leave_one_out: bool = True, **options):
    """Over three tokens and a mask. Every token has the same representation: latents say nothing."""
    ccdd = hybrid(**options)
    ccdd.encoder.table = ccdd.encoder.table[:1].expand(VOCAB, -1)
    ccdd.network = JointBayes(SMALL, SEQUENCES, law, leave_one_out=leave_one_out)
    ccdd.mask_id, ccdd.vocabulary, ccdd.hybrid = SMALL.mask_id, ccdd.network.vocabulary, Hybrid(P_UNIFORM, 1.0, 3)
    return ccdd


# -- corruption and leaks --------------------------------------------------------------------------------------------


def test_tokens_are_masked_replaced_or_left_as_the_process_says():
    ccdd = hybrid(latent_dropout=0.0)
    batch, noise = batch_and_noise(4000)
    batch = with_condition(batch, 2)
    times = torch.full((4000,), 0.5, dtype=torch.float64)
    corrupted = ccdd._corrupt(batch, noise, times, times, torch.ones(4000))
    assert torch.equal(corrupted.tokens[:, :2], batch.tokens[:, :2]) and corrupted.masked is None
    tokens, clean = corrupted.tokens[:, 2:], batch.tokens[:, 2:]
    law = CHAIN.marginal(0.5)[0]
    for share, expected in (((tokens == MASK), law[MASK]), ((tokens == clean), law[0])):
        assert float(share.double().mean()) == pytest.approx(float(expected), abs=5 * 0.5 / math.sqrt(tokens.numel()))


@pytest.mark.parametrize("options", [{}, {"latent_mode": "features"}, {"latent_times": "independent"}], ids=str)
@pytest.mark.parametrize("kind", ["table", "qwen3", "roberta", "trained"])
def test_what_was_masked_or_replaced_does_not_reach_the_network(kind, options):
    """At p_r = 1: change every token that x_t does not show, keep all randomness; the whole input stays bit for bit.
    At p_r = 0 the encoder sees it."""
    ccdd = hybrid("mdit", kind, full_visibility_probability=0.5 if options.get("latent_mode") else 1.0,
                  latent_dropout=0.0, **options)  # fmt: skip
    batch, noise = batch_and_noise(16)
    batch = with_condition(batch, 3)
    corrupted = ccdd.corrupt(batch, noise)
    gone = corrupted.tokens != batch.tokens
    assert (gone & (corrupted.tokens == MASK)).any() and (gone & (corrupted.tokens != MASK)).any()
    changed = replace(batch, tokens=torch.where(gone, (batch.tokens + 1) % K, batch.tokens))
    other = ccdd.corrupt(changed, noise)
    assert torch.equal(corrupted.tokens, other.tokens) and torch.equal(corrupted.latents, other.latents)
    here, there = ccdd.predict(corrupted), ccdd.predict(other)
    assert torch.equal(here.logits, there.logits) and torch.equal(here.latents, there.latents)
    nothing = torch.zeros(16)
    seen, others = (ccdd._corrupt(each, noise, corrupted.times, corrupted.times, nothing) for each in (batch, changed))
    assert not torch.equal(seen.latents, others.latents)


def test_the_encoder_reads_replaced_tokens_as_they_are():
    """Latents at p_r = 1 are those of x_t: what a sampler that has x_t could make."""
    ccdd = hybrid("mdit", "qwen3", latent_mode="features")
    batch, noise = batch_and_noise(16)
    corrupted = ccdd.corrupt(batch, noise)
    expected = ccdd.encoder.encode(corrupted.tokens, corrupted.tokens == MASK)
    alpha, sigma = ccdd.schedule.alpha(corrupted.latent_times), ccdd.schedule.sigma(corrupted.latent_times)
    assert torch.equal(corrupted.latents, noise.noised_latents(expected, alpha, sigma))


# -- the loss --------------------------------------------------------------------------------------------------------


def naive_divergence(logits, corrupted) -> torch.Tensor:
    """KL plus Itakura-Saito divergence of both marginals by the chain's matrices, float64 [B, L]."""
    p = torch.where(torch.arange(VOCAB) == MASK, -torch.inf, logits.double()).softmax(-1)
    matrices = torch.stack([CHAIN.marginal(t) for t in corrupted.times.tolist()])
    true = torch.stack([matrix[row] for matrix, row in zip(matrices, corrupted.targets, strict=True)])
    model = p @ matrices
    kl = (torch.special.xlogy(true, true) - torch.special.xlogy(true, model)).sum(-1)
    ratio = (true / model).gather(-1, corrupted.tokens[..., None])[..., 0]
    return kl + ratio - ratio.log() - 1


def weights(name: str, corrupted) -> torch.Tensor:
    """The specification's, float64 [B, L]."""
    t, masked, same = corrupted.times[:, None], corrupted.tokens == MASK, corrupted.tokens == corrupted.targets
    scale = 2 * P_UNIFORM / (1 - P_UNIFORM)
    c = scale * (t * (1 - t)).sqrt()
    rate = c + (1 - t) * (1 - 2 * t) / (2 * t * (1 - t)) * c
    return {
        "dynamic": torch.where(masked, 2.0, torch.where(same, (scale / K * (t / (1 - t)).sqrt()).clamp(max=2), 1.0)),
        "elbo": torch.where(
            masked, 1 / (t * (1 - t)),
            torch.where(same, rate / (K * (1 - t) * (1 - t + c / K)), rate / ((1 - t) * c)),
        ),
        "uniform": torch.ones_like(corrupted.targets, dtype=torch.float64),
    }[name]  # fmt: skip


@pytest.mark.parametrize("name", ["dynamic", "elbo", "uniform"])
def test_the_token_loss_is_the_naive_one_and_so_is_its_gradient(name):
    ccdd = hybrid(token_weight=name)
    batch, noise = batch_and_noise(12, padding=2)
    corrupted = ccdd.corrupt(with_condition(batch, 3), noise)
    logits = ccdd.predict(corrupted).logits.detach().requires_grad_()
    tokens = ccdd.predict(corrupted).tokens
    loss = ccdd.loss(ccdd.predict(corrupted)._replace(tokens=type(tokens).known(logits)), corrupted)
    scored = weights(name, corrupted) * naive_divergence(logits, corrupted) * corrupted.loss_mask
    assert float(loss.terms["token_loss"]) == pytest.approx(float(scored.sum().detach()), rel=1e-6)
    (ours,), (theirs,) = (
        torch.autograd.grad(total, logits) for total in (loss.total, scored.sum())
    )  # fmt: skip
    assert torch.allclose(ours, theirs.to(ours.dtype), rtol=1e-4, atol=1e-6 * float(theirs.abs().max()))
    plain = make(token_weight=name)
    kept, masks = ccdd.loss(ccdd.predict(corrupted), corrupted), plain.corrupt(with_condition(batch, 3), noise)
    assert kept.terms.keys() == plain.loss(plain.predict(masks), masks).terms.keys()
    assert int(kept.count) == int(corrupted.loss_mask.sum())


# -- bounds ----------------------------------------------------------------------------------------------------------


def bound_times(u: torch.Tensor) -> torch.Tensor:
    return (1e-5 + (1 - 1e-5) * u) ** 2


def test_the_token_bound_is_the_entropy_for_the_leave_one_out_posterior_alone():
    """By enumeration of all x_t and quadrature over t."""
    tight = exact_figure(with_bayes(), SMALL, SEQUENCES, bound_times, "token_bound", nodes=12)
    end = with_bayes().hybrid.end_nats()
    assert float((LAW * tight).sum()) == pytest.approx(ENTROPY + 2 * end, abs=2e-3) and end < 1e-3
    loose = exact_figure(with_bayes(leave_one_out=False), SMALL, SEQUENCES, bound_times, "token_bound", nodes=6)
    assert float((LAW * loose).sum()) > ENTROPY + 0.05


def token_part(ccdd) -> float:
    """Of the joint NELBO in the mean over texts and all x_t, by quadrature over t on [tau, 1] and at tau."""
    nodes, node_weights = np.polynomial.legendre.leggauss(16)
    strata = torch.from_numpy((nodes + 1) / 2)
    times, density = log_uniform_mixture(strata, ccdd.tau)
    moments = [
        *zip(times.tolist(), (torch.from_numpy(node_weights / 2) / density).tolist(), strict=True),
        (ccdd.tau, 0),
    ]
    total = 0.0
    for t, weight in moments:
        probability = LAW[:, None] * SMALL.marginal(t)[SEQUENCES[:, None], STATES[None]].prod(-1)
        which, state = (probability > 0).nonzero(as_tuple=True)
        clean, at = SEQUENCES[which], torch.full((len(which),), t, dtype=torch.float64)
        noise = Wanted(0, torch.arange(len(which)), torch.zeros_like(which), at, 1, chain=SMALL, wanted=STATES[state],
                       clean=clean, at=at)  # fmt: skip
        batch = Batch(clean, torch.ones_like(clean, dtype=torch.bool), torch.arange(len(which)))
        prediction, corrupted, _ = ccdd._jointly(batch, noise, at, torch.zeros(*clean.shape, LATENT_DIM))
        assert torch.equal(corrupted.tokens, STATES[state])
        nats = (
            ccdd._density_of(prediction, corrupted) * weight if weight else ccdd._decoding_nats(prediction, corrupted)
        )
        total += float((probability[which, state] * nats).sum())
    return total


def decoding_gap(t: float) -> float:
    """What decoding both tokens at once costs beyond their entropy given x_t: their mutual information, by Bayes."""
    joint = LAW[:, None] * SMALL.marginal(t)[SEQUENCES[:, None], STATES[None]].prod(-1)  # [S, X]
    law = joint.sum(0)
    posterior = (joint / law.clamp(min=1e-300)).T.view(-1, 3, 3)
    independent = posterior.sum(2, keepdim=True) * posterior.sum(1, keepdim=True)
    mutual = torch.special.xlogy(posterior, posterior) - torch.special.xlogy(posterior, independent)
    return float((law * mutual.sum((1, 2))).sum())


def test_the_joint_nelbos_token_part_is_the_entropy_and_the_price_of_decoding_at_tau():
    ccdd = with_bayes(latent_sigma=0.5)
    gap = decoding_gap(ccdd.tau)
    assert ccdd.tau == pytest.approx(0.2) and gap > 2e-3
    assert token_part(ccdd) == pytest.approx(ENTROPY + gap, abs=5e-4)
    wrong = with_bayes(toy_law(length=2, vocabulary=3, seed=1)[1], latent_sigma=0.5)
    assert token_part(wrong) > ENTROPY + gap + 0.05


def test_figures_say_where_they_begin_and_hold_together():
    ccdd = hybrid()
    figures = {figure.name: figure for figure in ccdd.figures}
    assert "uniform noise" in figures["token_bound"].note and figures["joint_nelbo"].is_bound
    ordinals = torch.arange(4)
    batch, _ = batch_and_noise(4)
    values = ccdd.evaluate(batch, Noise.evaluation(fold_key(0, "validation"), ordinals, 0, 2))
    assert values.keys() == figures.keys() and all(bool(value.isfinite().all()) for value in values.values())


# -- samplers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"latent_mode": "features"}], ids=["diffused", "features"])
def test_samples_follow_the_law_of_the_chain(options):
    """Six steps: the law that enumeration of the reverse kernels gives; every position is drawn anew at every step, and
    all are called for."""
    ccdd, num = with_bayes(**options), 3000
    samples = draw_samples(ccdd, SamplingConfig(steps=6), no_prompt(num, 2), key=3)
    assert samples.network_calls == [6] * num
    law = law_of_samples(SMALL, Bayes(SMALL, SEQUENCES, LAW), SEQUENCES, 6)
    counts = torch.bincount(samples.tokens[:, 0] * 3 + samples.tokens[:, 1], minlength=9)

    def chi_square(law: torch.Tensor) -> float:
        return float(((counts - num * law).square() / (num * law)).sum())

    assert chi_square(law) < 26.1, "8 degrees of freedom, once in 1000"
    assert chi_square(LAW) > 52, "not yet the data's"


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "joint_nelbo"])
def test_tokens_are_revised_and_prompts_hold(sampler):
    ccdd = hybrid("mdit", "qwen3")
    prompt = no_prompt(3, 10)
    prompt.tokens[:, 2:5], prompt.known[:, 2:5] = torch.tensor([1, 2, 3]), True
    calls = recorded_calls(ccdd)
    samples = draw_samples(ccdd, SamplingConfig(steps=12, sampler=sampler, guidance=2.0), prompt, key=1)
    assert samples.network_calls == [24] * 3 and not (samples.tokens == MASK).any()
    seen = torch.stack([call["tokens"] for call in calls])
    assert (seen[:, :, 2:5] == torch.tensor([1, 2, 3])).all() and (seen[0][~prompt.known] == MASK).all()
    before, after = seen[:-1], seen[1:]
    assert ((before != MASK) & (after != before)).any(), "what was written is masked or replaced again"
    alone = draw_samples(ccdd, SamplingConfig(steps=12, sampler=sampler, guidance=2.0),
                         Prompt(prompt.tokens[:1], prompt.known[:1]), key=1, first_ordinal=1)  # fmt: skip
    assert torch.equal(alone.tokens, samples.tokens[1:2])
