"""The ten figures that DVC shows: each as computed by hand, and none that was not measured."""

import json
import math

import pytest

from ddops.evaluation.summary import gap_closed, summary

METRICS = {
    "protocol": {"name": "digits"},
    "models": {"teacher": "ab"},
    "teacher": {"fid": 2.0, "recall": 0.9, "accuracy": 0.97, "passes": 16},
    "dd1_1step": {"fid": 3.0, "recall": 0.8, "accuracy": 0.96, "passes": 1},
    "dd1_2step": {"fid": 2.5, "recall": 0.81, "accuracy": 0.98, "passes": 2},
    "dd2_1step": {"fid": 2.25, "recall": 0.85, "accuracy": 0.95, "passes": 1},
    "onestep_star": {"fid": 169.0, "passes": 1},
}


def without(row, **others):
    return {name: values for name, values in METRICS.items() if name != row} | others


def test_the_figures_are_those_of_the_rows_and_of_the_exported_student():
    assert summary(METRICS, "dd2_1step") == {
        "fid": 2.25,
        "fid_teacher": 2.0,
        "fid_dd1_1": 3.0,
        "fid_dd1_2": 2.5,
        "fid_dd2_1": 2.25,
        "fid_ratio": 1.125,
        "gap_closed": 75.0,
        "recall": 0.85,
        "accuracy": 0.95,
        "steps": 1,
        "steps_teacher": 16,
    }


def test_another_exported_student_has_its_own_figures_beside_the_same_rows():
    found = summary(METRICS, "dd1_2step")
    assert (found["fid"], found["fid_ratio"], found["recall"], found["steps"]) == (2.5, 1.25, 0.81, 2)
    assert found["gap_closed"] == 75.0


@pytest.mark.parametrize(
    ("metrics", "missing"),
    [
        (without("teacher"), {"fid_teacher", "fid_ratio", "gap_closed", "steps_teacher"}),
        (without("dd1_1step"), {"fid_dd1_1", "gap_closed"}),
        (without("dd1_2step"), {"fid_dd1_2"}),
        (without("dd2_1step"), {"fid", "fid_dd2_1", "fid_ratio", "gap_closed", "recall", "accuracy", "steps"}),
        (without("", dd2_1step={"fid": 2.25, "passes": 1}), {"recall", "accuracy"}),
        (without("", teacher={"fid": 0.0, "passes": 16}), {"fid_ratio"}),
        (without("", teacher={"fid": math.inf, "passes": 16}), {"fid_teacher", "fid_ratio", "gap_closed"}),
        (without("", dd1_1step={"fid": math.nan}), {"fid_dd1_1", "gap_closed"}),
        ({}, set(summary(METRICS, "dd2_1step"))),
    ],
)
def test_what_was_not_measured_or_is_no_number_is_left_out(metrics, missing):
    found = summary(metrics, "dd2_1step")
    assert set(summary(METRICS, "dd2_1step")) - set(found) == missing
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("teacher", "dd1", "dd2", "closed"),
    [
        (2.0, 3.0, 2.25, 75.0),
        (2.0, 3.0, 1.5, 150.0),
        (2.0, 3.0, 3.5, -50.0),
        (2.0, 2.0, 1.0, None),
        (2.0, 1.5, 1.0, None),
        (0.0, 4.0, 1.0, 75.0),
        (None, 3.0, 2.0, None),
    ],
)
def test_the_gap_is_the_way_from_dd1_to_its_teacher(teacher, dd1, dd2, closed):
    assert gap_closed(teacher, dd1, dd2) == closed
