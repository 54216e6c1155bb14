"""Distilled Decoding 2: conditional score distillation of a one-step generator (arXiv 2510.21003).

The generator turns noise into a whole sequence in one pass. At every position, the teacher's conditional score given
the generated earlier tokens is known in closed form; the guidance network learns the score of what the generator makes
there. Their difference says where to move each token. Where it vanishes at every position, the generated sequences
are distributed as the teacher's, one token a level; of several, each one's conditional is the teacher's, and neither
network sees how they depend on each other. The conditions carry no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddops.config.dd2 import TrainedDD2Config
from ddops.config.models import SamplingConfig
from ddops.distill.ar_diffusion import draw_times
from ddops.flow.codebook import posterior_logits
from ddops.losses.dd1 import cross_entropy
from ddops.losses.dd2 import (
    csd_direction,
    csd_loss,
    denoising_error,
    diffuse,
    divergence_weight,
    gradient_scale,
    straight_through_codes,
)
from ddops.models.ar_diffusion import ARDiffusion, codebook_mean
from ddops.models.interface import Student, Teacher
from ddops.models.precision import full_precision
from ddops.models.quantization import nearest_code
from ddops.sampling.few_step import renoise
from ddops.sampling.teacher import conditional_log_probs
from ddops.training.errors import Collapsed
from ddops.trajectories.reader import BatchSource

CURVE_LEVELS = 8
"""Levels, spread evenly, that have curves of their own: of the score gap, and of the gradient."""
LEAST_LOG_PROB = -20.0
"""Stands for minus infinity in a curve."""


class Generated(NamedTuple):
    """A batch of the generator's."""

    labels_B: Tensor
    q_BLC: Tensor
    """With the gradient."""
    ids_BL: Tensor
    """The codes that teacher and guidance network are shown as conditions: the nearest ones."""


class Direction(NamedTuple):
    """Where a batch is to be moved."""

    direction_BLC: Tensor
    scale_B: Tensor
    """What to multiply it by."""
    gap_L: Tensor
    """Mean squared difference of the two posterior means at each position."""
    kl: Tensor | None
    """Nats a token by which the generator's conditionals, as the guidance network knows them, differ from the
    teacher's: with one token a level, the divergence of the joint distributions over L. None for a network that models
    no codes."""


