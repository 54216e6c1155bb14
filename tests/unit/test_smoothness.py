"""Interpolations and the perceptual path length: the path is Gaussian throughout, and the length has a closed form."""

import math

import numpy as np
import pytest
import torch

from ddops.evaluation.drawing import Request
from ddops.evaluation.smoothness import arc, ends, interpolate, path_lengths

SHAPE = (3, 2)
LABELS = torch.arange(4000) % 10


def squared(a, b):
    return (a - b).square().flatten(1).sum(1)


def test_every_point_of_the_arc_is_standard_normal_and_its_ends_are_the_noises():
    start, end = ends(7, np.arange(20_000), SHAPE)
    half = torch.full((20_000,), 0.37)
    assert torch.equal(arc(start, end, torch.zeros(20_000)), start)
    torch.testing.assert_close(arc(start, end, torch.ones(20_000)), end, rtol=0, atol=1e-6)
    covariance = np.cov(arc(start, end, half).flatten(1).numpy(), rowvar=False)
    np.testing.assert_allclose(covariance, np.eye(6), atol=0.04)


def test_path_length_of_a_linear_generator_is_its_closed_form():
    """For G(z) = A z and d = |.|^2, the mean over Gaussian noises is (pi / 2)^2 |A|^2: the arc's speed is a noise's,
    turned by a quarter."""
    generator = torch.Generator().manual_seed(0)
    matrix = 0.01 * torch.randn(6, 6, generator=generator, dtype=torch.float64)

    def linear(noise_BLC, labels_B):
        return (noise_BLC.double().flatten(1) @ matrix.T).view(-1, 1, 2, 3)

    lengths = torch.cat(list(path_lengths(linear, squared, Request(LABELS, 512), 7, SHAPE, 1e-2)))
    expected = (math.pi / 2) ** 2 * float(matrix.square().sum())
    assert len(lengths) == len(LABELS)
    assert float(lengths.mean()) == pytest.approx(expected, rel=0.03)


def test_path_lengths_do_not_depend_on_batches_and_do_on_the_seed():
    def curved(noise_BLC, labels_B):
        return (noise_BLC.sin().flatten(1) * 0.1).view(-1, 1, 2, 3)

    def lengths(batch, seed):
        return torch.cat(list(path_lengths(curved, squared, Request(LABELS[:100], batch), seed, SHAPE, 1e-2)))

    torch.testing.assert_close(lengths(7, 1), lengths(100, 1))
    assert not torch.equal(lengths(100, 1), lengths(100, 2))


def test_interpolations_are_a_line_of_frames_a_class():
    def labelled(noise_BLC, labels_B):
        return noise_BLC.sum((1, 2)).view(-1, 1, 1, 1) + 100 * labels_B.view(-1, 1, 1, 1)

    labels_K = torch.tensor([4, 9])
    images = interpolate(labelled, labels_K, 5, 7, SHAPE).flatten().view(2, 5)
    start, end = ends(7, labels_K.numpy(), SHAPE)
    torch.testing.assert_close(images[:, 0], start.sum((1, 2)) + 100 * labels_K)
    torch.testing.assert_close(images[:, -1], end.sum((1, 2)) + 100 * labels_K, rtol=0, atol=1e-4)
