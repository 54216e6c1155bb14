"""The flow over a codebook: its solvers against closed forms, a fine float64 solve, and the distribution itself."""

import numpy as np
import pytest
import torch
from scipy import stats

from ddops.flow import solvers
from ddops.flow.codebook import posterior_mean, score, velocity
from ddops.flow.solvers import flow_map


def problem(n, v, c, *, unit=True, sharpness=1.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    codebook = torch.randn(v, c, generator=generator, dtype=dtype)
    if unit:
        codebook = torch.nn.functional.normalize(codebook, dim=-1)
    log_p = (sharpness * torch.randn(n, v, generator=generator, dtype=dtype)).log_softmax(-1)
    return torch.randn(n, c, generator=generator, dtype=dtype), log_p, codebook


def brute_posterior_mean(x, t, log_p, codebook):
    distance = (x[:, None] - t * codebook[None]).square().sum(-1)
    weights = (log_p - distance / (2 * (1 - t) ** 2)).softmax(-1)
    return (weights[..., None] * codebook[None]).sum(1)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9, 0.99])
def test_posterior_mean_is_its_definition(t):
    x, log_p, codebook = problem(50, 20, 3)
    torch.testing.assert_close(
        posterior_mean(x, t, log_p, codebook), brute_posterior_mean(x, t, log_p, codebook), atol=1e-10, rtol=1e-10
    )


def test_a_time_for_each_token_equals_one_time_at_a_time():
    x, log_p, codebook = problem(4, 20, 3)
    t = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64)
    together = velocity(x, t, log_p, codebook)
    for i in range(4):
        alone = velocity(x[i : i + 1], float(t[i]), log_p[i : i + 1], codebook)
        torch.testing.assert_close(together[i : i + 1], alone)


def test_score_is_the_gradient_of_the_log_density():
    x, log_p, codebook = problem(10, 20, 3)
    t = 0.6
    x.requires_grad_()
    log_density = (log_p - (x[:, None] - t * codebook).square().sum(-1) / (2 * (1 - t) ** 2)).logsumexp(-1)
    (gradient,) = torch.autograd.grad(log_density.sum(), x)
    torch.testing.assert_close(score(x.detach(), t, log_p, codebook), gradient)


@pytest.mark.parametrize(("solver", "evaluations", "agreement"), [("multistep", 64, 0.985), ("heun", 128, 0.975)])
def test_one_dimensional_map_is_the_quantile_map(solver, evaluations, agreement):
    """In one dimension the flow is monotone, so it must be F_p^{-1}(Phi(eps)): an exact oracle."""
    codebook = torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None]
    noise, log_p, _ = problem(20_000, 8, 1)
    ids = flow_map(noise, log_p, codebook, evaluations=evaluations, solver=solver)
    u = torch.from_numpy(stats.norm.cdf(noise.numpy()))
    expected = (log_p.exp().cumsum(-1) < u).sum(-1)
    assert (ids == expected).double().mean() > agreement


@pytest.mark.parametrize(("v", "c", "unit"), [(64, 8, True), (256, 8, True), (128, 32, False)])
@pytest.mark.parametrize("sharpness", [0.5, 4.0])
def test_default_solver_agrees_with_a_far_finer_solve(v, c, unit, sharpness, monkeypatch):
    noise, log_p, codebook = problem(2000, v, c, unit=unit, sharpness=sharpness)
    default = flow_map(noise.float(), log_p.float(), codebook.float())
    monkeypatch.setattr(solvers, "LOG_SNR_RANGE", (-6.0, 6.0))
    fine = flow_map(noise, log_p, codebook, evaluations=600)
    assert (default == fine).double().mean() > 0.985


def test_frequencies_follow_p():
    """Chi-square at significance 0.1 %, over 60,000 draws of one distribution; the seed is fixed."""
    noise, log_p, codebook = problem(60_000, 16, 4, sharpness=1.5)
    ids = flow_map(noise, log_p[:1].expand(60_000, -1), codebook, evaluations=48)
    counts = np.bincount(ids.numpy(), minlength=16)
    assert stats.chisquare(counts, 60_000 * log_p[0].exp().numpy()).pvalue > 1e-3


def test_a_code_of_probability_zero_is_never_produced():
    noise, log_p, codebook = problem(5000, 32, 4)
    dropped = torch.rand(5000, 32, generator=torch.Generator().manual_seed(1)) < 0.5
    dropped[:, 0] = False
    log_p = log_p.masked_fill(dropped, -torch.inf).log_softmax(-1)
    ids = flow_map(noise.float(), log_p.float(), codebook.float())
    assert not dropped[torch.arange(5000), ids].any()


def test_one_hot_distributions_are_certain():
    noise, _, codebook = problem(500, 32, 4)
    wanted = torch.arange(500) % 32
    log_p = torch.full((500, 32), -torch.inf).scatter(1, wanted[:, None], 0.0)
    assert torch.equal(flow_map(noise.float(), log_p, codebook.float()), wanted)


def test_chunks_do_not_change_the_answer(monkeypatch):
    noise, log_p, codebook = problem(300, 32, 4)
    whole = flow_map(noise, log_p, codebook)
    monkeypatch.setattr(solvers, "CHUNK_ELEMENTS", 32 * 7)
    assert torch.equal(flow_map(noise, log_p, codebook), whole)


def test_too_few_evaluations_are_refused():
    noise, log_p, codebook = problem(3, 32, 4)
    with pytest.raises(ValueError, match="at least 2 evaluations"):
        flow_map(noise, log_p, codebook, evaluations=1)
