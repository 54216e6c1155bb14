"""DD2's losses against float64 closed forms: the direction is the difference of two scores, and nothing else."""

import pytest
import torch
from torch.nn import functional as F

from ddops.distill.dd2 import log_density_ratio
from ddops.losses.dd2 import (
    csd_direction,
    csd_loss,
    denoising_error,
    diffuse,
    divergence_weight,
    gradient_scale,
    straight_through_codes,
)
from ddops.models.ar_diffusion import codebook_mean, nearest_logits
from ddops.models.quantization import nearest_code

B, L, V, C = 3, 5, 7, 2


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def codes():
    """A codebook, two conditionals on it, and noisy tokens at times of their own, one of them close to the data."""
    t_BL = torch.rand(B, L, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    t_BL[0, 0] = 0.999
    codebook_VC, q_BLC = random(V, C), random(B, L, C, seed=1)
    log_p_BLV, log_g_BLV = (2 * random(B, L, V, seed=seed) for seed in (2, 3))
    x_BLC = diffuse(q_BLC, random(B, L, C, seed=4), t_BL)
    return codebook_VC, log_p_BLV.log_softmax(-1), log_g_BLV.log_softmax(-1), x_BLC, t_BL


def mixture_score(x_BLC, t_BL, log_p_BLV, codebook_VC):
    """Gradient of the log-density of ``x_t``, a mixture of Gaussians of width 1 - t around t times each code."""
    x_BLC = x_BLC.clone().requires_grad_()
    distance_BLV = (x_BLC[:, :, None] - t_BL[..., None, None] * codebook_VC).square().sum(-1)
    log_density_BL = (log_p_BLV - distance_BLV / (2 * (1 - t_BL[..., None]).square())).logsumexp(-1)
    return torch.autograd.grad(log_density_BL.sum(), x_BLC)[0]


def test_the_direction_is_the_difference_of_the_scores_on_a_codebook(codes):
    codebook_VC, log_p_BLV, log_g_BLV, x_BLC, t_BL = codes
    means = [codebook_mean(x_BLC, t_BL, log_BLV, codebook_VC) for log_BLV in (log_p_BLV, log_g_BLV)]
    scores = [mixture_score(x_BLC, t_BL, log_BLV, codebook_VC) for log_BLV in (log_p_BLV, log_g_BLV)]
    direction_BLC = csd_direction(*means, t_BL, "score")
    torch.testing.assert_close(direction_BLC, scores[0] - scores[1], atol=1e-7, rtol=1e-7)


def test_the_direction_is_the_difference_of_the_scores_of_gaussians():
    """Where the data are N(mean, spread^2), so is x_t: N(t mean, t^2 spread^2 + (1 - t)^2)."""
    t_BL = torch.linspace(0.05, 0.95, B * L, dtype=torch.float64).view(B, L)
    x_BLC, t_BL1 = random(B, L, C), t_BL[..., None]
    centres, spreads = (random(B, L, C, seed=1), random(B, L, C, seed=2)), (0.3, 0.8)
    posterior_means, scores = [], []
    for centre_BLC, spread in zip(centres, spreads, strict=True):
        variance_BL1 = (t_BL1 * spread).square() + (1 - t_BL1).square()
        scores.append(-(x_BLC - t_BL1 * centre_BLC) / variance_BL1)
        posterior_means.append(centre_BLC + t_BL1 * spread**2 / variance_BL1 * (x_BLC - t_BL1 * centre_BLC))
    torch.testing.assert_close(csd_direction(*posterior_means, t_BL, "score"), scores[0] - scores[1])


def test_the_direction_of_velocities_is_their_difference(codes):
    codebook_VC, log_p_BLV, log_g_BLV, x_BLC, t_BL = codes
    means = [codebook_mean(x_BLC, t_BL, log_BLV, codebook_VC) for log_BLV in (log_p_BLV, log_g_BLV)]
    velocities = [(mean_BLC - x_BLC) / (1 - t_BL[..., None]) for mean_BLC in means]
    torch.testing.assert_close(csd_direction(*means, t_BL, "velocity"), velocities[0] - velocities[1])


@pytest.mark.parametrize("weighting", ["mean", "velocity", "score"])
def test_the_direction_vanishes_where_the_conditionals_agree(codes, weighting):
    codebook_VC, log_p_BLV, _, x_BLC, t_BL = codes
    mean_BLC = codebook_mean(x_BLC, t_BL, log_p_BLV, codebook_VC)
    assert csd_direction(mean_BLC, mean_BLC.clone(), t_BL, weighting).abs().max() == 0


@pytest.mark.parametrize("weighting", ["mean", "velocity", "score"])
def test_the_direction_stays_finite_in_float32_as_t_approaches_the_data(codes, weighting):
    codebook_VC, log_p_BLV, log_g_BLV, x_BLC, _ = (value.float() for value in codes)
    t_BL = torch.full((B, L), 1 - 1e-4)
    means = [codebook_mean(x_BLC, t_BL, log_BLV, codebook_VC) for log_BLV in (log_p_BLV, log_g_BLV)]
    assert csd_direction(*means, t_BL, weighting).isfinite().all()


def test_the_surrogates_gradient_is_the_direction():
    q_BLC, direction_BLC = random(B, L, C).requires_grad_(), random(B, L, C, seed=1)
    scale_B = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    csd_loss(q_BLC, direction_BLC, scale_B).sum().backward()
    torch.testing.assert_close(q_BLC.grad, -scale_B[:, None, None] * direction_BLC / L)


def test_normalised_samples_weigh_the_same_whatever_the_size_of_their_direction():
    direction_BLC, q_BLC, mean_BLC = (random(B, L, C, seed=seed) for seed in (0, 1, 2))
    direction_BLC = direction_BLC * torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64)[:, None, None]
    scale_B = gradient_scale(direction_BLC, q_BLC, mean_BLC, "direction")
    torch.testing.assert_close((scale_B[:, None, None] * direction_BLC).abs().mean((1, 2)), torch.ones(B).double())
    distance_B = gradient_scale(direction_BLC, q_BLC, mean_BLC, "distance")
    torch.testing.assert_close(1 / distance_B, (q_BLC - mean_BLC).abs().mean((1, 2)))
    assert gradient_scale(0 * direction_BLC, q_BLC, q_BLC, "distance").isfinite().all()


