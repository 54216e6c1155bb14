"""A toy for the training loop: a small network, what it learns, and a run of it that may be killed."""

import torch
from safetensors.torch import save
from torch import nn

from ddops.config.training import TrainingConfig
from ddops.training.checkpoint import CheckpointFile
from ddops.training.loop import train
from helpers.tiny import contents

SETTINGS = {
    "steps": 24,
    "batch_size": 5,
    "processes": 1,
    "optimizer": "adamw",
    "learning_rate": 0.05,
    "final_learning_rate": 0.001,
    "warmup_steps": 3,
    "betas": (0.9, 0.99),
    "weight_decay": 0.1,
    "gradient_clip": 1.0,
    "ema_decay": 0.9,
    "log_every": 3,
    "checkpoint_every": 4,
}
DATASET_SIZE = 13


def training(**changes):
    return TrainingConfig(**{**SETTINGS, **changes})


def new_model():
    """With weights, biases, a buffer that changes and dropout, so that nothing which a run depends on is left out."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, 1))


def objective(model, indices_B, step):
    x = torch.linspace(-1, 1, DATASET_SIZE * 3).view(DATASET_SIZE, 3)[indices_B]
    loss = (model(x + 0.1 * torch.randn_like(x)) - x.prod(1, keepdim=True)).square().mean()
    return {"loss": loss, "size": loss.sqrt()}


class Killed(BaseException):
    """Not an Exception, so that nothing tidies up after it."""


def dying_at(step_of_death, exception=Killed):
    def mortal(model, indices_B, step):
        if step == step_of_death:
            raise exception
        return objective(model, indices_B, step)

    return mortal


def run(directory, objective=objective, *, fingerprint="this run", config=None, **options):
    """Train in a directory; the bytes of the weights and of every curve file."""
    state = train(
        new_model(),
        objective,
        config=config or training(),
        seed=7,
        dataset_size=DATASET_SIZE,
        checkpoint=CheckpointFile(directory / "state.pt", fingerprint),
        curves_dir=directory / "curves",
        description="toy",
        **options,
    )
    return save(state), contents(directory / "curves")
