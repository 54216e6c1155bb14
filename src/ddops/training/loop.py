"""The training loop shared by every stage that trains. Run the same command again and it goes on.

Everything a step does is a pure function of (seed, step, state): the batch, the random numbers, the learning
rate. So the state is weights, optimiser, EMA, curves and the step, and a resumed run ends with the same bytes
as an uninterrupted one (on the same machine and number of threads or processes).
"""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ddops.config.dd2 import GuidanceConfig
from ddops.config.training import TrainingConfig
from ddops.training.checkpoint import CheckpointFile
from ddops.training.curves import Curves
from ddops.training.device import device_of
from ddops.training.errors import TrainingDiverged
from ddops.training.muon import Muon
from ddops.training.replicas import Replicas, replicas
from ddops.training.schedule import batch_indices, ema_decay, learning_rate

log = logging.getLogger(__name__)

MAX_SEED = 2**63
_STATE = ("step", "model", "ema", "optimizers", "history")
Module = TypeVar("Module", bound=nn.Module)


class Objective(Protocol):
    """Scalar loss under the key ``loss``, and whatever else is worth a curve, for one batch of sample indices."""

    def __call__(self, model: nn.Module, indices_B: Tensor, step: int) -> Mapping[str, Tensor]: ...


def train(
    model: nn.Module,
    objective: Objective,
    *,
    config: TrainingConfig,
    seed: int,
    dataset_size: int,
    checkpoint: CheckpointFile,
    curves_dir: Path,
    description: str,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    evaluate_every: int = 0,
    before_step: Callable[[nn.Module, int], None] | None = None,
    stay: bool = False,
) -> dict[str, Tensor]:
    """Train ``model`` and return the state dict of its EMA weights.

    Args:
        model: on the device it is to be trained on; so must be what ``objective`` computes with. The indices that it
            is given are on the CPU.
        dataset_size: samples that ``objective``'s indices run over.
        checkpoint: where the state lives; a checkpoint of the same fingerprint is resumed.
        evaluate: called with the EMA model every ``evaluate_every`` steps and at the end, by every process, so that
            they can share its work; the first one's values join the curves.
        before_step: changes the model outside the gradient (such as re-seeding unused codes).
        stay: another training follows, so processes that torchrun started return too; see ``replicas``.

    Raises:
        TrainingDiverged: the loss is NaN or infinite.
        ReplicaLost: one of ``config.processes`` ended.
    """
    ema_model = frozen_copy(model)
    optimizers = build_optimizers(model, config)
    state = checkpoint.load(_STATE, range(config.steps + 1))
    first_step = _restore(state, model, ema_model, optimizers)
    if first_step:
        log.info("%s: resuming at step %d of %d", description, first_step, config.steps)

    if config.compile_blocks:
        compile_blocks(model)
    with replicas(config.processes, work=first_step < config.steps, stay=stay) as group:
        curves = Curves(curves_dir, state["history"] if state else None) if group.is_first else None
        bar = progress_bar(description, first_step, config.steps, shown=group.is_first)
        for step in range(first_step, config.steps):
            seed_step(seed, step, 0, 1)
            if before_step is not None:
                before_step(model, step)
            seed_step(seed, step, group.rank, group.size)
            share = batch_indices(seed, step, config.batch_size, dataset_size)[group.rank :: group.size]
            with autocast(model, config.precision):
                values = objective(model, share, step)
            gradient_norm = update(
                model, optimizers, values["loss"], learning_rate(config, step), config.gradient_clip, group
            )
            update_ema(ema_model, model, ema_decay(config, step))
            bar.update()
            done = step + 1
            last = done == config.steps
            to_log, to_save = (last or done % every == 0 for every in (config.log_every, config.checkpoint_every))
            to_evaluate = evaluate is not None and (last or done % evaluate_every == 0)
            to_log |= to_evaluate
            if not (to_log or to_save):
                continue
            row = averaged({**values, "gradient_norm": gradient_norm}, group)
            check_finite(row, description, done)
            if evaluate is not None and to_evaluate:
                row |= evaluate(ema_model)
            if curves is None:
                continue
            if to_log:
                curves.log(done, row)
                bar.set_postfix({"loss": f"{row['loss']:.4f}"}, refresh=False)
            if to_save:
                checkpoint.save(_snapshot(done, model, ema_model, optimizers, curves))
        bar.close()
        if curves is not None:
            curves.close()
    return ema_model.state_dict()


