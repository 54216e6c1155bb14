"""Where a training computes: one GPU a process, or the CPU."""

from __future__ import annotations

import logging
import os

import torch
import torch.distributed as dist
from torch import nn

log = logging.getLogger(__name__)


def training_device(processes: int) -> torch.device:
    """The device of this process in a training that ``processes`` share; it becomes CUDA's current one.

    A process that torchrun started has the GPU of its own number on its machine. A training of one process has the
    first. Processes that are forked to share a batch compute on the CPU, since a GPU does not survive a fork; so do
    torchrun's where a machine has fewer GPUs than processes.
    """
    if dist.is_torchelastic_launched():
        number, fits = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]) <= torch.cuda.device_count()
    else:
        number, fits = 0, processes == 1 and torch.cuda.is_available()
    if not fits:
        return torch.device("cpu")
    torch.cuda.set_device(number)
    device = torch.device("cuda", number)
    log.info("training on %s (%s)", device, torch.cuda.get_device_name(device))
    return device


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are."""
    return next(model.parameters()).device
