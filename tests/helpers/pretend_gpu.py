"""A device that no machine has: its tensors have shapes and a place, no values. Mixing them with the CPU's raises, as
on a GPU, and so does looking at a value. What is run here is what a GPU would be asked for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

Module = TypeVar("Module", bound=nn.Module)
NAME = "pretend"


@contextmanager
def pretend_gpu() -> Iterator[torch.device]:
    if torch._C._get_privateuse1_backend_name() != NAME:
        _setup_privateuseone_for_python_backend(NAME)
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield torch.device(NAME, 0)


def on(device: torch.device, build: Callable[[], Module]) -> Module:
    """What ``build`` makes, its tensors on ``device``, without values."""
    with unset_fake_temporarily(), torch.device("meta"):
        module = build()
    return module.to_empty(device=device)