def seeded(seed: int, build: Callable[[], Module]) -> Module:
    """``build()`` with torch's global generator seeded: the same seed gives the same initial weights."""
    torch.manual_seed(seed)
    return build()


def build_optimizers(model: nn.Module, config: TrainingConfig | GuidanceConfig) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon before it on the matrices of the transformer blocks where the configuration asks for it.

    Weight decay is on matrices only: biases, norms and scales are left alone.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    inner = {
        name: parameter
        for name, parameter in trained.items()
        if config.optimizer == "muon" and "blocks." in name and parameter.ndim == 2
    }
    outer = [parameter for name, parameter in trained.items() if name not in inner]
    groups = [
        {"params": [parameter for parameter in outer if parameter.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in outer if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=config.betas, fused=True)]
    if inner:
        optimizers.insert(0, Muon(list(inner.values()), config.weight_decay))
    return optimizers


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Compile every transformer block of a model in place. All blocks are alike, so one is compiled and the others
    reuse it; the parameters keep their names."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "blocks":
            for block in module:
                block.compile(backend=backend)


def autocast(model: nn.Module, precision: str) -> torch.autocast:
    """Half precision on the model's device where ``precision`` is ``bfloat16``; its range needs no loss scaling."""
    return torch.autocast(device_of(model).type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def seed_step(seed: int, step: int, rank: int, size: int) -> None:
    """Make what a replica draws in a step a function of the seed, the step and its rank."""
    torch.manual_seed(((seed * 1_000_003 + step) * size + rank) % MAX_SEED)


def progress_bar(description: str, first_step: int, steps: int, *, shown: bool) -> tqdm[Any]:
    """A bar of one training; only one of its replicas shows it."""
    bar = functools.partial(tqdm, total=steps, initial=first_step, desc=description, unit="step", mininterval=1.0)
    # Asked for nothing, tqdm does as the environment says (TQDM_DISABLE).
    return bar() if shown else bar(disable=True)


def update(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    loss: Tensor,
    rate: float,
    gradient_clip: float,
    group: Replicas,
) -> Tensor:
    """One step of the optimisers on the replicas' mean gradient, its norm limited; returns the norm it had."""
    for optimizer in optimizers:
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    group.average([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), gradient_clip)
    for optimizer in optimizers:
        optimizer.step()
    return gradient_norm


def averaged(values: Mapping[str, Tensor], group: Replicas) -> dict[str, float]:
    """Each value's mean over the replicas."""
    means = {name: value.detach().clone() for name, value in values.items()}
    group.average(list(means.values()))
    return {name: float(mean) for name, mean in means.items()}


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode and without gradients: where the EMA begins."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def update_ema(ema_model: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the EMA's parameters towards the model's; buffers are copied."""
    ema: list[Tensor] = list(ema_model.parameters())
    current: list[Tensor] = list(model.parameters())
    torch._foreach_lerp_(ema, current, 1 - decay)
    for ema_buffer, buffer in zip(ema_model.buffers(), model.buffers(), strict=True):
        ema_buffer.copy_(buffer)


def check_finite(row: Mapping[str, float], description: str, step: int) -> None:
    """Raises TrainingDiverged where a value is NaN or infinite."""
    broken = [name for name, value in row.items() if not math.isfinite(value)]
    if broken:
        # What the guidance network breaks, the generator's loss is broken by.
        key = "guidance.learning_rate" if any(name.startswith("guidance_") for name in broken) else "learning_rate"
        raise TrainingDiverged(f"{description}: not a number at step {step}: {row}. Lower the {key}.")


def _snapshot(
    step: int, model: nn.Module, ema_model: nn.Module, optimizers: list[torch.optim.Optimizer], curves: Curves
) -> dict[str, Any]:
    return {
        "step": step,
        "model": model.state_dict(),
        "ema": ema_model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "history": curves.history,
    }


def _restore(
    state: dict[str, Any] | None, model: nn.Module, ema_model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> int:
    if state is None:
        return 0
    model.load_state_dict(state["model"])
    ema_model.load_state_dict(state["ema"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"])
