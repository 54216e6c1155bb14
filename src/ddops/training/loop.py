"""The training loop shared by every stage that trains. Run the same command again and it goes on.

Everything a step does is a pure function of (seed, step, state): the batch, the random numbers, the learning
rate. So the state is weights, optimiser, EMA, curves and the step, and a resumed run ends with the same bytes
as an uninterrupted one (on the same machine and number of threads).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ddops.config.stages import TrainingConfig
from ddops.training.checkpoint import CheckpointFile
from ddops.training.curves import Curves
from ddops.training.errors import TrainingDiverged
from ddops.training.schedule import batch_indices, ema_decay, learning_rate

log = logging.getLogger(__name__)

MAX_SEED = 2**63
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
) -> dict[str, Tensor]:
    """Train ``model`` and return the state dict of its EMA weights.

    Args:
        dataset_size: samples that ``objective``'s indices run over.
        checkpoint: where the state lives; a checkpoint of the same fingerprint is resumed.
        evaluate: called with the EMA model every ``evaluate_every`` steps and at the end; its values join the curves.
        before_step: changes the model outside the gradient (such as re-seeding unused codes).

    Raises:
        TrainingDiverged: the loss is NaN or infinite.
    """
    ema_model = _copy_of(model)
    optimizer = torch.optim.AdamW(_parameter_groups(model, config.weight_decay), betas=config.betas, fused=True)
    state = checkpoint.load()
    first_step = _restore(state, model, ema_model, optimizer)
    curves = Curves(curves_dir, state["history"] if state else None)
    if first_step:
        log.info("%s: resuming at step %d of %d", description, first_step, config.steps)

    bar = tqdm(total=config.steps, initial=first_step, desc=description, unit="step", mininterval=1.0)
    for step in range(first_step, config.steps):
        torch.manual_seed((seed * 1_000_003 + step) % MAX_SEED)
        if before_step is not None:
            before_step(model, step)
        values = objective(model, batch_indices(seed, step, config.batch_size, dataset_size), step)
        gradient_norm = _update(model, optimizer, values["loss"], config, step)
        _update_ema(ema_model, model, ema_decay(config, step))
        bar.update()
        done = step + 1
        last = done == config.steps
        to_log, to_save = (last or done % every == 0 for every in (config.log_every, config.checkpoint_every))
        if not (to_log or to_save):
            continue
        row = {name: float(value.detach()) for name, value in {**values, "gradient_norm": gradient_norm}.items()}
        _check_finite(row, description, done)
        if to_log:
            if evaluate is not None and (last or done % evaluate_every == 0):
                row |= evaluate(ema_model)
            curves.log(done, row)
            bar.set_postfix({"loss": f"{row['loss']:.4f}"}, refresh=False)
        if to_save:
            checkpoint.save(_snapshot(done, model, ema_model, optimizer, curves))
    bar.close()
    curves.close()
    return ema_model.state_dict()


def seeded(seed: int, build: Callable[[], Module]) -> Module:
    """``build()`` with torch's global generator seeded: the same seed gives the same initial weights."""
    torch.manual_seed(seed)
    return build()


def _update(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, config: TrainingConfig, step: int
) -> Tensor:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
    optimizer.step()
    return gradient_norm


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only: biases, norms and scales are left alone."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]


def _copy_of(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def _update_ema(ema_model: nn.Module, model: nn.Module, decay: float) -> None:
    ema: list[Tensor] = list(ema_model.parameters())
    current: list[Tensor] = list(model.parameters())
    torch._foreach_lerp_(ema, current, 1 - decay)
    for ema_buffer, buffer in zip(ema_model.buffers(), model.buffers(), strict=True):
        ema_buffer.copy_(buffer)


def _check_finite(row: Mapping[str, float], description: str, step: int) -> None:
    if not all(torch.isfinite(torch.tensor(value)) for value in row.values()):
        raise TrainingDiverged(f"{description}: not a number at step {step}: {row}. Lower the learning_rate.")


def _snapshot(
    step: int, model: nn.Module, ema_model: nn.Module, optimizer: torch.optim.Optimizer, curves: Curves
) -> dict[str, Any]:
    return {
        "step": step,
        "model": model.state_dict(),
        "ema": ema_model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": curves.history,
    }


def _restore(
    state: dict[str, Any] | None, model: nn.Module, ema_model: nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    if state is None:
        return 0
    model.load_state_dict(state["model"])
    ema_model.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