class DD2Objectives:
    """The losses of generator and guidance network; see :class:`ddops.training.alternating.Objectives`."""

    def __init__(
        self,
        teacher: Teacher,
        batches: BatchSource,
        config: TrainedDD2Config,
        sampling: SamplingConfig,
        start_positions: tuple[int, ...],
    ) -> None:
        """``start_positions`` are DD1's: those that the anchor, DD1's cross-entropy, trains for."""
        self.teacher = teacher
        self.batches = batches
        self.config = config
        self.sampling = sampling
        self.codebook_VC = teacher.codebook_VC.detach()
        self.device = self.codebook_VC.device
        self.starts = torch.tensor(start_positions).to(self.device)

    def guidance(self, generator: nn.Module, guidance: nn.Module, count: int) -> Mapping[str, Tensor]:
        """Learn the conditionals of fresh samples: by cross-entropy where the network models codes, else by denoising
        (flow matching: the target is the generated token itself)."""
        config, guidance = self.config.guidance, cast(ARDiffusion, guidance)
        with torch.no_grad():
            labels_B, q_BLC, ids_BL = self.generate(cast(Student, generator), count)
        hidden_BLD = guidance.hidden(labels_B, ids_BL)
        if guidance.head is None:
            return {"loss": F.nll_loss(guidance.log_probs(hidden_BLD).flatten(0, 1), ids_BL.flatten())}
        errors = []
        for _ in range(config.draws):
            t_BL = draw_times(q_BLC, self.config.times)
            x_BLC = diffuse(q_BLC, torch.randn_like(q_BLC), t_BL)
            errors.append(denoising_error(guidance.mean(x_BLC, t_BL, hidden_BLD), q_BLC, t_BL, "mean").mean())
        return {"loss": torch.stack(errors).mean()}

    def generator(
        self, generator: nn.Module, guidance: nn.Module, indices_B: Tensor, step: int
    ) -> Mapping[str, Tensor]:
        """Conditional score distillation, and the anchor on the trajectories where the preset asks for it."""
        student = cast(Student, generator)
        batch = self.generate(student, len(indices_B))
        move = self.direction(batch, cast(ARDiffusion, guidance))
        distillation = csd_loss(batch.q_BLC, move.direction_BLC, move.scale_B).mean()
        norms_L = (move.direction_BLC * move.scale_B[:, None, None]).norm(dim=-1).mean(0)
        values = {
            "csd": distillation,
            "score_gap": move.gap_L.mean(),
            **self._level_curves("score_gap", move.gap_L),
            **self._level_curves("csd_gradient", norms_L),
        }
        if move.kl is not None:
            values["kl"] = move.kl
        if not self.config.anchor_weight:
            return {"loss": distillation, **values}
        anchor = self.anchor(student, indices_B, step)
        return {"loss": distillation + self.config.anchor_weight * anchor, "anchor": anchor, **values}

    def generate(self, generator: Student, count: int) -> Generated:
        """Fresh noise, uniformly drawn classes, one pass."""
        labels_B = torch.randint(generator.num_conditions, (count,), device=self.device)
        noise_BLC = torch.randn(count, generator.layout.length, self.codebook_VC.shape[1], device=self.device)
        output = generator(noise_BLC, labels_B, torch.zeros_like(labels_B))
        if self.config.output == "codes":
            # The nearest code to a code is itself: nothing is searched.
            ids_BL = output.logits_BLV.argmax(-1)
            return Generated(labels_B, straight_through_codes(output.logits_BLV, ids_BL, self.codebook_VC), ids_BL)
        q_BLC = output.embeddings_BLC
        return Generated(labels_B, q_BLC, nearest_code(q_BLC.detach(), self.codebook_VC))

    @torch.no_grad()
    def direction(self, batch: Generated, guidance: ARDiffusion) -> Direction:
        """The difference of the two scores at every position, given the generated earlier tokens."""
        labels_B, q_BLC, ids_BL = batch
        log_p_BLV = conditional_log_probs(self.teacher, labels_B, ids_BL, self.sampling)
        hidden_BLD = guidance.hidden(labels_B, ids_BL)
        log_q_BLV = None if guidance.head is not None else guidance.log_probs(hidden_BLD)
        directions, teacher_means, gaps = [], [], []
        for _ in range(self.config.draws):
            t_BL = draw_times(q_BLC, self.config.times)
            x_BLC = diffuse(q_BLC, torch.randn_like(q_BLC), t_BL)
            teacher_mean_BLC = codebook_mean(x_BLC, t_BL, log_p_BLV, self.codebook_VC)
            if log_q_BLV is None:
                guidance_mean_BLC = guidance.mean(x_BLC, t_BL, hidden_BLD)
            else:
                guidance_mean_BLC = codebook_mean(x_BLC, t_BL, log_q_BLV, self.codebook_VC)
            direction_BLC = csd_direction(teacher_mean_BLC, guidance_mean_BLC, t_BL, self.config.weighting)
            if log_q_BLV is not None and self.config.divergence != "reverse":
                log_ratio_BL = log_density_ratio(x_BLC, t_BL, log_p_BLV, log_q_BLV, self.codebook_VC)
                direction_BLC = direction_BLC * divergence_weight(log_ratio_BL, self.config.divergence)[..., None]
            directions.append(direction_BLC)
            teacher_means.append(teacher_mean_BLC)
            gaps.append((teacher_mean_BLC - guidance_mean_BLC).square().sum(-1).mean(0))
        direction_BLC = torch.stack(directions).mean(0)
        scale_B = gradient_scale(direction_BLC, q_BLC, torch.stack(teacher_means).mean(0), self.config.normalization)
        kl = None if log_q_BLV is None else token_divergence(log_q_BLV, log_p_BLV)
        return Direction(direction_BLC, scale_B, torch.stack(gaps).mean(0), kl)

    def anchor(self, generator: Student, indices_B: Tensor, step: int) -> Tensor:
        """DD1's cross-entropy on the trajectories, from all of its start positions: scalar *(ours)*."""
        labels_B, noise_BLC, ids_BL = self.batches.batch(indices_B, step).to(self.device)
        start_B = self.starts[torch.randint(len(self.starts), (len(indices_B),), device=self.device)]
        x_BLC = renoise(F.embedding(ids_BL, self.codebook_VC), noise_BLC, start_B, generator.layout)
        logits_BLV = generator(x_BLC, labels_B, start_B).logits_BLV
        return cross_entropy(logits_BLV, ids_BL, ~generator.layout.given_mask(start_B)).mean()

    def _level_curves(self, name: str, values_L: Tensor) -> dict[str, Tensor]:
        """A mean a level. (The gradient of the distillation loss in a token is what moves it, over minus L.)"""
        layout = self.teacher.layout
        count = min(CURVE_LEVELS, layout.num_levels)
        levels = {round(index * (layout.num_levels - 1) / max(1, count - 1)) for index in range(count)}
        return {f"{name}_level{level}": values_L[layout.positions(level)].mean() for level in sorted(levels)}


