"""The flow solved with steps chosen for each token, which stops once the token's code is decided *(ours)*.

Variables: ``z = x / (1 - t)`` and ``r = t / (1 - t)`` turn the flow ``dx/dt = v(x, t)`` into

    dz/dr = m(z, r),   z(0) = eps,   w_j(z, r) ~ p_j exp(r z.c_j - r^2 |c_j|^2 / 2)

which is regular at the start, where m is the mean of p. A step predicts z by the two-step Adams-Bashforth formula,
evaluates m there once, and corrects z by the three-point Adams-Moulton formula with that same m. The correction is
the estimate of the error that sets the next step.

Shape suffixes: N tokens, V codes, C embedding width; A the tokens still under way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import Final, NamedTuple, Self

import torch
from torch import Tensor

FIRST_STEP: Final = 2.5
"""The first step in r, times the cube root of the tolerance over the codes' spread: no error is known before it."""
GROWTH: Final = (0.3, 3.0)
"""How much shorter or longer the next step may be than the last."""
LARGEST_RATIO: Final = 3.0
"""A step at most so far multiplies r (where r exceeds the first step)."""
SAFETY: Final = 0.9
MARGIN: Final = 5.0
"""A code is decided when the log-odds of all others together stay below minus this from here on."""

Moments = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]
"""See :func:`posterior_moments`."""


class Solution(NamedTuple):
    """Where the flow takes each token, and what that cost."""

    ids_N: Tensor
    evaluations_N: Tensor
    """Posterior means computed, int64. A test of whether the code is decided costs about as much and counts as one."""


def solve_adaptive(
    z_NC: Tensor,
    log_p_NV: Tensor,
    codebook_VC: Tensor,
    *,
    tolerance: float,
    evaluations: int,
    from_r: float = 0.0,
    compiled: bool = False,
) -> Solution:
    """Follow each token until its code is decided, or ``evaluations`` are spent.

    ``z_NC`` is where the tokens are at ``from_r``: the noise itself, unless another solver has brought them on.
    Codes that lie closer together than single precision can tell are told apart in double precision.

    ``tolerance`` is what a step's estimated error is steered to: the root-mean-square of z's correction (the noise's
    is 1) times the posterior's spread over the codebook's, so that an error counts while it can still change the code.
    With ``compiled`` the posterior goes through :func:`torch.compile`, which joins the passes over its (A, V) weights.
    """
    moments = _compiled_moments() if compiled else posterior_moments
    found, blurred_N = _solve(z_NC, from_r, log_p_NV, codebook_VC, tolerance, evaluations, moments)
    index = blurred_N.nonzero()[:, 0]
    if len(index) and z_NC.dtype == torch.float32:
        doubled = z_NC[index].double(), from_r, log_p_NV[index].double(), codebook_VC.double()
        sharp, _ = _solve(*doubled, tolerance, evaluations, moments)
        found.ids_N[index] = sharp.ids_N
        found.evaluations_N[index] += sharp.evaluations_N
    return found


