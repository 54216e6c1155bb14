"""Stage ``ar_diffusion``: tune the teacher's backbone and a conditional head into DD2's AR-diffusion model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ddops.captions.conditions import Conditions, open_conditions
from ddops.config.dd2 import ARDiffusionConfig, NotTrainedConfig, TrainedARDiffusionConfig
from ddops.config.evaluation import DigitsFeaturesConfig, FeaturesConfig
from ddops.config.models import SamplingConfig
from ddops.distill.ar_diffusion import ar_diffusion_objective
from ddops.evaluation.drawing import decode, sample_noise
from ddops.models.ar_diffusion import ARDiffusion, new_ar_diffusion
from ddops.models.interface import BackboneTeacher
from ddops.models.weights import load_teacher
from ddops.models.weights_dd2 import as_backbone, save_ar_diffusion
from ddops.sampling.ar_diffusion import sample_ar_diffusion
from ddops.stages import paths
from ddops.stages.checkpoints import checkpoint_file
from ddops.stages.common import require, run_stage, write_not_trained
from ddops.stages.fid_curve import CURVE_SEED, FIDCurve
from ddops.training.device import training_device
from ddops.training.loop import seeded, train
from ddops.trajectories.dataset import TrajectoryDataset
from ddops.trajectories.shards import MANIFEST


def ar_diffusion(
    seed: int, features: FeaturesConfig, sampling: SamplingConfig, ar_diffusion: ARDiffusionConfig
) -> None:
    """Train on the trajectories' sequences; the EMA weights are the result."""
    if isinstance(ar_diffusion, NotTrainedConfig):
        write_not_trained("ar_diffusion", [paths.AR_DIFFUSION.parent, paths.CURVES / "ar_diffusion"])
        return
    tokenizer_file, transformer_file = require(paths.TOKENIZER, "teacher"), require(paths.TRANSFORMER, "teacher")
    judge_files = [require(paths.CLASSIFIER, "features")] if isinstance(features, DigitsFeaturesConfig) else []
    trajectories = require(paths.TRAJECTORIES / MANIFEST, "trajectories")
    device = training_device(ar_diffusion.training.processes)
    teacher = as_backbone(load_teacher(tokenizer_file, transformer_file).requires_grad_(False).to(device))
    dataset = TrajectoryDataset(paths.TRAJECTORIES, teacher.codebook_VC.shape[1])
    conditions = open_conditions(paths.TRAIN_CAPTIONS, teacher)
    checkpoint = checkpoint_file(
        "ar_diffusion",
        "ar_diffusion",
        [seed, sampling, ar_diffusion],
        [tokenizer_file, transformer_file, *judge_files, trajectories, *conditions.files],
    )
    state = train(
        seeded(seed, lambda: new_ar_diffusion(teacher, ar_diffusion.head)).to(device),
        ar_diffusion_objective(teacher, dataset, ar_diffusion, sampling),
        config=ar_diffusion.training,
        seed=seed,
        dataset_size=len(dataset),
        checkpoint=checkpoint,
        curves_dir=paths.CURVES / "ar_diffusion",
        description="ar-diffusion",
        evaluate=_fid(teacher, conditions, ar_diffusion) if judge_files else None,
        evaluate_every=ar_diffusion.evaluate_every,
    )
    save_ar_diffusion(paths.AR_DIFFUSION, state, teacher.config, ar_diffusion.head)
    checkpoint.remove()


def _fid(
    teacher: BackboneTeacher, conditions: Conditions, config: TrainedARDiffusionConfig
) -> Callable[[nn.Module], Mapping[str, float]]:
    """FID of the EMA model's own multi-step samples."""
    fid = FIDCurve(config.evaluate_count, conditions)

    def curve(model: nn.Module) -> Mapping[str, float]:
        def draw(indices_B: NDArray[np.int64], labels_B: Tensor) -> Tensor:
            codebook_VC = teacher.codebook_VC
            noise_BLC = sample_noise(CURVE_SEED, indices_B, teacher, codebook_VC.shape[1]).to(codebook_VC.device)
            labels_B = labels_B.to(codebook_VC.device)
            ids_BL = sample_ar_diffusion(cast(ARDiffusion, model), labels_B, noise_BLC, config.evaluations)
            return decode(teacher, F.embedding(ids_BL, codebook_VC))

        return {"fid": fid(draw)}

    return curve


if __name__ == "__main__":
    run_stage(ar_diffusion, trains="ar_diffusion")
