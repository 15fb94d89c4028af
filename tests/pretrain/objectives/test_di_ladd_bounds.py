"""Di-LADD's bounds by enumeration: texts, masks of tokens and codes, and quadrature over times; no Monte Carlo."""

import math

import pytest
import torch

from braid.data_pipeline.loader import Batch
from braid.pretrain.model.token_logits import TokenLogits

from .ladd_cases import (
    CODE_ENTROPY,
    CODES,
    ENTROPY,
    LAW,
    SEQUENCES,
    ToyNetwork,
    ToyNoise,
    gauss_legendre,
    toy,
    toy_masks,
)
from .references import toy_law

T_MIN = 1e-5


def expected_figures(network: ToyNetwork, **options) -> dict[str, float]:
    """Every figure of `evaluate` in expectation over texts of LAW, masks and times (exact: polynomials in t).

    Every text is followed by one position of padding, always masked, which must cost nothing.
    """
    objective = toy("di_ladd", **options)
    objective.network = PaddedToken(network)
    assert objective.code_survival.power == options.get("latent_power", 1.0)
    totals: dict[str, float] = {}
    for node, weight in gauss_legendre(12):
        t = T_MIN + (1 - T_MIN) * node
        code_masked = t**objective.code_survival.power
        rows = []  # (text, token uniforms, code uniform, probability)
        for *tokens, code in toy_masks(3):
            probability = weight * math.prod(t if m else 1 - t for m in tokens)
            probability *= code_masked if code else 1 - code_masked
            for text in range(len(SEQUENCES)):
                rows.append((text, [*(0.0 if m else 1.0 for m in tokens), 0.0], [0.0 if code else 1.0],
                             probability * float(LAW[text])))  # fmt: skip
        texts, uniforms, code_uniforms, probabilities = map(torch.tensor, zip(*rows, strict=True))
        ordinals = torch.arange(len(rows))
        noise = ToyNoise(0, ordinals, torch.zeros_like(ordinals), torch.full((len(rows),), node).double(), 1,
                         token_uniforms=uniforms, code_uniforms=code_uniforms)  # fmt: skip
        tokens = torch.nn.functional.pad(SEQUENCES[texts], (0, 1), value=5)
        batch = Batch(tokens, torch.tensor([True, True, False]).expand(len(rows), -1), ordinals)
        for name, value in objective.evaluate(batch, noise).items():
            totals[name] = totals.get(name, 0.0) + float((probabilities.double() * value).sum())
    return totals


class PaddedToken(torch.nn.Module):
    """A toy network for texts with one position of padding after them."""

    def __init__(self, network: ToyNetwork) -> None:
        super().__init__()
        self.network, self.latent_mask = network, network.latent_mask

    def forward(self, tokens, latents, times, latent_times, dropout=None):
        prediction = self.network(tokens[:, :-1], latents, times, latent_times)
        padded = torch.nn.functional.pad(prediction.logits, (0, 0, 0, 1))
        return prediction._replace(tokens=TokenLogits.known(padded))


def test_the_code_is_a_function_of_the_text_that_the_codebook_computes():
    objective = toy("di_ladd")
    batch = Batch(SEQUENCES, torch.ones_like(SEQUENCES, dtype=torch.bool), torch.arange(9))
    vectors, codes = objective.codes(batch, torch.zeros_like(batch.condition))
    assert torch.equal(codes[:, 0], CODES) and 0 < int(CODES.sum()) < 9
    assert torch.equal(vectors[:, 0, 0], 1.0 - 2 * CODES)


