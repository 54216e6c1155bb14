"""Drawing tokens: the level loop, inversion of the distribution function, and the independent-marginals baseline."""

import numpy as np
import pytest
import torch
from scipy import stats

from ddops.sampling.independent import TokenPools
from ddops.sampling.teacher import invert_cdf


def test_inversion_draws_in_proportion_and_never_a_zero_code():
    p = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])
    u = (torch.arange(30_000, dtype=torch.float64) + 0.5) / 30_000
    ids = invert_cdf(p.expand(1, 30_000, 6), u[None])[0]
    counts = np.bincount(ids.numpy(), minlength=6)
    np.testing.assert_allclose(counts / 30_000, p.numpy(), atol=1e-4)
    assert counts[[0, 2, 5]].sum() == 0


@pytest.mark.parametrize("u", [2.0**-33, 1 - 2.0**-33])
def test_inversion_at_the_ends_stays_on_the_support(u):
    p = torch.tensor([[[0.0, 1e-6, 1 - 2e-6, 1e-6, 0.0]]])
    assert p[0, 0, invert_cdf(p, torch.tensor([[u]], dtype=torch.float64))[0, 0]] > 0


def test_independent_tokens_have_their_class_s_marginals():
    """Of every position; worked out by counting what the pools were made of."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (300,), generator=generator)
    ids = torch.randint(5, (300, 4), generator=generator).square() % 7
    pools = TokenPools.of(ids, labels, 3)
    u = ((torch.arange(90_000, dtype=torch.float64) + 0.5) / 90_000)[:, None].expand(-1, 4)
    for label in range(3):
        drawn = pools.draw(torch.full((90_000,), label), u)
        for position in range(4):
            seen = np.bincount(ids[labels == label, position], minlength=7) / int((labels == label).sum())
            np.testing.assert_allclose(np.bincount(drawn[:, position], minlength=7) / 90_000, seen, atol=1e-4)


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-53])
def test_independent_tokens_stay_in_their_class_at_the_ends(u):
    pools = TokenPools.of(torch.tensor([[7], [8], [9]]), torch.tensor([1, 0, 1]), 2)
    drawn = pools.draw(torch.tensor([0, 1]), torch.full((2, 1), u, dtype=torch.float64))
    assert drawn[:, 0].tolist() == [8, 7 if u == 0 else 9]


def test_independent_tokens_do_not_know_of_one_another():
    """Perfectly correlated tokens come out uncorrelated: that is the baseline's defect, and its point."""
    ids = torch.randint(2, (4000, 1), generator=torch.Generator().manual_seed(0)).expand(-1, 2)
    pools = TokenPools.of(ids, torch.zeros(4000, dtype=torch.long), 1)
    u = torch.rand(4000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = pools.draw(torch.zeros(4000, dtype=torch.long), u)
    table = np.histogram2d(drawn[:, 0], drawn[:, 1], bins=2)[0]
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_a_class_without_trajectories_is_named():
    with pytest.raises(ValueError, match="class 1"):
        TokenPools.of(torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, dtype=torch.long), 2)
