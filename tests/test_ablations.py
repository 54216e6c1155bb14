"""The ablations' charts show experiments that have run, each under its own point."""

import json
import re
import sys

import pytest

from tiny import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import ablations


def experiment(name, fid, state=None):
    """As `dvc exp show --json` shows one; ``state`` is that of its place in the queue."""
    metrics = {ablations.METRICS: {"data": {"teacher": {"fid": fid}}}}
    executor = None if state is None else {"state": state, "name": "dvc-task"}
    return {"executor": executor, "name": name, "revs": [{"name": name, "data": {"metrics": metrics}}]}


def test_what_has_not_run_is_left_out():
    """A queued experiment is shown with the figures of the commit it starts from."""
    name = ablations.name_of("guidance_rate", "5")
    for state in ("queued", "running", "failed"):
        assert ablations.collect("guidance_rate", [{"experiments": [experiment(name, 1.0, state)]}]) == {}
    for state in ("success", None):
        shown = [{"experiments": None}, {"experiments": [experiment(name, 2.0, state), experiment("another", 3.0)]}]
        assert ablations.collect("guidance_rate", shown) == {"5": {"teacher": {"fid": 2.0}}}


def test_points_that_were_judged_differently_share_no_chart():
    points = {
        point: {"protocol": {"name": "digits", "asked_for": "8 samples a real image", "drawing_sha256": point}}
        for point in ("1", "2", "5")
    }
    assert ablations.protocol_of(points) == {"name": "digits", "asked_for": "8 samples a real image"}
    points["5"]["protocol"]["asked_for"] = "16 samples a real image"
    with pytest.raises(SystemExit, match="1 and 5 were judged differently, no chart shows both: asked_for"):
        ablations.protocol_of(points)


@pytest.mark.parametrize("grid", ablations.GRIDS)
def test_the_charts_are_those_of_the_recorded_figures(tmp_path, grid):
    record = json.loads((ROOT / ablations.RESULTS / f"ablation_{grid}.json").read_text())
    assert list(record["points"]) == list(ablations.GRIDS[grid].points), "every point is recorded"
    ablations.draw(record, tmp_path / "chart.svg")
    committed = (ROOT / ablations.RESULTS / f"ablation_{grid}.svg").read_text()
    assert drawn(committed) == drawn((tmp_path / "chart.svg").read_text())


def drawn(svg):
    """The lines and points of a chart, whatever version of matplotlib wrote its head."""
    return re.findall(r'<path d="([^"]+)"', svg) + re.findall(r'<use xlink:href="[^"]+" x="([^"]+)" y="([^"]+)"', svg)


@pytest.mark.parametrize("grid", ablations.GRIDS)
def test_points_have_names_of_their_own_that_git_takes(grid):
    names = [ablations.name_of(grid, point) for point in ablations.GRIDS[grid].points]
    assert len(set(names)) == len(names)
    assert all(name.replace("-", "").isalnum() for name in names)