def test_denoising_towards_the_token_learns_the_posterior_mean(codes):
    """The flow-matching target is noisy, and its mean over what the token may be is the ground-truth score's target:
    both losses have the same gradient in expectation."""
    codebook_VC, log_p_BLV, _, x_BLC, t_BL = codes
    exact_BLC = codebook_mean(x_BLC, t_BL, log_p_BLV, codebook_VC)
    precision_BL11 = (1 / (1 - t_BL)).square()[..., None]
    distance_BLV = (x_BLC[:, :, None] - t_BL[..., None, None] * codebook_VC).square().sum(-1)
    posterior_BLV = (log_p_BLV - precision_BL11 * distance_BLV / 2).softmax(-1)
    guess_BLC = random(B, L, C, seed=6).requires_grad_()
    (exact,) = torch.autograd.grad(denoising_error(guess_BLC, exact_BLC, t_BL, "velocity").sum(), guess_BLC)
    expected = torch.zeros_like(exact)
    for code in range(V):
        error_B = denoising_error(guess_BLC, codebook_VC[code].expand(B, L, C), t_BL, "velocity")
        expected += posterior_BLV[..., code, None] * torch.autograd.grad(error_B.sum(), guess_BLC)[0]
    torch.testing.assert_close(expected, exact)


def test_straight_through_codes_are_codes_with_the_gradient_of_the_expectation():
    logits_BLV, codebook_VC = random(B, L, V).requires_grad_(), random(V, C, seed=1)
    weight_BLC = random(B, L, C, seed=2)
    ids_BL = logits_BLV.argmax(-1)
    q_BLC = straight_through_codes(logits_BLV, ids_BL, codebook_VC)
    torch.testing.assert_close(q_BLC, F.embedding(ids_BL, codebook_VC))
    with torch.no_grad():
        assert torch.equal(straight_through_codes(logits_BLV, ids_BL, codebook_VC), F.embedding(ids_BL, codebook_VC))
    (gradient,) = torch.autograd.grad((weight_BLC * q_BLC).sum(), logits_BLV)
    (expected,) = torch.autograd.grad((weight_BLC * (logits_BLV.softmax(-1) @ codebook_VC)).sum(), logits_BLV)
    torch.testing.assert_close(gradient, expected)


