"""A toy for the alternating loop: a generator, its guidance network, and a run of both."""

import torch
from safetensors.torch import save
from torch import nn

from ddops.config.dd2 import GuidanceConfig
from ddops.config.training import TrainingConfig
from ddops.training.alternating import train_alternating
from ddops.training.checkpoint import CheckpointFile
from helpers.tiny import contents

ALIGNMENT, UPDATES, STEPS = 7, 3, 12
OPTIMISATION = {"betas": (0.5, 0.9), "weight_decay": 0.1, "gradient_clip": 1.0, "optimizer": "adamw"}


def training(processes):
    return TrainingConfig(
        steps=STEPS, batch_size=6, processes=processes, learning_rate=0.05, final_learning_rate=0.0, warmup_steps=2,
        ema_decay=0.8, log_every=2, checkpoint_every=3, **OPTIMISATION,
    )  # fmt: skip


GUIDANCE = GuidanceConfig(
    start="teacher",
    alignment_steps=ALIGNMENT,
    updates=UPDATES,
    draws=1,
    batch_size=6,
    learning_rate=0.02,
    ema_decay=0.6,
    **OPTIMISATION,
)


class Killed(BaseException):
    """Not an Exception, so that nothing tidies up after it."""


class Pursuit:
    """The guidance network learns the generator's mean; the generator moves away from it towards a target."""

    def __init__(self, die_at=None):
        self.die_at, self.events = die_at, []

    def guidance(self, generator, guidance, count):
        self.events.append("g")
        with torch.no_grad():
            x = generator(torch.randn(count, 2))
        return {"loss": (guidance(x) - x).square().mean()}

    def generator(self, generator, guidance, indices_B, step):
        self.events.append("G")
        if self.die_at is not None and self.events.count("G") > self.die_at:
            raise Killed
        x = generator(torch.randn(len(indices_B), 2) + indices_B[:, None] / 10)
        return {"loss": (x - guidance(x).detach() - 1).square().mean(), "size": x.abs().mean()}


def networks():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)), nn.Linear(1, 1)


def run(directory, objectives=None, processes=1, guidance_config=GUIDANCE, **options):
    generator, guidance = networks()
    state = train_alternating(
        generator,
        guidance,
        objectives or Pursuit(),
        config=training(processes),
        guidance_config=guidance_config,
        seed=7,
        dataset_size=13,
        checkpoint=CheckpointFile(directory / "state.pt", "this run"),
        curves_dir=directory / "curves",
        description="toy",
        **options,
    )
    return save(state), contents(directory / "curves")
