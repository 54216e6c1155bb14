"""Distilled Decoding 1: training the student on trajectories (arXiv 2412.17153, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddops.config.stages import TrainedDD1Config
from ddops.losses.dd1 import cross_entropy, embedding_error
from ddops.losses.perceptual import PerceptualDistance
from ddops.models.interface import Student, Teacher
from ddops.sampling.few_step import renoise
from ddops.training.loop import Objective
from ddops.training.replicas import own_part
from ddops.trajectories.reader import BatchSource


def dd1_objective(
    teacher: Teacher, batches: BatchSource, config: TrainedDD1Config, distance: PerceptualDistance
) -> Objective:
    """One training step's loss: the student sees the first ``start`` levels as data and the rest as the trajectory's
    own noise, and predicts every later token at once, ``start`` drawn anew for each sample."""
    codebook_VC = teacher.codebook_VC.detach()
    device = codebook_VC.device
    starts = torch.tensor(config.start_positions).to(device)

    def objective(model: nn.Module, indices_B: Tensor, step: int) -> Mapping[str, Tensor]:
        student = cast(Student, model)
        labels_B, noise_BLC, ids_BL = batches.batch(indices_B, step).to(device)
        start_B = starts[torch.randint(len(starts), (len(indices_B),), device=device)]
        q_BLC = F.embedding(ids_BL, codebook_VC)
        output = student(renoise(q_BLC, noise_BLC, start_B, student.layout), labels_B, start_B)
        predicted_BL = ~student.layout.given_mask(start_B)

        ce = cross_entropy(output.logits_BLV, ids_BL, predicted_BL).mean()
        error = embedding_error(output.embeddings_BLC, q_BLC, predicted_BL).mean()
        perceptual = error.new_zeros(())
        if config.perceptual.weight:
            own = own_part(config.perceptual.batch_size)
            decoded = slice(own.stop - own.start)
            predicted_BLC = torch.where(predicted_BL[decoded, :, None], output.embeddings_BLC[decoded], q_BLC[decoded])
            perceptual = perceptual_term(teacher, distance, predicted_BLC, q_BLC[decoded]).mean()
        loss = (
            config.cross_entropy_weight * ce + config.embedding_weight * error + config.perceptual.weight * perceptual
        )
        hits_BL = (output.logits_BLV.argmax(-1) == ids_BL) & predicted_BL
        accuracy = hits_BL.sum() / predicted_BL.sum()
        return {
            "loss": loss,
            "cross_entropy": ce,
            "embedding_error": error,
            "perceptual": perceptual,
            "accuracy": accuracy,
        }

    return objective


def perceptual_term(
    teacher: Teacher, distance: PerceptualDistance, predicted_BLC: Tensor, target_BLC: Tensor
) -> Tensor:
    """Distance of the decoded prediction to the decoded target, one value a sample; gradient to the prediction only."""
    with torch.no_grad():
        target_BIHW = teacher.decode(target_BLC)
    return distance(teacher.decode(predicted_BLC), target_BIHW)
