"""The ruler: the Fréchet distance against its closed form, quantisation, grids, and the gate's verdicts."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import linalg

from ddops.config.stages import GateConfig, GateRule
from ddops.evaluation.fid import MetricError, class_accuracy, make_fid
from ddops.evaluation.gate import decide, decision
from ddops.evaluation.images import from_uint8, grid, save_png, to_uint8
from ddops.evaluation.judge import load_classifier, new_classifier, save_classifier
from ddops.models.classifier import DigitsClassifier
from ddops.models.errors import CheckpointError
from tiny import tiny

FEATURES = 12


def classifier_of(seed):
    torch.manual_seed(seed)
    return DigitsClassifier(channels=4, feature_dim=FEATURES, dropout=0.3).eval().requires_grad_(False)


def images(count, seed, low=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)


def closed_form(classifier, a, b):
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of the same features, in float64 with SciPy's matrix root."""
    (mean_a, cov_a), (mean_b, cov_b) = (
        (features.mean(0), np.cov(features, rowvar=False))
        for features in (classifier.features(from_uint8(x)).double().numpy() for x in (a, b))
    )
    root = linalg.sqrtm(cov_a @ cov_b).real
    return ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)


# the Fréchet distance


@pytest.mark.parametrize("count", [FEATURES + 1, 300, 700])
def test_fid_is_the_closed_form_for_gaussians(count):
    """Also for few samples, whose covariance is all but singular, and for more than one batch of 512."""
    classifier, samples, reference = classifier_of(0), images(count, 1, low=64), images(600, 2)
    expected = closed_form(classifier, samples, reference)
    # In float32 the statistics alone would be off by several 1e-6.
    assert make_fid(classifier, reference)(samples) == pytest.approx(expected, rel=1e-6)
    assert expected > 1e-4


def test_fid_of_a_set_to_itself_is_zero_in_any_order():
    classifier, reference = classifier_of(0), images(600, 2)
    shuffled = reference[torch.randperm(600, generator=torch.Generator().manual_seed(0))]
    assert make_fid(classifier, reference)(shuffled) == pytest.approx(0, abs=1e-6)


def test_fid_does_not_depend_on_how_samples_fall_into_batches():
    fid, samples = make_fid(classifier_of(0), images(300, 2)), images(1100, 1, low=64)
    moved = torch.cat([samples[700:], samples[:700]])
    assert fid(moved) == pytest.approx(fid(samples), rel=1e-5)


def test_each_ruler_keeps_its_own_classifier_and_reference():
    """torch-fidelity knows extractors by name; a second ruler must not bend the first, nor a cache answer for it."""
    samples, references = images(200, 1, low=64), [images(300, 2), images(300, 3, low=32)]
    classifiers = [classifier_of(0), classifier_of(1)]
    rulers = [make_fid(*pair) for pair in zip(classifiers, references, strict=True)]
    measured = [fid(samples) for fid in (*rulers, rulers[0])]
    expected = [closed_form(*pair, samples) for pair in zip(classifiers, references, strict=True)]
    assert measured == pytest.approx([*expected, expected[0]], rel=1e-4)


@pytest.mark.parametrize("count", [2, FEATURES])
def test_too_few_samples_are_refused(count):
    with pytest.raises(MetricError, match=rf"needs more than {FEATURES} samples, got {count}"):
        make_fid(classifier_of(0), images(300, 2))(images(count, 1))


def test_class_accuracy_counts_the_classes_that_were_asked_for():
    classifier, samples = classifier_of(0), images(2100, 1)
    answers = classifier(from_uint8(samples)).argmax(1)
    assert class_accuracy(classifier, samples, answers) == 1.0
    asked = answers.clone()
    asked[2060:] = (asked[2060:] + 1) % 10
    assert class_accuracy(classifier, samples, asked) == pytest.approx(2060 / 2100)


# the judge on disk


def test_the_judge_comes_back_as_it_was_saved(tmp_path):
    config = tiny().features
    torch.manual_seed(0)
    classifier = new_classifier(config).eval()
    save_classifier(tmp_path / "judge", classifier, config)
    loaded = load_classifier(tmp_path / "judge")
    x = from_uint8(images(5, 1))
    assert torch.equal(loaded(x), classifier(x))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_damaged_judge_is_named(tmp_path):
    (tmp_path / "judge").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match=r"judge: not a digits classifier .*; run the stage features again"):
        load_classifier(tmp_path / "judge")


# images


def test_quantisation_rounds_to_the_nearest_level_and_clamps():
    x = torch.tensor([-5.0, -1.0, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 0.999, 1.0, 7.0])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 255, 255, 255]


def test_quantisation_and_back_is_exact_on_levels_and_near_elsewhere():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)
    x = torch.linspace(-1, 1, 10_001)
    assert (from_uint8(to_uint8(x)) - x).abs().max() <= 0.5 / 127.5 + 1e-6


