"""What stays in float32 where the networks run in half precision."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Function = TypeVar("Function", bound=Callable[..., Any])


def full_precision(function: Function) -> Function:
    """``function`` in float32 within an autocast too: for closed forms, distances and heads, whose differences half
    precision loses. One of its arguments is a tensor. Outside an autocast nothing changes."""

    @functools.wraps(function)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        device = next(argument for argument in arguments if isinstance(argument, Tensor)).device.type
        if not torch.is_autocast_enabled(device):
            return function(*arguments, **options)
        with torch.autocast(device, enabled=False):
            return function(*(_widened(argument) for argument in arguments), **options)

    return wrapped  # type: ignore[return-value]


class WholeLinear(nn.Linear):
    """A linear layer in float32 within an autocast too: logits of half precision tie, and which is largest changes."""

    forward = full_precision(nn.Linear.forward)


def product_dtype(x: Tensor) -> torch.dtype:
    """What a product of ``x`` is computed in: its own type, or that of the autocast that it is in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _widened(argument: Any) -> Any:
    halves = (torch.bfloat16, torch.float16)
    return argument.float() if isinstance(argument, Tensor) and argument.dtype in halves else argument
