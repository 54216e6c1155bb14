"""Counter-based noise: every number is a pure function of (seed, stream, sample index, position).

A sample's noise does not depend on its batch, its process or its machine. The bits are Philox4x32-10
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011); normals are the inverse of the
normal distribution function (Wichura's algorithm AS 241, 1988) in float64, rounded to float32. Only
IEEE additions, multiplications, divisions and square roots are used, each its own NumPy call, so that no
mathematical library and no fused multiply-add can change a bit.

``NOISE_VERSION`` names this construction; data made from the noise records it.

This file needs NumPy alone (torch is loaded by :func:`normals` only): a server without PyTorch draws the same noise.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

NOISE_VERSION: Final = "philox4x32-10/as241/1"

_MULTIPLIERS: Final = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)
_LOW: Final = np.uint64(0xFFFFFFFF)
_32: Final = np.uint64(32)

Words = NDArray[np.uint64]
Doubles = NDArray[np.float64]


class Stream(IntEnum):
    """What a number is for: two streams of the same seed share nothing."""

    TRAJECTORY_NOISE = 0
    LABEL = 1
    CATEGORICAL = 2
    SAMPLE_NOISE = 3
    START = 4
    RENOISE = 5
    SHUFFLE = 6
    PATH = 7
    PATH_PLACE = 8
    REFINEMENT = 9


def philox_words(seed: int, stream: int, indices_N: NDArray[np.int64], count: int) -> Words:
    """32 random bits each, as uint64 of shape (N, count).

    The key is the 64-bit ``seed``; the counter is (block, stream, low word and high word of the sample index).
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"a seed is an integer in 0..2**64-1, got {seed}")
    blocks = -(-count // 4)
    index_N = indices_N.astype(np.uint64)
    shape = (len(index_N), blocks)
    counter = [
        np.broadcast_to(np.arange(blocks, dtype=np.uint64), shape),
        np.full(shape, stream, dtype=np.uint64),
        np.broadcast_to((index_N & _LOW)[:, None], shape),
        np.broadcast_to((index_N >> _32)[:, None], shape),
    ]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        counter = _philox_round(counter, np.uint64(key[0]), np.uint64(key[1]))
        key = [(word + weyl) & 0xFFFFFFFF for word, weyl in zip(key, _WEYL, strict=True)]
    return np.stack(counter, axis=-1).reshape(len(index_N), -1)[:, :count]


def _philox_round(counter: list[Words], key0: np.uint64, key1: np.uint64) -> list[Words]:
    product0 = _MULTIPLIERS[0] * counter[0]
    product1 = _MULTIPLIERS[1] * counter[2]
    return [
        (product1 >> _32) ^ counter[1] ^ key0,
        product1 & _LOW,
        (product0 >> _32) ^ counter[3] ^ key1,
        product0 & _LOW,
    ]


def uniforms(seed: int, stream: int, indices_N: NDArray[np.int64], count: int) -> Doubles:
    """Numbers in the open interval (0, 1), float64 of shape (N, count): the centres of 2**32 equal bins."""
    words = philox_words(seed, stream, indices_N, count)
    return (words.astype(np.float64) + 0.5) / 4294967296.0


def normals(seed: int, stream: int, indices_N: NDArray[np.int64], shape: tuple[int, ...]) -> Tensor:
    """Standard normals, float32 of shape (N, *shape), one row a sample index."""
    import torch

    return torch.from_numpy(normals_array(seed, stream, indices_N, shape))


def normals_array(seed: int, stream: int, indices_N: NDArray[np.int64], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """As :func:`normals`, in NumPy."""
    values = _normal_quantile(uniforms(seed, stream, indices_N, int(np.prod(shape))))
    return values.astype(np.float32).reshape(len(indices_N), *shape)


def integers(seed: int, stream: int, indices_N: NDArray[np.int64], count: int, high: int) -> NDArray[np.int64]:
    """Integers in 0..high-1, shape (N, count)."""
    return np.floor(uniforms(seed, stream, indices_N, count) * high).astype(np.int64)


# Wichura's coefficients (AS 241, PPND16): numerator and denominator, constant term first.
_CENTRE: Final = (
    (3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
     4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3),
    (1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
     2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3),
)  # fmt: skip
_OUTSIDE: Final = (
    (1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
     1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4),
    (1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
     1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9),
)  # fmt: skip


def _rational(r: Doubles, coefficients: tuple[tuple[float, ...], tuple[float, ...]]) -> Doubles:
    numerator, denominator = np.full_like(r, coefficients[0][-1]), np.full_like(r, coefficients[1][-1])
    for a, b in zip(reversed(coefficients[0][:-1]), reversed(coefficients[1][:-1]), strict=True):
        numerator = numerator * r + a
        denominator = denominator * r + b
    return numerator / denominator


def _log(x: Doubles) -> Doubles:
    """Natural logarithm of positive normal numbers to about 1e-15, by basic operations alone."""
    mantissa, exponent = np.frexp(x)
    low = mantissa < 0.7071067811865476
    mantissa, exponent = np.where(low, mantissa * 2.0, mantissa), np.where(low, exponent - 1, exponent)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    s2, series = s * s, np.zeros_like(s)
    for k in range(25, 0, -2):  # log m = 2 artanh(s), |s| < 0.172
        series = series * s2 + 1.0 / k
    return exponent * 0.6931471805599453 + 2.0 * s * series


def _normal_quantile(p: Doubles) -> Doubles:
    """Of p in 2**-33..1 - 2**-33, which is what :func:`uniforms` draws: AS 241's third branch begins at 1.4e-11. The
    second is computed where it holds, for 15 % of them."""
    q = p - 0.5
    x = q * _rational(0.180625 - q * q, _CENTRE)
    outside = np.abs(q) > 0.425
    r = np.sqrt(-_log(np.minimum(p[outside], 1.0 - p[outside])))
    x[outside] = np.copysign(_rational(r - 1.6, _OUTSIDE), q[outside])
    return x
