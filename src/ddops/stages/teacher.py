"""Stage ``teacher``: train the tokenizer, then the transformer on its tokens; or fetch a published pair."""

from __future__ import annotations

import torch
from torch import Tensor

from ddops.captions.conditions import open_conditions
from ddops.config.stages import DownloadedTeacherConfig, TeacherConfig, TrainedTeacherConfig
from ddops.data import digits
from ddops.hub.acquire import acquire_teacher, write_origin
from ddops.models.interface import Tokenizer
from ddops.models.registry import build_teacher, build_tokenizer
from ddops.models.weights import TOKENIZER, TRANSFORMER, save_weights
from ddops.pretrain.teacher import reseed_schedule, teacher_objective, tokenizer_objective
from ddops.stages import paths
from ddops.stages.checkpoints import checkpoint_file
from ddops.stages.common import run_stage
from ddops.training.checkpoint import CheckpointFile
from ddops.training.device import training_device
from ddops.training.loop import seeded, train


def teacher(seed: int, teacher: TeacherConfig) -> None:
    """Train both parts; a killed run goes on from the last checkpoint of the part it was at. Or fetch both."""
    if isinstance(teacher, DownloadedTeacherConfig):
        for path in (paths.TOKENIZER, paths.TRANSFORMER):
            path.unlink(missing_ok=True)  # converted by another recipe perhaps, and fetching keeps what it finds
        files = acquire_teacher(teacher, paths.TOKENIZER, paths.TRANSFORMER)
        write_origin([paths.CURVES / "tokenizer", paths.CURVES / "teacher"], files)
        return
    data = digits.load()
    tokenizer, tokenizer_checkpoint = _trained_tokenizer(seed, teacher, data.images_NIHW)
    weights, checkpoint = _trained_transformer(seed, teacher, tokenizer, data)
    save_weights(paths.TOKENIZER, tokenizer.state_dict(), teacher.model, TOKENIZER)
    save_weights(paths.TRANSFORMER, weights, teacher.model, TRANSFORMER)
    checkpoint.remove()
    tokenizer_checkpoint.remove()


def _trained_tokenizer(
    seed: int, config: TrainedTeacherConfig, images_NIHW: Tensor
) -> tuple[Tokenizer, CheckpointFile]:
    """The tokenizer. Its finished checkpoint stays, so a run killed later passes through here at once."""
    checkpoint = checkpoint_file(
        "teacher", "tokenizer", [seed, config.model, config.tokenizer_training, config.codebook_weight]
    )
    device = training_device(config.tokenizer_training.processes)
    tokenizer = seeded(seed, lambda: build_tokenizer(config.model)).to(device)
    state = train(
        tokenizer,
        tokenizer_objective(images_NIHW, config.codebook_weight),
        config=config.tokenizer_training,
        seed=seed,
        dataset_size=len(images_NIHW),
        checkpoint=checkpoint,
        curves_dir=paths.CURVES / "tokenizer",
        description="tokenizer",
        before_step=reseed_schedule(images_NIHW, config.tokenizer_training.steps),
        stay=True,
    )
    tokenizer.load_state_dict(state)
    return tokenizer.eval().requires_grad_(False), checkpoint


def _trained_transformer(
    seed: int, config: TrainedTeacherConfig, tokenizer: Tokenizer, data: digits.LabelledImages
) -> tuple[dict[str, Tensor], CheckpointFile]:
    device = training_device(config.training.processes)
    model = seeded(seed, lambda: build_teacher(config.model)).to(device)
    model.tokenizer.load_state_dict(tokenizer.state_dict())
    model.tokenizer.requires_grad_(False)
    with torch.inference_mode():
        ids_NL = tokenizer.to(device).encode(data.images_NIHW.to(device)).clone().cpu()
    conditions = open_conditions(paths.TRAIN_CAPTIONS, model)
    labels_N = conditions.of_images(data.labels_N)
    checkpoint = checkpoint_file("teacher", "transformer", [seed, config], conditions.files)
    state = train(
        model,
        teacher_objective(ids_NL, labels_N, label_dropout=config.label_dropout, token_dropout=config.token_dropout),
        config=config.training,
        seed=seed,
        dataset_size=len(data),
        checkpoint=checkpoint,
        curves_dir=paths.CURVES / "teacher",
        description="teacher",
    )
    prefix = "transformer."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}, checkpoint


if __name__ == "__main__":
    run_stage(teacher, trains="teacher")
