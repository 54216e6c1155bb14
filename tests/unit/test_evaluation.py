"""The judge on disk, quantisation, grids, and the gate's verdicts."""

import math

import numpy as np
import pytest
import torch

from ddops.config.evaluation import GateRule
from ddops.evaluation.gate import decide
from ddops.evaluation.images import from_uint8, grid, save_png, to_uint8
from ddops.evaluation.judge import load_classifier, new_classifier, save_classifier
from ddops.models.errors import CheckpointError
from helpers.tiny import tiny


def images(count, seed, low=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)


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
    with pytest.raises(CheckpointError, match=r"judge: .* stage features"):
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
    (only,) = decide(METRICS, {"mine": GateRule(**rule)}, row="student")
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
