"""The README says what was measured."""

import json
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.readme import markdown, picture, replaced

ROOT = Path(__file__).parents[2]


def committed(path):
    """As committed: a run on another machine, which changes the metrics here, breaks no test."""
    return subprocess.run(["git", "show", f"HEAD:{path}"], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_the_table_is_that_of_the_committed_metrics():
    """After `dvc repro`: `python benchmarks/readme.py`."""
    metrics, readme = json.loads(committed("reports/metrics.json")), committed("README.md")
    assert readme == replaced(readme, markdown(metrics))


def test_a_table_shows_each_row_with_its_spread():
    teacher = {"fid": 2.0, "fid_spread": 0.25, "recall": 0.5, "recall_spread": 0.125, "accuracy": 0.75}
    figures = {**teacher, "accuracy_spread": 0.0, "runs": 3, "passes": 16}
    text = markdown({"protocol": {}, "teacher": figures, "dd1_1step": {**figures, "fid": 3.0, "passes": 1}})
    assert text.splitlines()[2:] == [
        "| Teacher, ordinary sampling | 16 | 2.00 ± 0.25 | 1.00 | 0.500 ± 0.125 | 75.0% ± 0.0% |",
        "| **DD1 student, 1 step** | 1 | 3.00 ± 0.25 | 1.50 | 0.500 ± 0.125 | 75.0% ± 0.0% |",
    ]


def test_a_readme_without_marks_is_refused():
    with pytest.raises(ValueError, match="table:begin"):
        replaced("nothing here", "| |")


def test_every_grid_is_whole_in_the_picture():
    grids = {colour: Image.new("RGB", (100, 400), colour) for colour in ("red", "blue")}
    drawn = picture(grids)
    assert drawn.getpixel((99, drawn.height - 1)) == (255, 0, 0)
    assert drawn.getpixel((drawn.width - 1, drawn.height - 1)) == (0, 0, 255)
