"""Guidance, temperature, top-k and top-p against a brute-force reading of their definitions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ddops.config.models import SamplingConfig
from ddops.models.sampling_filters import guided_log_probs

NEG_INF = float("-inf")


def sampling(top_k: int = 0, top_p: float = 1.0, temperature: float = 1.0) -> SamplingConfig:
    return SamplingConfig(guidance=2.0, top_k=top_k, top_p=top_p, temperature=temperature)


def brute_force(logits: list[float], settings: SamplingConfig) -> list[float]:
    """The definition in plain floats: one row, no tensors."""
    logits = [value / settings.temperature for value in logits]
    if settings.top_k:
        threshold = sorted(logits, reverse=True)[min(settings.top_k, len(logits)) - 1]
        logits = [value if value >= threshold else NEG_INF for value in logits]
    weights = [math.exp(value - max(logits)) for value in logits]
    probs = [weight / sum(weights) for weight in weights]
    if settings.top_p < 1:
        kept, total = set(), 0.0
        for code in sorted(range(len(probs)), key=lambda code: -probs[code]):
            kept.add(code)
            total += probs[code]
            if total >= settings.top_p:
                break
        probs = [prob if code in kept else 0.0 for code, prob in enumerate(probs)]
    return [prob / sum(probs) for prob in probs]


def kept(log_probs: Tensor) -> list[int]:
    return log_probs.flatten().isfinite().nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"),
    itertools.product([0, 1, 3, 11, 40], [0.05, 0.5, 0.9, 1.0], [0.5, 1.0, 1.7]),
)
def test_equals_brute_force(top_k: int, top_p: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(top_k)
    cond_BlV, uncond_BlV = torch.randn(2, 3, 2, 11, generator=generator)
    settings = sampling(top_k, top_p, temperature)
    probs_BlV = guided_log_probs(cond_BlV, uncond_BlV, 1.5, settings).exp()
    guided_BlV = -0.5 * uncond_BlV + 1.5 * cond_BlV
    expected = [[brute_force(row, settings) for row in rows] for rows in guided_BlV.tolist()]
    torch.testing.assert_close(probs_BlV, torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_without_unconditional_branch_the_scale_is_ignored() -> None:
    cond_BlV = torch.randn(2, 1, 5)
    torch.testing.assert_close(guided_log_probs(cond_BlV, None, 7.0, sampling()), cond_BlV.log_softmax(-1))


def test_scale_one_is_exactly_conditional() -> None:
    cond_BlV, uncond_BlV = torch.randn(2, 2, 1, 5)
    assert torch.equal(guided_log_probs(cond_BlV, uncond_BlV, 1.0, sampling()), cond_BlV.log_softmax(-1))


def test_top_k_keeps_ties_at_the_kth() -> None:
    logits_BlV = torch.tensor([[[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]]])
    assert kept(guided_log_probs(logits_BlV, None, 1.0, sampling(top_k=2))) == [0, 2, 3, 4]


@pytest.mark.parametrize("top_k", [0, 4, 5, 1000])
def test_top_k_of_at_least_v_keeps_everything(top_k: int) -> None:
    logits_BlV = torch.randn(3, 2, 4)
    filtered = guided_log_probs(logits_BlV, None, 1.0, sampling(top_k=top_k))
    torch.testing.assert_close(filtered, logits_BlV.log_softmax(-1))


def test_top_p_keeps_the_crossing_code_and_the_smallest_set() -> None:
    logits_BlV = torch.tensor([[[0.5, 0.3, 0.15, 0.05]]]).log()
    assert kept(guided_log_probs(logits_BlV, None, 1.0, sampling(top_p=0.6))) == [0, 1]
    assert kept(guided_log_probs(logits_BlV, None, 1.0, sampling(top_p=0.4))) == [0]
    assert kept(guided_log_probs(torch.zeros(1, 1, 8), None, 1.0, sampling(top_p=0.5))) == [0, 1, 2, 3]


def test_top_p_is_applied_to_what_top_k_left() -> None:
    """After top-2, code 0 alone has probability 0.5 / 0.8 > 0.6; without top-2 it takes two codes."""
    logits_BlV = torch.tensor([[[0.5, 0.3, 0.15, 0.05]]]).log()
    assert kept(guided_log_probs(logits_BlV, None, 1.0, sampling(top_k=2, top_p=0.6))) == [0]


def test_top_p_of_one_keeps_vanishing_probabilities() -> None:
    logits_BlV = torch.tensor([[[0.0, -60.0, -120.0]]])
    assert kept(guided_log_probs(logits_BlV, None, 1.0, sampling(top_p=1.0))) == [0, 1, 2]


@pytest.mark.parametrize("settings", [sampling(), sampling(top_k=3), sampling(top_p=0.5), sampling(3, 0.5)])
@pytest.mark.parametrize("low", [NEG_INF, -1e30])
def test_one_hot_logits(settings: SamplingConfig, low: float) -> None:
    logits_BlV = torch.full((2, 3, 6), low)
    logits_BlV[..., 4] = 0
    probs_BlV = guided_log_probs(logits_BlV, None, 1.0, settings).exp()
    assert torch.equal(probs_BlV, (logits_BlV == 0).float())


def test_codes_ruled_out_by_either_branch_are_dropped() -> None:
    cond_BlV = torch.tensor([[[1.0, NEG_INF, 0.0, NEG_INF]]])
    uncond_BlV = torch.tensor([[[0.0, 0.0, NEG_INF, NEG_INF]]])
    filtered = guided_log_probs(cond_BlV, uncond_BlV, 2.0, sampling(top_k=3, top_p=0.9))
    assert torch.equal(filtered, torch.tensor([[[0.0, NEG_INF, NEG_INF, NEG_INF]]]))


def test_half_precision_logits_are_normalised_in_float32() -> None:
    cond_BlV = torch.randn(2, 1, 9).bfloat16()
    filtered = guided_log_probs(cond_BlV, cond_BlV, 3.0, sampling(top_k=4))
    assert filtered.dtype == torch.float32
    torch.testing.assert_close(filtered.exp().sum(-1), torch.ones(2, 1))


def test_inputs_are_left_alone() -> None:
    cond_BlV, uncond_BlV = torch.randn(2, 2, 1, 7)
    before = cond_BlV.clone(), uncond_BlV.clone()
    guided_log_probs(cond_BlV, uncond_BlV, 2.0, sampling(2, 0.5, 0.7))
    assert torch.equal(cond_BlV, before[0])
    assert torch.equal(uncond_BlV, before[1])
