"""Two networks trained in turn: a generator, and a guidance network that follows what the generator makes.

The guidance network is first aligned with the generator, so that the first gradients mean something; then each of the
generator's updates is followed by several of its own. As in :mod:`ddops.training.loop`, a step is a function of
(seed, step, state): run the same command again and it goes on, to the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ddops.config.dd2 import GuidanceConfig
from ddops.config.training import TrainingConfig
from ddops.training.checkpoint import CheckpointFile
from ddops.training.curves import Curves, Row
from ddops.training.loop import (
    autocast,
    averaged,
    build_optimizers,
    check_finite,
    compile_blocks,
    frozen_copy,
    progress_bar,
    seed_step,
    update,
    update_ema,
)
from ddops.training.replicas import Replicas, replicas
from ddops.training.schedule import batch_indices, ema_decay, learning_rate

log = logging.getLogger(__name__)

Values = Mapping[str, Tensor]
Evaluate = Callable[[nn.Module, int, Sequence[Row] | None], Row]
"""Takes the EMA generator, the step, and all points of the curves before it, or None in a process that keeps none;
gives more values of this point. Every process calls it, so that they can share its work."""


class Objectives(Protocol):
    """The two losses, each under the key ``loss``, and whatever else is worth a curve. The guidance network's is of
    ``count`` fresh samples."""

    def guidance(self, generator: nn.Module, guidance: nn.Module, count: int) -> Values: ...

    def generator(self, generator: nn.Module, guidance: nn.Module, indices_B: Tensor, step: int) -> Values: ...


@dataclass
class Networks:
    """Everything that a run changes."""

    generator: nn.Module
    guidance: nn.Module
    ema: nn.Module
    """Of the generator."""
    guidance_ema: nn.Module | None
    generator_optimizers: list[torch.optim.Optimizer]
    guidance_optimizers: list[torch.optim.Optimizer]

    def parts(self) -> list[Any]:
        """Whatever has a state."""
        averages = [self.ema] if self.guidance_ema is None else [self.ema, self.guidance_ema]
        return [self.generator, self.guidance, *averages, *self.generator_optimizers, *self.guidance_optimizers]

    def state(self) -> list[Any]:
        return [part.state_dict() for part in self.parts()]

    def load(self, state: list[Any]) -> None:
        for part, saved in zip(self.parts(), state, strict=True):
            part.load_state_dict(saved)


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
    evaluate: Evaluate | None = None,
    evaluate_every: int = 0,
) -> dict[str, Tensor]:
    """Align, then train both; returns the state dict of the generator's EMA weights.

    ``config`` is the generator's optimisation. Steps, of the curves too, count the generator's updates; those of the
    alignment come before them and are negative. ``evaluate`` is called every ``evaluate_every`` steps and at the end.

    Raises:
        TrainingDiverged: a loss is NaN or infinite; or what ``evaluate`` raises.
        ReplicaLost: one of ``config.processes`` ended.
    """
    networks = Networks(
        generator,
        guidance,
        frozen_copy(generator),
        frozen_copy(guidance) if guidance_config.ema_decay else None,
        build_optimizers(generator, config),
        build_optimizers(guidance, guidance_config),
    )
    alignment = guidance_config.alignment_steps
    first_step = -alignment
    state = checkpoint.load(("step", "history", "networks"), range(first_step, config.steps + 1))
    if state:
        networks.load(state["networks"])
        first_step = int(state["step"])
        log.info("%s: resuming at step %d of %d", description, first_step, config.steps)

    if config.compile_blocks:
        compile_blocks(generator)
        compile_blocks(guidance)
        if networks.guidance_ema is not None:
            compile_blocks(networks.guidance_ema)
    with replicas(config.processes, work=first_step < config.steps) as group:
        curves = Curves(curves_dir, state["history"] if state else None) if group.is_first else None
        bar = progress_bar(description, alignment + first_step, alignment + config.steps, shown=group.is_first)
        for step in range(first_step, config.steps):
            seed_step(seed, alignment + step, group.rank, group.size)
            row: dict[str, Tensor] = {}
            for _ in range(guidance_config.updates if step >= 0 else 1):
                row |= _update_guidance(networks, objectives, guidance_config, config.precision, group)
            if step >= 0:
                share = batch_indices(seed, step, config.batch_size, dataset_size)[group.rank :: group.size]
                row |= _update_generator(networks, objectives, share, config, step, group)
            bar.update()
            done = step + 1
            last = done == config.steps
            to_log, to_save = (last or done % every == 0 for every in (config.log_every, config.checkpoint_every))
            to_evaluate = evaluate is not None and step >= 0 and (last or done % evaluate_every == 0)
            to_log |= to_evaluate
            if not (to_log or to_save):
                continue
            values = averaged(row, group)
            check_finite(values, description, done)
            if evaluate is not None and to_evaluate:
                earlier = None if curves is None else [row for _, row in curves.history]
                values |= evaluate(networks.ema, done, earlier)
            if curves is None:
                continue
            if to_log:
                curves.log(done, values)
                bar.set_postfix({"guidance": f"{values['guidance_loss']:.4f}"}, refresh=False)
            if to_save:
                checkpoint.save({"step": done, "history": curves.history, "networks": networks.state()})
        bar.close()
        if curves is not None:
            curves.close()
    return networks.ema.state_dict()


def _update_guidance(
    networks: Networks, objectives: Objectives, config: GuidanceConfig, precision: str, group: Replicas
) -> dict[str, Tensor]:
    with autocast(networks.guidance, precision):
        values = objectives.guidance(networks.generator, networks.guidance, config.batch_size // group.size)
    norm = update(
        networks.guidance,
        networks.guidance_optimizers,
        values["loss"],
        config.learning_rate,
        config.gradient_clip,
        group,
    )
    if networks.guidance_ema is not None:
        update_ema(networks.guidance_ema, networks.guidance, config.ema_decay)
    return {f"guidance_{name}": value for name, value in {**values, "gradient_norm": norm}.items()}


def _update_generator(
    networks: Networks, objectives: Objectives, share: Tensor, config: TrainingConfig, step: int, group: Replicas
) -> dict[str, Tensor]:
    guidance = networks.guidance if networks.guidance_ema is None else networks.guidance_ema
    with autocast(networks.generator, config.precision):
        values = objectives.generator(networks.generator, guidance, share, step)
    norm = update(
        networks.generator,
        networks.generator_optimizers,
        values["loss"],
        learning_rate(config, step),
        config.gradient_clip,
        group,
    )
    update_ema(networks.ema, networks.generator, ema_decay(config, step))
    return {**values, "gradient_norm": norm}
