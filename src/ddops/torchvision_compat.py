"""torchvision beside a CPU build of torch.

PyPI's torchvision is the CUDA build; next to a CPU torch its compiled operators do not load, and its import stops
at ``operator torchvision::nms does not exist``. Nothing here calls those operators: declaring them is enough.
"""

from __future__ import annotations

import importlib.util

import torch

_library: torch.library.Library | None = None


def define_missing_operators() -> None:
    """Make ``import torchvision`` (and so lpips, torch-fidelity) work beside a CPU build of torch. Idempotent."""
    global _library
    if _library is not None or torch.version.cuda is not None or importlib.util.find_spec("torchvision") is None:
        return
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
