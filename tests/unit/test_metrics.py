"""The figures: moments and the Fréchet distance against closed forms, KID, precision, recall and the Inception score
against their definitions, and what is too little or too odd to be judged is refused."""

import math

import numpy as np
import pytest
import torch
from scipy import linalg

from ddops.evaluation.errors import MetricError
from ddops.evaluation.images import from_uint8
from ddops.evaluation.judge import DigitsJudge
from ddops.evaluation.metrics import (
    Reference,
    frechet_distance,
    inception_score,
    kernel_distance,
    look,
    measure,
    precision_recall,
)
from ddops.evaluation.moments import Moments, Statistics, read_statistics
from ddops.models.classifier import DigitsClassifier
from helpers.tiny import tiny

FEATURES = 12


def judge_of(seed):
    torch.manual_seed(seed)
    classifier = DigitsClassifier(channels=4, feature_dim=FEATURES, dropout=0.3).eval().requires_grad_(False)
    return DigitsJudge(classifier)


def images(count, seed, low=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)


def normal(count, dim, seed):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def streamed(features_NF, batch):
    moments = Moments(features_NF.shape[1])
    for features_BF in features_NF.split(batch):
        moments.add(features_BF)
    return moments.statistics()


def with_scipy(a, b):
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) with SciPy's matrix root, in float64."""
    root = linalg.sqrtm(a.covariance_FF @ b.covariance_FF).real
    difference = a.mean_F - b.mean_F
    return difference @ difference + np.trace(a.covariance_FF + b.covariance_FF - 2 * root)


# moments


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_streamed_moments_are_those_of_all_at_once(batch):
    """Far from zero too, where the sum of squares minus the square of the sum would have no digits left."""
    features_NF = normal(500, 5, 0) @ normal(5, 5, 1) + 1e6
    found = streamed(features_NF, batch)
    np.testing.assert_allclose(found.mean_F, features_NF.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance_FF, np.cov(features_NF.numpy(), rowvar=False), rtol=1e-6, atol=1e-8)
    assert found.count == 500


def test_float32_features_are_summed_in_float64():
    features_NF = (normal(4000, 3, 0) + 1000).float()
    expected = np.cov(features_NF.double().numpy(), rowvar=False)
    np.testing.assert_allclose(streamed(features_NF, 100).covariance_FF, expected, rtol=1e-10)


# the Fréchet distance


def test_frechet_distance_of_gaussians_that_commute_has_a_closed_form():
    """Diagonal covariances: |m1 - m2|^2 + sum (sqrt(s1) - sqrt(s2))^2."""
    rng = np.random.default_rng(0)
    means, variances = rng.normal(size=(2, 8)), rng.uniform(0.1, 4, size=(2, 8))
    a, b = (Statistics(mean, np.diag(variance)) for mean, variance in zip(means, variances, strict=True))
    expected = ((means[0] - means[1]) ** 2).sum() + ((variances[0] ** 0.5 - variances[1] ** 0.5) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("count", "dim"), [(FEATURES + 1, FEATURES), (300, FEATURES), (400, 200)])
