"""From a teacher's raw logits to the distribution it is sampled from: guidance, temperature, top-k, top-p.

Shape suffixes: see :mod:`ddops.models.interface`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddops.config.models import SamplingConfig
from ddops.models.precision import full_precision

NEG_INF = float("-inf")


@full_precision
def guided_log_probs(cond_BlV: Tensor, uncond_BlV: Tensor | None, scale: float, sampling: SamplingConfig) -> Tensor:
    """Log-probabilities (B, l, V), float32, that a teacher samples a level from; ``-inf`` for dropped codes.

    In this order: classifier-free guidance ``uncond + scale * (cond - uncond)`` (``cond`` if ``uncond_BlV`` is None),
    temperature, top-k, top-p, normalisation. This is the order of the released VAR and LlamaGen samplers.
    """
    logits_BlV = cond_BlV.float() if uncond_BlV is None else _guide(cond_BlV.float(), uncond_BlV.float(), scale)
    if sampling.temperature != 1:
        logits_BlV = logits_BlV / sampling.temperature
    if 0 < sampling.top_k < logits_BlV.shape[-1]:
        logits_BlV = _keep_top_k(logits_BlV, sampling.top_k)
    if sampling.top_p < 1:
        logits_BlV = _keep_top_p(logits_BlV, sampling.top_p)
    return logits_BlV.log_softmax(-1)


def _guide(cond_BlV: Tensor, uncond_BlV: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return cond_BlV
    guided_BlV = uncond_BlV + scale * (cond_BlV - uncond_BlV)
    # inf - inf is NaN: a code that either branch rules out stays ruled out.
    return guided_BlV.masked_fill(cond_BlV.isneginf() | uncond_BlV.isneginf(), NEG_INF)


def _keep_top_k(logits_BlV: Tensor, k: int) -> Tensor:
    """Drop what lies below the k-th largest logit; codes tied with it stay."""
    kth_Bl1 = logits_BlV.topk(k, dim=-1).values[..., -1:]
    return logits_BlV.masked_fill(logits_BlV < kth_Bl1, NEG_INF)


def _keep_top_p(logits_BlV: Tensor, p: float) -> Tensor:
    """Keep the smallest set of likeliest codes whose probability reaches p; among equals the lower ids go first."""
    probs_BlV, order_BlV = logits_BlV.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before_BlV = probs_BlV.cumsum(-1) - probs_BlV
    # The probability before the likeliest code is 0 < p, so at least one code always stays.
    dropped_BlV = torch.empty_like(before_BlV, dtype=torch.bool).scatter_(-1, order_BlV, before_BlV >= p)
    return logits_BlV.masked_fill(dropped_BlV, NEG_INF)
