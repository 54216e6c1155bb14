"""The noise is a pure function of (seed, stream, index): known answers, and independence of the batch."""

import numpy as np
import pytest
import torch
from scipy import stats

from ddops.sampling.noise import Stream, integers, normals, philox_words, uniforms
from ddops.sampling.noise import _normal_quantile as quantile


def indices(*values):
    return np.array(values, dtype=np.int64)


@pytest.mark.parametrize(
    ("seed", "counter", "expected"),
    [
        # Known answers published with Random123 (kat_vectors, philox4x32 10), for the words that our counter reaches.
        (0, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ],
)
def test_philox_gives_the_published_known_answer(seed, counter, expected):
    stream, index = counter
    assert tuple(int(w) for w in philox_words(seed, stream, indices(index), 4)[0]) == expected


def test_philox_uses_every_word_of_its_key_and_counter():
    """The oracle is a scalar transcription of the definition (NumPy ships only the 4x64 variant)."""

    def scalar(counter, key):
        c, k = list(counter), list(key)
        for _ in range(10):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        return c

    # All ones is the second published vector: it pins the scalar oracle itself.
    assert scalar([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    seed, index = 0xA4093822299F31D0, 0x13198A2E03707344
    words = philox_words(seed, 7, indices(index), 12)[0]
    for block in range(3):
        expected = scalar([block, 7, index & 0xFFFFFFFF, index >> 32], [seed & 0xFFFFFFFF, seed >> 32])
        assert [int(w) for w in words[4 * block : 4 * block + 4]] == expected


def test_normals_follow_the_normal_quantile_to_float64_accuracy():
    p = np.concatenate([np.linspace(1e-9, 1 - 1e-9, 100_001), [2.0**-33, 1 - 2.0**-33, 0.075, 0.925]])
    np.testing.assert_allclose(quantile(p), stats.norm.ppf(p), rtol=2e-14, atol=2e-14)


def test_a_sample_does_not_depend_on_its_batch():
    together = normals(3, Stream.TRAJECTORY_NOISE, np.arange(100), (16, 8))
    alone = normals(3, Stream.TRAJECTORY_NOISE, indices(41), (16, 8))
    assert torch.equal(together[41], alone[0])


def test_seeds_streams_and_indices_are_unrelated():
    base = normals(1, Stream.TRAJECTORY_NOISE, np.arange(1000), (64,)).flatten().double()
    others = [
        normals(2, Stream.TRAJECTORY_NOISE, np.arange(1000), (64,)),
        normals(1, Stream.SAMPLE_NOISE, np.arange(1000), (64,)),
        normals(1, Stream.TRAJECTORY_NOISE, np.arange(1000, 2000), (64,)),
    ]
    for other in others:
        correlation = torch.corrcoef(torch.stack([base, other.flatten().double()]))[0, 1]
        assert abs(correlation) < 5 / 64_000**0.5
    # Kolmogorov-Smirnov against N(0, 1); the seed is fixed, so this cannot flicker.
    assert stats.kstest(base.numpy(), "norm").pvalue > 1e-3


def test_pinned_bytes():
    """A change of these numbers is a change of NOISE_VERSION: every data set made before would be foreign."""
    values = normals(0, Stream.TRAJECTORY_NOISE, indices(0, 2**40), (3,))
    assert values.numpy().tobytes().hex() == "50fa82be4fbb963fb753213f543d8a3e8c8c013f1e40b03e"


def test_integers_cover_their_range_and_uniforms_stay_open():
    drawn = integers(5, Stream.LABEL, np.arange(10_000), 1, 10)
    assert stats.chisquare(np.bincount(drawn[:, 0], minlength=10)).pvalue > 1e-3
    u = uniforms(5, Stream.LABEL, np.arange(10_000), 4)
    assert u.min() > 0
    assert u.max() < 1


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match=r"0\.\.2\*\*64-1"):
        uniforms(seed, Stream.LABEL, indices(0), 1)