def test_frechet_distance_is_scipys(count, dim):
    """Also with so few samples that the covariance is all but singular."""
    a = streamed(normal(count, dim, 0) @ normal(dim, dim, 1), 64)
    b = streamed(normal(600, dim, 2) @ normal(dim, dim, 3) + 0.5, 64)
    assert frechet_distance(a, b) == pytest.approx(with_scipy(a, b), rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_images_are_judged_by_the_judges_features_in_float64():
    judge = judge_of(0)
    a, b = images(300, 1, low=64), images(600, 2)
    by_hand = [
        Statistics(features.mean(0), np.cov(features, rowvar=False), len(features))
        for features in (judge.classifier.features(from_uint8(x)).double().numpy() for x in (a, b))
    ]
    seen = [look(judge, x.split(128)).statistics for x in (a, b)]
    assert frechet_distance(*seen) == pytest.approx(with_scipy(*by_hand), rel=1e-6)


def test_frechet_distance_of_a_set_to_itself_is_zero_in_any_order_and_batch():
    judge, reference = judge_of(0), images(600, 2)
    shuffled = reference[torch.randperm(600, generator=torch.Generator().manual_seed(0))]
    seen = [look(judge, x).statistics for x in (reference.split(600), shuffled.split(37))]
    assert frechet_distance(*seen) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("count", [2, FEATURES])
def test_too_few_samples_are_refused(count):
    reference = streamed(normal(300, FEATURES, 1), 64)
    with pytest.raises(MetricError, match=rf"samples: .* {FEATURES} samples, got {count}"):
        frechet_distance(streamed(normal(count, FEATURES, 0), 64), reference)


@pytest.mark.parametrize("whose", ["samples", "reference"])
def test_a_singular_covariance_is_refused_and_not_judged(whose):
    """A feature that is constant, or repeats another: torch-fidelity would answer, with a figure or with NaN."""
    good, features_NF = streamed(normal(300, 6, 0), 64), normal(300, 6, 1)
    features_NF[:, 4] = 2.5
    features_NF[:, 5] = features_NF[:, 0] * 3
    singular = streamed(features_NF, 64)
    pair = (singular, good) if whose == "samples" else (good, singular)
    with pytest.raises(MetricError, match=rf"{whose}: .* 6 features .* rank 4"):
        frechet_distance(*pair)


def test_a_curve_has_a_point_where_all_images_are_the_same():
    """Then the distance is |m1 - m2|^2 + tr(S2): what a curve shows of a model that has barely begun."""
    reference, same = streamed(normal(300, 6, 0), 64), streamed(torch.full((100, 6), 2.0), 64)
    expected = ((2.0 - reference.mean_F) ** 2).sum() + reference.covariance_FF.trace()
    assert frechet_distance(same, reference, judged=False) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_no_numbers_are_refused(value):
    features_NF = normal(300, 4, 0)
    features_NF[7, 2] = value
    with pytest.raises(MetricError, match="not finite"):
        frechet_distance(streamed(features_NF, 64), streamed(normal(300, 4, 1), 64))


def test_features_of_another_network_are_refused():
    with pytest.raises(MetricError, match="4 features, the reference 5"):
        frechet_distance(streamed(normal(300, 4, 0), 64), streamed(normal(300, 5, 1), 64))


def test_a_covariance_of_one_sample_is_refused():
    with pytest.raises(MetricError, match="at least 2 samples, got 1"):
        streamed(normal(1, 4, 0), 64)


# the other figures


def test_inception_score_of_certain_and_of_ignorant_answers():
    """K when every class is there as often and certain; 1 when all answers are alike."""
    certain_NK = 100.0 * torch.eye(10).repeat(2000, 1)
    assert inception_score(certain_NK) == pytest.approx(10, rel=0.02)
    assert inception_score(torch.ones(2000, 10)) == pytest.approx(1, abs=1e-9)
    with pytest.raises(MetricError, match="10 splits, got 9"):
        inception_score(torch.ones(9, 10))


def test_kernel_distance_is_its_definition():
    """One subset of everything: the unbiased estimate of eq. 4 of arXiv 1801.01401, written out."""
    x_NF, y_NF = normal(60, 5, 0), normal(60, 5, 1) + 0.3
    xx, yy, xy = ((a @ b.T / 5 + 1) ** 3 for a, b in ((x_NF, x_NF), (y_NF, y_NF), (x_NF, y_NF)))
    off = [(k.sum() - k.diagonal().sum()) / (60 * 59) for k in (xx, yy)]
    expected = float(off[0] + off[1] - 2 * xy.mean())
    assert kernel_distance(x_NF, y_NF, subsets=1, subset_size=60) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(MetricError, match=r"subsets of 61, .* lower evaluate\.kid\.subset_size"):
        kernel_distance(x_NF, y_NF, subsets=1, subset_size=61)


def test_precision_and_recall_are_their_definitions():
    """Samples in one of two real clusters, and some nowhere: the share that is real, and the share of the real."""
    spread = 0.05 * normal(100, 3, 0)
    real_NF = torch.cat([spread, spread + 5])
    samples_NF = torch.cat([0.02 * normal(75, 3, 1), 0.02 * normal(25, 3, 2) + 20])
    precision, recall = precision_recall(samples_NF, real_NF, 3)

    def covered(points, centres):
        radii = torch.cdist(centres, centres).kthvalue(4, dim=1).values
        return float((torch.cdist(points, centres) <= radii).any(1).double().mean())

    assert precision == pytest.approx(covered(samples_NF, real_NF))
    assert recall == pytest.approx(covered(real_NF, samples_NF))
    assert 0.7 <= precision <= 0.75
    assert recall < 0.5


def test_precision_and_recall_tell_near_neighbours_apart_far_from_zero():
    """In float32, cdist loses distances of 1e-3 between points at 1e3."""
    real_NF = (1e-3 * normal(200, 4, 0) + 1e3).float()
    shifted_NF = real_NF + 0.1
    assert precision_recall(shifted_NF, real_NF, 3) == (0.0, 0.0)
    assert precision_recall(real_NF, real_NF, 3) == (1.0, 1.0)


def test_every_figure_has_its_name_and_accuracy_counts_the_classes_asked_for():
    judge, real, samples = judge_of(0), images(300, 2), images(200, 1, low=64)
    settings = tiny("llamagen", "evaluate.kid.subset_size=100").evaluate
    seen = look(judge, real.split(64))
    reference = Reference(seen.statistics, seen.features_NF, "")
    drawn = look(judge, samples.split(64))
    asked = drawn.logits_NK.argmax(1)
    asked[150:] = (asked[150:] + 1) % 10
    figures = measure(drawn, asked, reference, judge, settings)
    assert set(figures) == {"fid", "inception_score", "accuracy", "kid", "precision", "recall"}
    assert figures["accuracy"] == 0.75
    without = measure(drawn, asked, Reference(seen.statistics, None, ""), judge, settings)
    assert set(without) == {"fid", "inception_score", "accuracy"}


# statistics files


STATISTICS = {"m": np.arange(3.0), "s": np.diag([1.0, 2.0, 3.0])}


@pytest.mark.parametrize("keys", [("m", "s"), ("mu", "sigma")])
@pytest.mark.parametrize("suffix", ["npz", "pth", "tensors.pth"])
def test_published_statistics_are_read_under_either_names(tmp_path, keys, suffix):
    values, path = dict(zip(keys, STATISTICS.values(), strict=True)), tmp_path / f"statistics.{suffix}"
    if suffix == "npz":
        np.savez(path, **values, arr_0=np.zeros(3))
    else:
        torch.save({k: torch.from_numpy(v) if "tensors" in suffix else v for k, v in values.items()}, path)
    found = read_statistics(path)
    assert np.array_equal(found.mean_F, STATISTICS["m"])
    assert np.array_equal(found.covariance_FF, STATISTICS["s"])


SCALARS = [np.float64(3.5), np.float32(1), np.int64(7), np.int32(7), np.uint8(1), np.bool_(True), np.str_("fid")]


@pytest.mark.parametrize("beside", SCALARS, ids=lambda value: type(value).__name__)
def test_a_numpy_scalar_beside_the_statistics_is_harmless(tmp_path, beside):
    torch.save({**STATISTICS, "extra": beside, "nested": [{"of": beside}]}, tmp_path / "statistics.pth")
    assert np.array_equal(read_statistics(tmp_path / "statistics.pth").mean_F, STATISTICS["m"])


def test_tensors_of_any_kind_are_numbers(tmp_path):
    values = {key: torch.from_numpy(value).bfloat16().requires_grad_() for key, value in STATISTICS.items()}
    torch.save(values, tmp_path / "statistics.pth")
    assert np.array_equal(read_statistics(tmp_path / "statistics.pth").mean_F, STATISTICS["m"])


class RunsCode:
    def __reduce__(self):
        import os

        return os.mkdir, ("the code ran",)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"m": STATISTICS["m"]}, "holds m; expected mu and sigma, or m and s"),
        ({"m": STATISTICS["m"], "s": np.eye(2)}, r"m is \(3,\) and s \(2, 2\)"),
        ({"m": STATISTICS["m"], "s": np.triu(np.ones((3, 3)))}, "s is not symmetric"),
        ({"m": "3", "s": [["a"]]}, "m and s are not arrays of numbers"),
        ({"m": RunsCode()}, "asks to run code, which is refused"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, monkeypatch, values, message):
    monkeypatch.chdir(tmp_path)
    torch.save(values, "statistics.pth")
    with pytest.raises(MetricError, match=rf"statistics\.pth: .*{message}"):
        read_statistics(tmp_path / "statistics.pth")
    assert not (tmp_path / "the code ran").exists()


@pytest.mark.parametrize("content", [b"", b"\x80", b"PK\x03\x04", b"version https://git-lfs.github.com/spec/v1\n"])
@pytest.mark.parametrize("suffix", ["npz", "pth"])
def test_what_is_no_file_of_statistics_is_named(tmp_path, suffix, content):
    (tmp_path / f"statistics.{suffix}").write_bytes(content)
    with pytest.raises(MetricError, match=rf"statistics\.{suffix}"):
        read_statistics(tmp_path / f"statistics.{suffix}")


def test_what_is_no_file_of_arrays_is_named(tmp_path):
    (tmp_path / "page.npz").write_text("<html>")
    with pytest.raises(MetricError, match=r"page\.npz"):
        read_statistics(tmp_path / "page.npz")