@full_precision
def log_density_ratio(x_BLC: Tensor, t_BL: Tensor, log_p_BLV: Tensor, log_q_BLV: Tensor, codebook_VC: Tensor) -> Tensor:
    """``log p_t(x_t) / q_t(x_t)`` of two distributions over the codebook, (B, L); at t = 0 zero, as all is noise."""
    x_NC, t_N = x_BLC.flatten(0, 1), t_BL.flatten()
    log_p_N, log_q_N = (
        posterior_logits(x_NC, t_N, log_BLV.flatten(0, 1), codebook_VC).logsumexp(-1)
        for log_BLV in (log_p_BLV, log_q_BLV)
    )
    return (log_p_N - log_q_N).view(t_BL.shape)


def token_divergence(log_q_BLV: Tensor, log_p_BLV: Tensor) -> Tensor:
    """Mean over tokens of KL(q || p), scalar, in nats. A code that p rules out counts with ``LEAST_LOG_PROB``."""
    return (log_q_BLV.exp() * (log_q_BLV - log_p_BLV.clamp_min(LEAST_LOG_PROB))).sum(-1).mean()


def within_class_spread(q_NLC: Tensor, labels_N: Tensor) -> float:
    """Mean squared distance of a sequence to the mean of its class: how much varies besides the class."""
    squares = q_NLC.new_zeros(())
    for label in labels_N.unique():
        q_MLC = q_NLC[labels_N == label]
        squares = squares + (q_MLC - q_MLC.mean(0)).square().sum()
    return float(squares / len(q_NLC))


def check_diversity(
    values: Mapping[str, float], earlier: Sequence[Mapping[str, float]], config: TrainedDD2Config
) -> None:
    """``values`` may hold ``diversity``, the samples' spread as a share of the trajectories', and ``recall`` of the
    real images. A bound counts from when it has been met once, in ``earlier``: a generator that starts from noise in
    place of clean tokens starts below it.

    Raises:
        Collapsed: either is below what ``config`` asks for, and was not always.
    """

    def fell(name: str, least: float) -> bool:
        return values.get(name, least) < least and any(row.get(name, -1.0) >= least for row in earlier)

    found = []
    if fell("diversity", config.min_diversity):
        found.append(
            f"samples of a class spread {values['diversity']:.0%} as far as the teacher's "
            f"(dd2.min_diversity: {config.min_diversity:.0%})"
        )
    if fell("recall", config.min_recall):
        recall, least = values["recall"], config.min_recall
        found.append(f"their recall of the real images is {recall:.0%} (dd2.min_recall: {least:.0%})")
    if found:
        raise Collapsed(
            f"dd2: the generator is collapsing: {', and '.join(found)}. Lower dd2.training.learning_rate, or raise "
            "dd2.guidance.updates or dd2.anchor_weight"
        )
