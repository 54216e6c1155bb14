"""DD2's AR-diffusion model: tuning the teacher's backbone and a conditional head on exact scores (arXiv 2510.21003)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddops.config.dd2 import TimesConfig, TrainedARDiffusionConfig
from ddops.config.models import SamplingConfig
from ddops.losses.dd2 import denoising_error, diffuse
from ddops.models.ar_diffusion import ARDiffusion, codebook_mean
from ddops.models.interface import BackboneTeacher
from ddops.sampling.teacher import conditional_log_probs
from ddops.training.loop import Objective
from ddops.trajectories.dataset import TrajectoryDataset


def ar_diffusion_objective(
    teacher: BackboneTeacher, dataset: TrajectoryDataset, config: TrainedARDiffusionConfig, sampling: SamplingConfig
) -> Objective:
    """The ground-truth-score loss: at every position of a sequence that the teacher sampled, and at several noisy
    versions of its token, the model's posterior mean against the teacher's, which is known in closed form.

    The value ``excess`` is that error whatever the target is, so that both targets can be compared.
    """
    codebook_VC = teacher.codebook_VC.detach()

    def objective(model: nn.Module, indices_B: Tensor, step: int) -> Mapping[str, Tensor]:
        student = cast(ARDiffusion, model)
        labels_B, ids_BL = (part.to(codebook_VC.device) for part in dataset.sequences(indices_B))
        q_BLC = F.embedding(ids_BL, codebook_VC)
        log_p_BLV = conditional_log_probs(teacher, labels_B, ids_BL, sampling)
        hidden_BLD = student.hidden(labels_B, ids_BL)
        losses, excesses = [], []
        for _ in range(config.draws):
            t_BL = draw_times(q_BLC, config.times)
            x_BLC = diffuse(q_BLC, torch.randn_like(q_BLC), t_BL)
            exact_BLC = codebook_mean(x_BLC, t_BL, log_p_BLV, codebook_VC)
            mean_BLC = student.mean(x_BLC, t_BL, hidden_BLD)
            target_BLC = exact_BLC if config.target == "ground_truth_score" else q_BLC
            losses.append(denoising_error(mean_BLC, target_BLC, t_BL, config.weighting).mean())
            excesses.append(denoising_error(mean_BLC.detach(), exact_BLC, t_BL, "mean").mean())
        return {"loss": torch.stack(losses).mean(), "excess": torch.stack(excesses).mean()}

    return objective


def draw_times(q_BLC: Tensor, config: TimesConfig) -> Tensor:
    """A time for each token, (B, L), uniform."""
    return torch.empty_like(q_BLC[..., 0]).uniform_(config.min, config.max)