def test_the_likeliest_code_of_nearest_logits_is_the_nearest():
    embeddings_BLC, codebook_VC = random(B, 50, C), random(V, C, seed=1)
    assert torch.equal(
        nearest_logits(embeddings_BLC, codebook_VC).argmax(-1), nearest_code(embeddings_BLC, codebook_VC)
    )


def f_divergence(p_N, q_N, step, divergence):
    """Of two densities on a grid, by the midpoint rule; (the mean of the) reference for its gradient in q."""
    middle_N = (p_N + q_N) / 2
    if divergence == "reverse":
        return (q_N * (q_N / p_N).log()).sum() * step
    if divergence == "forward":
        return (p_N * (p_N / q_N).log()).sum() * step
    return 2 * (p_N * (p_N / middle_N).log() + q_N * (q_N / middle_N).log()).sum() * step


@pytest.mark.parametrize("divergence", ["reverse", "jensen_shannon", "forward"])
def test_weighted_score_differences_descend_the_divergence_that_they_are_named_after(divergence):
    """Moving a Gaussian q along itself by d changes D(p, q) by ``-d E_q[weight (s_p - s_q)]``: by quadrature against
    the divergence's own derivative."""
    x_N = torch.arange(-12, 12, 1e-3, dtype=torch.float64) + 5e-4
    shift = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    p = torch.distributions.Normal(torch.tensor(0.0).double(), 0.7)
    q = torch.distributions.Normal(shift, 0.9)
    log_p_N, log_q_N = p.log_prob(x_N), q.log_prob(x_N)
    divergence_value = f_divergence(log_p_N.exp(), log_q_N.exp(), 1e-3, divergence)
    (expected,) = torch.autograd.grad(divergence_value, shift)
    with torch.no_grad():
        score_difference_N = -x_N / 0.7**2 + (x_N - shift) / 0.9**2
        weight_N = divergence_weight((log_p_N - log_q_N)[None], divergence)[0]
        found = -(log_q_N.exp() * weight_N * score_difference_N).sum() * 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_the_ratio_of_densities_is_that_of_two_mixtures_of_gaussians(codes):
    codebook_VC, log_p_BLV, log_g_BLV, x_BLC, t_BL = codes

    def log_density(log_BLV):
        components = torch.distributions.Normal(t_BL[..., None, None] * codebook_VC, (1 - t_BL)[..., None, None])
        return (log_BLV + components.log_prob(x_BLC[:, :, None]).sum(-1)).logsumexp(-1)

    expected_BL = log_density(log_p_BLV) - log_density(log_g_BLV)
    found_BL = log_density_ratio(x_BLC, t_BL, log_p_BLV, log_g_BLV, codebook_VC)
    torch.testing.assert_close(found_BL, expected_BL, atol=1e-6, rtol=1e-6)
    at_noise_BL = log_density_ratio(x_BLC, 0 * t_BL, log_p_BLV, log_g_BLV, codebook_VC)
    torch.testing.assert_close(at_noise_BL, torch.zeros_like(t_BL), atol=1e-12, rtol=0)
