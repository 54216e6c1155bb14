"""Two networks trained in turn: a generator, and a guidance network that follows what the generator makes.

The guidance network is first aligned with the generator, so that the first gradients mean something; then each of the
generator's updates is followed by several of its own. As in :mod:`ddops.training.loop`, a step is a function of
(seed, step, state): run the same command again and it goes on, to the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ddops.config.dd2 import GuidanceConfig
from ddops.config.training import TrainingConfig
from ddops.training.checkpoint import CheckpointFile
from ddops.training.curves import Curves
from ddops.training.loop import MAX_SEED, check_finite, frozen_copy, parameter_groups, update, update_ema
from ddops.training.schedule import batch_indices, ema_decay, learning_rate

log = logging.getLogger(__name__)

Values = Mapping[str, Tensor]


class Objectives(Protocol):
    """The two losses, each under the key ``loss``, and whatever else is worth a curve."""

    def guidance(self, generator: nn.Module, guidance: nn.Module) -> Values: ...

    def generator(self, generator: nn.Module, guidance: nn.Module, indices_B: Tensor) -> Values: ...


@dataclass
class Networks:
    """Everything that a run changes."""

    generator: nn.Module
    guidance: nn.Module
    ema: nn.Module
    generator_optimizer: torch.optim.Optimizer
    guidance_optimizer: torch.optim.Optimizer

    def state(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in vars(self).items()}

    def load(self, state: Mapping[str, Any]) -> None:
        for name, part in vars(self).items():
            part.load_state_dict(state[name])


def train_alternating(
    generator: nn.Module,
    guidance: nn.Module,
    objectives: Objectives,
    *,
    config: TrainingConfig,
    guidance_config: GuidanceConfig,
    seed: int,
    dataset_size: int,
    checkpoint: CheckpointFile,
    curves_dir: Path,
    description: str,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    evaluate_every: int = 0,
) -> dict[str, Tensor]:
    """Align, then train both; returns the state dict of the generator's EMA weights.

    ``config`` is the generator's optimisation. Steps, of the curves too, count the generator's updates; those of the
    alignment come before them and are negative.

    Raises:
        TrainingDiverged: a loss is NaN or infinite; or what ``evaluate`` raises.
    """
    networks = Networks(
        generator,
        guidance,
        frozen_copy(generator),
        torch.optim.AdamW(parameter_groups(generator, config.weight_decay), betas=config.betas, fused=True),
        torch.optim.AdamW(
            parameter_groups(guidance, guidance_config.weight_decay), betas=guidance_config.betas, fused=True
        ),
    )
    first_step = -guidance_config.alignment_steps
    state = checkpoint.load()
    curves = Curves(curves_dir, state["history"] if state else None)
    if state:
        networks.load(state)
        first_step = int(state["step"])
        log.info("%s: resuming at step %d of %d", description, first_step, config.steps)

    total = guidance_config.alignment_steps + config.steps
    bar = tqdm(total=total, initial=total - config.steps + first_step, desc=description, unit="step", mininterval=1.0)
    for step in range(first_step, config.steps):
        torch.manual_seed((seed * 1_000_003 + guidance_config.alignment_steps + step) % MAX_SEED)
        aligning = step < 0
        row: dict[str, Tensor] = {}
        for _ in range(1 if aligning else guidance_config.updates):
            row |= _update_guidance(networks, objectives, guidance_config)
        if not aligning:
            indices_B = batch_indices(seed, step, config.batch_size, dataset_size)
            row |= _update_generator(networks, objectives, indices_B, config, step)
        bar.update()
        done = step + 1
        last = done == config.steps
        to_log, to_save = (last or done % every == 0 for every in (config.log_every, config.checkpoint_every))
        if not (to_log or to_save):
            continue
        values = {name: float(value.detach()) for name, value in row.items()}
        check_finite(values, description, done)
        if to_log:
            if evaluate is not None and not aligning and (last or done % evaluate_every == 0):
                values |= evaluate(networks.ema)
            curves.log(done, values)
            bar.set_postfix({"guidance": f"{values['guidance_loss']:.4f}"}, refresh=False)
        if to_save:
            checkpoint.save({"step": done, "history": curves.history, **networks.state()})
    bar.close()
    curves.close()
    return networks.ema.state_dict()


def _update_guidance(networks: Networks, objectives: Objectives, config: GuidanceConfig) -> dict[str, Tensor]:
    values = objectives.guidance(networks.generator, networks.guidance)
    norm = update(
        networks.guidance, networks.guidance_optimizer, values["loss"], config.learning_rate, config.gradient_clip
    )
    return {f"guidance_{name}": value for name, value in {**values, "gradient_norm": norm}.items()}


def _update_generator(
    networks: Networks,
    objectives: Objectives,
    indices_B: Tensor,
    config: TrainingConfig,
    step: int,
) -> dict[str, Tensor]:
    values = objectives.generator(networks.generator, networks.guidance, indices_B)
    rate = learning_rate(config, step)
    norm = update(networks.generator, networks.generator_optimizer, values["loss"], rate, config.gradient_clip)
    update_ema(networks.ema, networks.generator, ema_decay(config, step))
    return {**values, "gradient_norm": norm}