def posterior_moments(
    z_AC: Tensor, r_A1: Tensor, log_p_AV: Tensor, in_KV: Tensor, out_VK: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The posterior's mean (A, C), spread (A, 1), likeliest code (A,) and that code's weight (A,); the codebook as
    :class:`_Problem` has it."""
    logits_AV = torch.addmm(log_p_AV, torch.cat([r_A1 * z_AC, r_A1.square()], 1), in_KV)
    weights_AV = logits_AV.softmax(-1)
    weight_A, leader_A = weights_AV.max(-1)
    moments_AK = weights_AV @ out_VK
    mean_AC = moments_AK[:, :-1]
    variance_A1 = 2 * moments_AK[:, -1:] - mean_AC.square().sum(-1, keepdim=True)
    return mean_AC, variance_A1.clamp_min(0).sqrt(), leader_A, weight_A


@cache
def _compiled_moments() -> Moments:
    """Once for all numbers of tokens, of which a solve has many."""
    return torch.compile(posterior_moments, dynamic=True)


def _solve(
    z_NC: Tensor,
    from_r: float,
    log_p_NV: Tensor,
    codebook_VC: Tensor,
    tolerance: float,
    evaluations: int,
    moments: Moments,
) -> tuple[Solution, Tensor]:
    """The solution in the given precision, and a mask (N,) of the tokens that this precision cannot decide."""
    problem = _Problem.of(codebook_VC, moments)
    ids_N = torch.zeros(len(z_NC), dtype=torch.long, device=z_NC.device)
    found, blurred_N = Solution(ids_N, torch.ones_like(ids_N)), torch.zeros_like(ids_N, dtype=torch.bool)
    tokens, leader_A, weight_A = _start(problem, z_NC, from_r, log_p_NV, tolerance)
    first = True
    while True:
        decided_A, tested_A, twins_A = problem.decided(tokens, leader_A, weight_A)
        found.evaluations_N[tokens.row_A] += tested_A
        at_the_end_A = tokens.r_A1[:, 0] >= problem.last_r
        over_A = decided_A | at_the_end_A | (found.evaluations_N[tokens.row_A] >= evaluations)
        if over_A.any():
            found.ids_N[tokens.row_A[over_A]] = leader_A[over_A]
            blurred_N[tokens.row_A] = (decided_A & twins_A) | (at_the_end_A & ~decided_A)
            tokens = tokens.keep(~over_A)
            if not len(tokens.row_A):
                return found, blurred_N
        tokens, leader_A, weight_A = _step(problem, tokens, tolerance, first)
        found.evaluations_N[tokens.row_A] += 1
        first = False


@dataclass(frozen=True)
class _Tokens:
    """The tokens under way: where they are, the last two posterior means, and the step they are about to take."""

    row_A: Tensor
    log_p_AV: Tensor
    z_AC: Tensor
    r_A1: Tensor
    mean_AC: Tensor
    earlier_r_A1: Tensor
    earlier_mean_AC: Tensor
    step_A1: Tensor

    def keep(self, mask_A: Tensor) -> Self:
        """Those of the mask."""
        index = mask_A.nonzero()[:, 0]
        return type(self)(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


def _start(
    problem: _Problem, z_NC: Tensor, from_r: float, log_p_NV: Tensor, tolerance: float
) -> tuple[_Tokens, Tensor, Tensor]:
    """All tokens at the first r (at 0 the posterior is p); each token's likeliest code and its weight."""
    z_NC = z_NC - from_r * problem.centre_C
    r_A1 = torch.full_like(z_NC[:, :1], from_r)
    mean_AC, _, leader_A, weight_A = problem.evaluate(z_NC, r_A1, log_p_NV)
    tokens = _Tokens(
        row_A=torch.arange(len(z_NC), device=z_NC.device),
        log_p_AV=log_p_NV,
        z_AC=z_NC,
        r_A1=r_A1,
        mean_AC=mean_AC,
        earlier_r_A1=r_A1,
        earlier_mean_AC=mean_AC,
        step_A1=torch.full_like(r_A1, problem.first_step(tolerance)),
    )
    return tokens, leader_A, weight_A


def _step(problem: _Problem, tokens: _Tokens, tolerance: float, first: bool) -> tuple[_Tokens, Tensor, Tensor]:
    """One step of every token, with one evaluation; also each token's likeliest code and its weight."""
    h_A1, r_A1 = tokens.step_A1, tokens.r_A1 + tokens.step_A1
    slope_AC = torch.zeros_like(tokens.mean_AC)
    if not first:
        slope_AC = (tokens.mean_AC - tokens.earlier_mean_AC) / (tokens.r_A1 - tokens.earlier_r_A1)
    predicted_AC = tokens.z_AC + h_A1 * tokens.mean_AC + 0.5 * h_A1.square() * slope_AC
    mean_AC, spread_A1, leader_A, weight_A = problem.evaluate(predicted_AC, r_A1, tokens.log_p_AV)

    # The integral of the parabola (at first the line) through the means, Newton's form.
    new_slope_AC = (mean_AC - tokens.mean_AC) / h_A1
    correction_AC = 0.5 * h_A1.square() * (new_slope_AC - slope_AC)
    if not first:
        curvature_AC = (new_slope_AC - slope_AC) / (r_A1 - tokens.earlier_r_A1)
        correction_AC = correction_AC - h_A1**3 / 6 * curvature_AC

    error_A1 = correction_AC.square().mean(-1, keepdim=True).sqrt() * (spread_A1 / problem.spread)
    tiny = torch.finfo(error_A1.dtype).tiny
    factor_A1 = (SAFETY * (tolerance / error_A1.clamp_min(tiny)) ** (1 / 3)).clamp(*GROWTH)
    next_h_A1 = h_A1 if first else h_A1 * factor_A1
    longest_A1 = ((LARGEST_RATIO - 1) * r_A1).clamp_min(problem.first_step(tolerance))
    advanced = _Tokens(
        row_A=tokens.row_A,
        log_p_AV=tokens.log_p_AV,
        z_AC=predicted_AC + correction_AC,
        r_A1=r_A1,
        mean_AC=mean_AC,
        earlier_r_A1=tokens.r_A1,
        earlier_mean_AC=tokens.mean_AC,
        step_A1=torch.minimum(next_h_A1, longest_A1),
    )
    return advanced, leader_A, weight_A


@dataclass(frozen=True)
class _Problem:
    """The codebook, centred (the flow does not mind, rounding does), and what is computed from it once."""

    centre_C: Tensor
    """The mean of the codes; z moves with it, by r times as much."""
    codes_VC: Tensor
    half_norms_V: Tensor
    in_KV: Tensor
    """(C + 1, V): the codes and minus half their squared norms, for the posterior in one product."""
    out_VK: Tensor
    """(V, C + 1): the codes and half their squared norms, for the posterior's mean and spread in one product."""
    spread: float
    """Root-mean-square distance of the codes from their mean."""
    last_r: float
    """Where the arithmetic can tell codes apart no further."""
    same_code: float
    """Squared distance below which the arithmetic takes two codes for one."""
    moments: Moments
    """:func:`posterior_moments`, compiled or not."""

    @classmethod
    def of(cls, codebook_VC: Tensor, moments: Moments) -> Self:
        centre_C = codebook_VC.mean(0)
        codes_VC = codebook_VC - centre_C
        half_norms_V = 0.5 * codes_VC.square().sum(-1)
        spread = math.sqrt(2 * float(half_norms_V.mean())) or 1.0
        rounding = torch.finfo(codes_VC.dtype).eps
        return cls(
            centre_C=centre_C,
            codes_VC=codes_VC,
            half_norms_V=half_norms_V,
            in_KV=torch.cat([codes_VC, -half_norms_V[:, None]], 1).T.contiguous(),
            out_VK=torch.cat([codes_VC, half_norms_V[:, None]], 1),
            spread=spread,
            last_r=0.1 / math.sqrt(rounding) / spread,
            same_code=100 * rounding * spread**2,
            moments=moments,
        )

    def first_step(self, tolerance: float) -> float:
        """Length in r."""
        return FIRST_STEP * tolerance ** (1 / 3) / self.spread  # type: ignore[no-any-return]

    def evaluate(self, z_AC: Tensor, r_A1: Tensor, log_p_AV: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :func:`posterior_moments`."""
        return self.moments(z_AC, r_A1, log_p_AV, self.in_KV, self.out_VK)

    def decided(self, tokens: _Tokens, leader_A: Tensor, weight_A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Masks (A,): tokens whose code can change no more, tokens that were put to the test, and tokens whose
        likeliest code has a twin, another possible code in the same place as far as the arithmetic can tell.

        With nearly all weight on code j, ``u = z - r c_j`` stays as it is, and the log-odds of j against k at any
        later r are ``log(p_j / p_k) + r u.(c_j - c_k) + r^2 |c_j - c_k|^2 / 2``: a parabola, whose minimum is known.
        """
        tested_A = weight_A > 1 - math.exp(-MARGIN)
        decided_A, twins_A = torch.zeros_like(tested_A), torch.zeros_like(tested_A)
        index = tested_A.nonzero()[:, 0]
        if not len(index):
            return decided_A, tested_A, twins_A
        leader, r_T1, log_p_TV = leader_A[index], tokens.r_A1[index], tokens.log_p_AV[index]
        code_TC = self.codes_VC[leader]
        u_TC = tokens.z_AC[index] - r_T1 * code_TC
        u_inner_TV, code_inner_TV = (torch.cat([u_TC, code_TC]) @ self.codes_VC.T).chunk(2)
        gap_TV = 2 * (self.half_norms_V + self.half_norms_V[leader][:, None] - code_inner_TV)
        slope_TV = (u_TC * code_TC).sum(-1, keepdim=True) - u_inner_TV
        same_TV = gap_TV <= self.same_code
        lowest_TV = torch.maximum(-slope_TV / gap_TV.masked_fill(same_TV, 1.0), r_T1)
        odds_TV = log_p_TV.gather(1, leader[:, None]) - log_p_TV + lowest_TV * (slope_TV + 0.5 * lowest_TV * gap_TV)
        against_T = torch.logsumexp((-odds_TV).masked_fill(same_TV, -math.inf), -1)
        decided_A[index] = against_T < -MARGIN
        twins_A[index] = (same_TV & log_p_TV.isfinite()).sum(-1) > 1
        return decided_A, tested_A, twins_A
