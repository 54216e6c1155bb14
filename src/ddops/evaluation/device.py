"""Where evaluation computes."""

from __future__ import annotations

import torch


def accelerator() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
