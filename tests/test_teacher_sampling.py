"""Drawing tokens: the level loop, inversion of the distribution function, and the independent-marginals baseline."""

import numpy as np
import pytest
import torch
from scipy import stats

from ddops.sampling.teacher import invert_cdf, sample_marginals, token_marginals


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


def test_marginals_are_counted_a_class_and_a_position():
    ids = torch.tensor([[0, 1], [0, 2], [3, 3]])
    marginals = token_marginals(ids, torch.tensor([0, 0, 1]), num_classes=2, codebook_size=4)
    expected = torch.tensor([[[1, 0, 0, 0], [0, 0.5, 0.5, 0]], [[0, 0, 0, 1], [0, 0, 0, 1]]], dtype=torch.float64)
    assert torch.equal(marginals, expected)


def test_marginal_samples_are_independent_across_positions():
    """Perfectly correlated tokens come out uncorrelated: that is the baseline's defect, and its point."""
    ids = torch.randint(2, (4000, 1), generator=torch.Generator().manual_seed(0)).expand(-1, 2)
    marginals = token_marginals(ids, torch.zeros(4000, dtype=torch.long), num_classes=1, codebook_size=2)
    u = torch.rand(4000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = sample_marginals(marginals, torch.zeros(4000, dtype=torch.long), u)
    table = np.histogram2d(drawn[:, 0], drawn[:, 1], bins=2)[0]
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_a_class_without_trajectories_is_named():
    with pytest.raises(ValueError, match="class 1"):
        token_marginals(torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, dtype=torch.long), 2, 4)
