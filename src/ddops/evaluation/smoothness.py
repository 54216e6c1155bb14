"""How smoothly a generator turns noise into images: interpolations to look at, and the perceptual path length.

PPL (StyleGAN, arXiv 1812.04948, section 4.1; the DD2 paper's measure of smoothness) is the mean over paths of
``d(G(z(t)), G(z(t + epsilon))) / epsilon^2``. The path *(ours)* is the quarter circle between two noises,
``cos(pi t / 2) a + sin(pi t / 2) b``, every point of which is standard normal again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ddops.evaluation.drawing import Generator, Indices, Request
from ddops.sampling.noise import Stream, normals, uniforms

Distance = Callable[[Tensor, Tensor], Tensor]
"""Two batches of images (B, I, H, W) in [-1, 1] to a distance a sample, (B,)."""


def arc(start_BLC: Tensor, end_BLC: Tensor, t_B: Tensor) -> Tensor:
    """The point at ``t`` (B,), 0..1, of the quarter circle from one noise to the other, (B, L, C)."""
    angle_B11 = (t_B * (math.pi / 2)).view(-1, 1, 1)
    return angle_B11.cos() * start_BLC + angle_B11.sin() * end_BLC


def ends(seed: int, indices_B: Indices, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Two noises (B, L, C) a sample, a function of the seed and the sample's index."""
    both_B2LC = normals(seed, Stream.PATH, indices_B, (2, *shape))
    return both_B2LC[:, 0], both_B2LC[:, 1]


@torch.inference_mode()
def path_lengths(
    generator: Generator, distance: Distance, request: Request, seed: int, shape: tuple[int, int], epsilon: float
) -> Iterator[Tensor]:
    """``d / epsilon^2`` of every sample, float64 (B,), batch by batch; paths and places follow from the seed."""
    for indices_B, labels_B in request.batches("path length"):
        start_BLC, end_BLC = ends(seed, indices_B, shape)
        t_B = torch.from_numpy(uniforms(seed, Stream.PATH_PLACE, indices_B, 1)[:, 0]).float() * (1 - epsilon)
        here, there = (generator(arc(start_BLC, end_BLC, t), labels_B) for t in (t_B, t_B + epsilon))
        yield distance(here.clamp(-1, 1), there.clamp(-1, 1)).double().cpu() / epsilon**2


@torch.inference_mode()
def interpolate(generator: Generator, labels_K: Tensor, frames: int, seed: int, shape: tuple[int, int]) -> Tensor:
    """Images (K * frames, I, H, W), a row of frames a class, from one noise to another."""
    start_KLC, end_KLC = ends(seed, labels_K.numpy(), shape)
    steps_F = torch.linspace(0, 1, frames).repeat(len(labels_K))
    paired = [noise_KLC.repeat_interleave(frames, 0) for noise_KLC in (start_KLC, end_KLC)]
    return generator(arc(paired[0], paired[1], steps_F), labels_K.repeat_interleave(frames))
