"""The ablations' charts show experiments that have run, each under its own point."""

import itertools
import json
import re
import sys
import time
from datetime import UTC, datetime

import pytest
import yaml

from ddops.config.load import compose
from helpers import tiny_pipeline
from helpers.tiny import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import ablations


def experiment(name, fid, state=None, day=1):
    """As `dvc exp show --json` shows one; ``state`` is that of its place in the queue."""
    data = {
        "timestamp": f"2026-11-{day:02}T10:00:00",
        "params": {ablations.PARAMS: {"data": {"seed": 0, "dd1": {"training": {"steps": 750}}}}},
    }
    executor = None if state is None else {"state": state, "name": "dvc-task"}
    return {"executor": executor, "name": name, "revs": [{"name": name, "rev": str(fid), "data": data}]}


def metrics_of(revision):
    """What a commit of those experiments holds: its name is its teacher's FID."""
    return {"teacher": {"fid": float(revision)}}


def points_of(settings=(), metrics=()):
    """An experiment a point, by what is theirs alone."""
    at = datetime(2026, 11, 1, tzinfo=UTC)
    settings, metrics = dict(settings), dict(metrics)
    return {
        point: ablations.Experiment(at, settings.get(point, {}), metrics.get(point, {}))
        for point in {**settings, **metrics}
    }


def test_what_has_not_run_is_left_out():
    """A queued experiment is shown with the figures of the commit it starts from."""
    name = ablations.name_of("guidance_rate", "5")
    for state in ("queued", "running", "failed"):
        assert ablations.collect("guidance_rate", [{"experiments": [experiment(name, 1.0, state)]}], metrics_of) == {}
    for state in ("success", None):
        shown = [{"experiments": None}, {"experiments": [experiment(name, 2.0, state), experiment("another", 3.0)]}]
        (found,) = ablations.collect("guidance_rate", shown, metrics_of).items()
        assert found[0] == "5"
        assert found[1].metrics == {"teacher": {"fid": 2.0}}
        assert found[1].settings == {"seed": 0, "dd1.training.steps": 750}


def test_of_several_commits_experiments_of_a_name_the_newest_counts():
    name = ablations.name_of("guidance_rate", "5")
    commits = [{"experiments": [experiment(name, fid, day=day)]} for day, fid in ((7, 1.0), (12, 2.0), (3, 3.0))]
    for shown in itertools.permutations(commits):
        newest = ablations.collect("guidance_rate", list(shown), metrics_of)["5"]
        assert newest.metrics == {"teacher": {"fid": 2.0}}


def test_points_that_were_judged_differently_share_no_chart():
    metrics = {
        point: {"protocol": {"name": "digits", "asked_for": "8 samples a real image", "drawing_sha256": point}}
        for point in ("1", "2", "5")
    }
    points = points_of(metrics=metrics)
    assert ablations.protocol_of(points) == {"name": "digits", "asked_for": "8 samples a real image"}
    metrics["5"]["protocol"]["asked_for"] = "16 samples a real image"
    with pytest.raises(SystemExit, match=r"1 and 5 .*: asked_for"):
        ablations.protocol_of(points)


def composed(*overrides):
    return dict(ablations.dotted(compose(ROOT / "params", [*ablations.NO_GATE, *overrides])))


@pytest.mark.parametrize("grid", ablations.GRIDS)
def test_points_differ_in_what_their_grid_varies_and_in_nothing_else(grid):
    """What is queued passes: no setting follows from those that a grid varies."""
    points = points_of({point: composed(*own) for point, own in ablations.GRIDS[grid].points.items()})
    shared = ablations.settings_of(grid, points)
    assert shared["seed"] == 0
    assert shared["dd1.training.steps"] == composed()["dd1.training.steps"]
    assert set(composed()) - set(shared) == ablations.GRIDS[grid].varied | {
        name for name in composed() if name.startswith("gate.")
    }


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"dd1.training.steps": 1500}, "dd1.training.steps"),
        ({"seed": 1, "trajectories.count": 2000}, "seed, trajectories.count"),
        ({"dd1.new": None}, "dd1.new"),
    ],
)
def test_points_of_other_settings_share_no_chart(own, said):
    shared = {"seed": 0, "trajectories.count": 32000, "dd1.training.steps": 750}
    settings = {
        point: {**shared, "dd2.guidance.updates": int(point), "gate.rules.fid.max": float(point)}
        for point in ("1", "2", "5")
    }
    assert ablations.settings_of("guidance_rate", points_of(settings)) == shared
    settings["5"] |= own
    with pytest.raises(SystemExit, match=f"1 and 5 .*: {said}$"):
        ablations.settings_of("guidance_rate", points_of(settings))


EVALUATE = """
import json, pathlib, yaml
settings = yaml.safe_load(pathlib.Path("params.yaml").read_text())
row = {"fid": settings["dd2"]["guidance"]["updates"] + settings["steps"], "fid_spread": 0.0}
pathlib.Path("reports").mkdir(exist_ok=True)
metrics = {"protocol": {"name": "digits"}, "models": {"dd2": "0" * 64}, "teacher": row}
pathlib.Path("reports/metrics.json").write_text(json.dumps(metrics))
"""


@pytest.mark.slow
def test_what_dvc_recorded_under_two_commits_is_plotted_once_and_only_with_its_like(tmp_path, monkeypatch):
    """By DVC itself, in a project whose evaluation only adds."""
    workspace = tmp_path / "work"
    (workspace / "benchmarks/results").mkdir(parents=True)
    tiny_pipeline.git(workspace, "init", "--quiet")
    tiny_pipeline.python(workspace, "-m", "dvc", "init", "--quiet")
    (workspace / "evaluate.py").write_text(EVALUATE)
    stage = {"cmd": "python evaluate.py", "params": ["dd2", "steps"], "deps": ["evaluate.py"]}
    stage["outs"] = [{str(ablations.METRICS): {"cache": False}}]
    (workspace / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"evaluate": stage}}))

    def run(steps, *points):
        (workspace / "params.yaml").write_text(yaml.safe_dump({"dd2": {"guidance": {"updates": 0}}, "steps": steps}))
        tiny_pipeline.git(workspace, "add", "--all")
        tiny_pipeline.git(workspace, "commit", "--quiet", "--allow-empty", "--message", f"{steps} steps")
        time.sleep(1)  # Git's clock shows whole seconds
        for point in points:
            name, (own,) = ablations.name_of("guidance_rate", point), ablations.GRIDS["guidance_rate"].points[point]
            tiny_pipeline.python(workspace, "-m", "dvc", "exp", "run", "--quiet", "--name", name, "--set-param", own)
        tiny_pipeline.git(workspace, "restore", ".")

    monkeypatch.chdir(workspace)
    run(100, "1", "2")
    run(200, "1")
    with pytest.raises(SystemExit, match=r"1 and 2 .*: steps"):
        ablations.plot("guidance_rate", [])
    assert not list((workspace / ablations.RESULTS).iterdir())
    run(200, "2")
    ablations.plot("guidance_rate", [])
    record = json.loads((workspace / ablations.RESULTS / "ablation_guidance_rate.json").read_text())
    assert {point: rows["teacher"]["fid"] for point, rows in record["points"].items()} == {"1": 201, "2": 202}
    assert record["settings"] == {"steps": 200}


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
