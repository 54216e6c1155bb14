"""Muon in the precision of the weights, all matrices of a shape at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import overload

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """PyTorch's Muon with its settings and state, but for the precision of the orthogonalisation.

    PyTorch rounds to bfloat16 first. A processor without bfloat16 emulates its products, at a tenth of float32's speed
    or less, and on the digits half of a step went there. Steps are scaled to the size of AdamW's (Liu et al., arXiv
    2502.16982, equation 4), so that both go by one learning rate. A GPU would lose by it; the published presets train
    with AdamW.
    """

    def __init__(self, parameters: Sequence[Tensor], weight_decay: float) -> None:
        super().__init__(parameters, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape].append(parameter)
            for (rows, columns), parameters in alike.items():
                updates = torch.stack([self._direction(parameter, group) for parameter in parameters])
                orthogonal = orthogonalise(updates, group["ns_coefficients"], group["ns_steps"], group["eps"])
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                size = 0.2 * max(rows, columns) ** 0.5
                torch._foreach_add_(parameters, list(orthogonal), alpha=-group["lr"] * size)
        return loss

    def _direction(self, parameter: Tensor, group: dict[str, float]) -> Tensor:
        """Nesterov's, from the gradient and its running mean."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        mean: Tensor = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        return torch.lerp(gradient, mean, group["momentum"])


def orthogonalise(
    matrices_NAB: Tensor, coefficients: tuple[float, float, float], steps: int = 5, epsilon: float = 1e-7
) -> Tensor:
    """Matrices of the same singular vectors with singular values near 1, [N, A, B], by the Newton-Schulz iteration of
    Muon (arXiv 2502.16982, section 2.1)."""
    a, b, c = coefficients
    tall = matrices_NAB.shape[1] > matrices_NAB.shape[2]
    x = matrices_NAB.mT if tall else matrices_NAB
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=epsilon)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