def test_grid_places_images_row_by_row_with_a_white_margin():
    pictures = torch.stack([torch.full((1, 2, 3), value, dtype=torch.uint8) for value in range(5)])
    canvas = np.array(grid(pictures, columns=3))
    assert canvas.shape == (2 * (2 + 1) + 1, 3 * (3 + 1) + 1)
    for index in range(5):
        top, left = 1 + 3 * (index // 3), 1 + 4 * (index % 3)
        assert (canvas[top : top + 2, left : left + 3] == index).all()
        canvas[top : top + 2, left : left + 3] = 255
    assert (canvas == 255).all()


def test_grid_enlarges_every_pixel_alike_and_keeps_colours():
    pictures = torch.randint(256, (4, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    small, large = (np.asarray(grid(pictures, columns=2, scale=scale)) for scale in (1, 4))
    assert np.array_equal(large, small.repeat(4, axis=0).repeat(4, axis=1))
    assert np.array_equal(small[1:3, 1:3], pictures[0].permute(1, 2, 0).numpy())


def test_a_png_has_the_same_bytes_each_time(tmp_path):
    picture = grid(images(4, 0), columns=2)
    for name in ("a.png", "b.png"):
        save_png(picture, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# the gate


METRICS = {
    "protocol": {"name": "digits"},
    "student": {"fid": 9.0, "accuracy": 0.8, "samples": True},
    "teacher": {"fid": 4.0, "nan": math.nan, "inf": math.inf, "zero": 0.0, "words": "4.0"},
}


def verdict(**rule):
    (only,) = decide(METRICS, GateConfig(rules={"mine": GateRule(**rule)}))
    return only


@pytest.mark.parametrize(
    ("rule", "passed", "sentence"),
    [
        ({"value": "student.fid", "max": 9.0}, True, "passed  mine: student.fid = 9, at most 9"),
        ({"value": "student.fid", "max": 8.5}, False, "FAILED  mine: student.fid = 9, at most 8.5 (exceeded by 0.5)"),
        ({"value": "student.accuracy", "min": 0.8}, True, "passed  mine: student.accuracy = 0.8, at least 0.8"),
        (
            {"value": "student.accuracy", "min": 0.95},
            False,
            "FAILED  mine: student.accuracy = 0.8, at least 0.95 (short by 0.15)",
        ),
        (
            {"value": "student.fid", "relative_to": "teacher.fid", "max": 2.0},
            False,
            "FAILED  mine: student.fid / teacher.fid = 2.25, at most 2 (exceeded by 0.25)",
        ),
        (
            {"value": "student.fid", "relative_to": "teacher.fid", "min": 2.0, "max": 2.5},
            True,
            "passed  mine: student.fid / teacher.fid = 2.25, at most 2.5 and at least 2",
        ),
        (
            {"value": "student.fid", "min": 10.0, "max": 20.0},
            False,
            "FAILED  mine: student.fid = 9, at most 20 and at least 10 (short by 1)",
        ),
    ],
)
def test_a_verdict_says_which_rule_and_by_how_much(rule, passed, sentence):
    given = verdict(**rule)
    assert given.passed is passed
    assert given.sentence() == sentence


@pytest.mark.parametrize(
    "rule",
    [
        {"value": "student.kid"},
        {"value": "nobody.fid"},
        {"value": "student.fid.mean"},
        {"value": "student"},
        {"value": "student.samples"},
        {"value": "teacher.nan"},
        {"value": "teacher.inf"},
        {"value": "teacher.words"},
        {"value": "student.fid", "relative_to": "teacher.zero"},
        {"value": "student.fid", "relative_to": "teacher.nan"},
        {"value": "student.fid", "relative_to": "teacher.missing"},
    ],
    ids=lambda rule: "/".join(rule.values()),
)
@pytest.mark.parametrize("bound", [{"max": 1e9}, {"min": -1e9}])
def test_what_is_missing_or_no_number_fails_under_any_bound(rule, bound):
    given = verdict(**rule, **bound)
    assert given.passed is False
    assert given.value is None
    assert "missing or not a number" in given.sentence()


def test_one_failed_rule_fails_the_model_and_the_file_holds_every_verdict():
    rules = {"good": GateRule(value="teacher.fid", max=5.0), "bad": GateRule(value="teacher.nan", max=5.0)}
    decided = decision(decide(METRICS, GateConfig(rules=rules)))
    assert decided["passed"] is False
    assert [(rule["rule"], rule["passed"]) for rule in decided["rules"]] == [("good", True), ("bad", False)]
    json.dumps(decided, allow_nan=False)
    assert decision(decide(METRICS, GateConfig(rules={"good": rules["good"]})))["passed"] is True