@pytest.mark.parametrize("power", [{}, {"latent_schedule": "poly", "latent_power": 2.0}])
def test_both_nelbos_are_the_entropy_for_the_bayes_denoiser(power):
    """E[NELBO] = H(x), on the joint path and on the sequential one: the code adds nothing to what the text costs.

    (Up to the 1e-5 of time that is left out.) The token part of the sequential one is H(x | code).
    """
    figures = expected_figures(ToyNetwork(), **power)
    assert figures["joint_nelbo"] == pytest.approx(ENTROPY, abs=5e-5)
    assert figures["sequential_nelbo"] == pytest.approx(ENTROPY, abs=5e-5)
    assert figures["token_nats_given_latents"] == pytest.approx(ENTROPY - CODE_ENTROPY, abs=5e-5)
    assert figures["token_bound_latents_off"] == pytest.approx(ENTROPY, abs=5e-5)
    assert CODE_ENTROPY > 0.3


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_both_nelbos_are_above_the_entropy_for_other_denoisers(seed):
    """The Bayes denoiser of another law costs that law's cross-entropy: E[-log p(x)] under p = other, exactly."""
    _, other = toy_law(length=2, vocabulary=3, seed=seed)
    figures = expected_figures(ToyNetwork(other))
    cost = float(-(LAW * other.log()).sum())
    assert cost > ENTROPY + 0.01
    for name in ("joint_nelbo", "sequential_nelbo", "token_bound_latents_off"):
        assert figures[name] == pytest.approx(cost, abs=1e-4)


def test_a_denoiser_without_the_code_pays_for_it_twice():
    """One that knows the law of the texts but not that the code follows from them is a bound too, and a loose one."""
    figures = expected_figures(ToyNetwork(latents_matter=False))
    assert figures["joint_nelbo"] > ENTROPY + 0.1 and figures["sequential_nelbo"] > ENTROPY + 0.1
    # Here the code is modelled from x_t alone and the text without it.
    assert figures["sequential_nelbo"] == pytest.approx(ENTROPY + CODE_ENTROPY, abs=5e-5)
    assert figures["token_nats_given_latents"] == pytest.approx(ENTROPY, abs=5e-5)


def test_codes_of_visible_tokens_leave_a_bound():
    """A denoiser that ignores them is the plain one; one that takes them for the whole text's is wrong, and pays."""
    assert expected_figures(ToyNetwork(latents_matter=False))["token_bound"] == pytest.approx(ENTROPY, abs=5e-5)
    assert expected_figures(ToyNetwork())["token_bound"] > ENTROPY + 0.1


def test_independent_times_bound_neither_path():
    """The release evaluates both parts at independent times. For the Bayes denoiser that is *below* the entropy: no
    bound at all, while both paths give the entropy."""
    objective = toy("di_ladd")
    objective.network = ToyNetwork()
    batch = Batch(SEQUENCES, torch.ones_like(SEQUENCES, dtype=torch.bool), torch.arange(9))
    vectors, codes = objective.codes(batch, torch.zeros_like(batch.condition))

    total, diagonal = 0.0, 0.0
    for t, weight in gauss_legendre(12):
        for u, other_weight in gauss_legendre(12):
            for *tokens, code in toy_masks(3):
                masked = torch.tensor(tokens).expand(9, -1)
                masked_code = torch.full((9, 1), code)
                x_t = torch.where(masked, objective.mask_id, SEQUENCES)
                times, latent_times = torch.full((9,), t).double(), torch.full((9,), u).double()
                nats, prediction = objective.bound_terms(
                    batch, (x_t, masked), objective.shown(vectors, masked_code), times, latent_times
                )
                code_nats = objective.code_nats(prediction, codes, masked_code).double().sum(1)
                cost = float((LAW * (nats / t + code_nats / u)).sum())
                token_probability = math.prod(t if m else 1 - t for m in tokens)
                total += weight * other_weight * token_probability * (u if code else 1 - u) * cost
                if t == u:
                    diagonal += weight * token_probability * (t if code else 1 - t) * cost
    assert diagonal == pytest.approx(ENTROPY, abs=1e-6), "the same sum at equal times is the joint NELBO"
    assert total < ENTROPY - 0.02


def test_figures_say_what_they_are():
    objective = toy("di_ladd")
    bounds = {figure.name: figure.is_bound for figure in objective.figures}
    assert bounds == {
        "joint_nelbo": True, "sequential_nelbo": True, "token_nats_given_latents": False, "token_bound": True,
        "token_bound_latents_off": True,
    }  # fmt: skip
    by_name = {figure.name: figure for figure in objective.figures}
    assert "frozen" in by_name["joint_nelbo"].note and "bound" not in by_name["token_nats_given_latents"].label
    together = toy("di_ladd", independent_times=False)
    assert "sequential_nelbo" not in {figure.name for figure in together.figures}
    assert "joint" in {figure.name: figure.note for figure in together.figures}["token_nats_given_latents"]
