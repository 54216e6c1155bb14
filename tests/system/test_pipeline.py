"""The pipeline as a user runs it: `dvc repro` on preset smoke, in copies of this checkout. Minutes, so marked.

One run to the end is shared; a test that changes something works on a copy of it.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from html.parser import HTMLParser

import onnx
import pytest
import yaml
from PIL import Image

from ddops.config.load import compose
from ddops.stages import paths
from helpers import forked
from helpers.pipeline_world import PATIENCE, STAGES, environment, forget, lock_of, run, stages_run
from helpers.tiny import contents

pytestmark = [pytest.mark.pipeline, pytest.mark.xdist_group("pipeline")]


@pytest.fixture
def workspace(finished, tmp_path):
    """A copy of the finished one, to be changed."""
    return shutil.copytree(finished[0], tmp_path / "copy", symlinks=True)


def set_params(workspace, **sections):
    """Update keys of sections of params.yaml."""
    values = yaml.safe_load((workspace / "params.yaml").read_text())
    for section, changes in sections.items():
        values[section].update(changes)
    (workspace / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


def status(workspace):
    """The stages that DVC finds out of date."""
    done = forked.run_module("dvc", "status", "--json", cwd=workspace, env=environment(workspace))
    assert done.returncode == 0, done.stderr
    return sorted(json.loads(done.stdout))


def rows_of(workspace):
    """The rows of the table and of the grids."""
    return ["reconstruction", *yaml.safe_load((workspace / "params.yaml").read_text())["evaluate"]["rows"]]


def test_one_command_leads_from_images_to_an_exported_generator(finished):
    workspace, output = finished
    assert stages_run(output) == STAGES
    model = onnx.load(workspace / paths.ONNX_BUNDLE / "model.onnx")
    assert {entry.key: entry.value for entry in model.metadata_props}["ddops.preset"] == "smoke"
    metrics = json.loads((workspace / paths.METRICS).read_text())
    rows = rows_of(workspace)
    assert {"dd1_1step", "dd2_1step"} < set(rows) <= set(metrics)
    report = (workspace / paths.REPORT).read_text()
    assert f"{metrics['dd1_1step']['fid']:.2f}" in report
    # The grids, that of the data among them; the students' interpolations; DD2's one picture while it trained.
    students = [row for row in rows if row.startswith("dd")]
    assert report.count("data:image/png;base64,") == len(rows) + 1 + len(students) + 1
    assert f"{metrics['dd1_1step']['fid']:.2f}" in (workspace / paths.MODEL_CARD).read_text()
    for row in ("data", *rows):
        assert Image.open(workspace / paths.GRIDS / f"{row}.png").width > 100
    # Progress, with rate, on every stage that takes long.
    for bar in (
        "classifier:",
        "tokenizer:",
        "teacher:",
        "trajectories:",
        "dd1 student:",
        "ar-diffusion:",
        "dd2 generator:",
        "evaluate:",
    ):
        assert re.search(rf"{bar}.*(it|step|sample|file)/s|{bar}.*s/(it|step|sample|file)", output), bar


def test_every_output_and_every_plotted_curve_is_there(finished):
    workspace, _ = finished
    outs = [out["path"] for stage in lock_of(workspace).values() for out in stage["outs"]]
    plots = yaml.safe_load((workspace / "dvc.yaml").read_text())["plots"]
    curves = [file for plot in plots for options in plot.values() for file in options["y"]]
    assert len(outs) > len(STAGES)
    assert not [path for path in (*outs, *curves) if not (workspace / path).exists()]
    assert not list((workspace / paths.STATE).iterdir())


def test_running_again_does_nothing(workspace):
    before = (workspace / "dvc.lock").read_bytes()
    output = run(workspace, "dvc", "repro")
    assert stages_run(output) == []
    assert "Data and pipelines are up to date." in output
    assert (workspace / "dvc.lock").read_bytes() == before


@pytest.mark.parametrize(
    ("section", "change", "expected"),
    [
        ("gate", {"rules": {"mine": {"value": "teacher.fid", "max": 1e9}}}, ["gate"]),
        ("evaluate", {"seeds": [2]}, ["evaluate", "export_onnx", "gate", "sample"]),
        ("trajectories", {"count": 700}, ["gate", "sample", "trajectories"]),
        ("sampling", {"guidance": 1.5}, ["ar_diffusion", "distill_dd2", "gate", "sample", "trajectories"]),
    ],
)
def test_a_parameter_concerns_the_stages_that_read_it(workspace, section, change, expected):
    set_params(workspace, **{section: change})
    assert status(workspace) == expected


def test_a_raised_recipe_runs_its_stage_again_and_changed_code_none(workspace):
    code = workspace / "src/ddops/stages/teacher.py"
    code.write_text(code.read_text() + "# a remark\n")
    assert status(workspace) == []
    recipes = yaml.safe_load((workspace / "recipes.yaml").read_text())
    for place in (workspace, workspace / "src/ddops/workspace/template"):
        (place / "recipes.yaml").write_text(yaml.safe_dump(recipes | {"report": recipes["report"] + 1}))
    assert stages_run(run(workspace, "dvc", "repro")) == ["report"]


def test_a_changed_parameter_runs_again_only_what_depends_on_it(workspace):
    before = lock_of(workspace)
    set_params(workspace, export={"parity_count": 100})
    assert stages_run(run(workspace, "dvc", "repro")) == ["gate", "export_onnx", "report"]
    after = lock_of(workspace)
    assert {name for name in STAGES if after[name] != before[name]} == {"gate", "export_onnx", "report"}
    assert json.loads((workspace / paths.EXPORT_METRICS).read_text())["parity"]["images"] == 100


def test_a_failing_gate_stops_the_pipeline_and_leaves_the_export_untouched(workspace):
    exported = contents(workspace / paths.ONNX_BUNDLE)
    assert exported
    rules = {"no worse than perfect": {"value": "dd1_1step.fid", "relative_to": "teacher.fid", "max": 0.001}}
    set_params(workspace, gate={"rules": rules})
    output = run(workspace, "dvc", "repro", fails=True)
    metrics = json.loads((workspace / paths.METRICS).read_text())
    excess = metrics["dd1_1step"]["fid"] / metrics["teacher"]["fid"] - 0.001
    assert "FAILED  no worse than perfect: dd1_1step.fid / teacher.fid = " in output
    assert f"at most 0.001 (exceeded by {excess:.4g})" in output
    assert "Traceback" not in output
    assert stages_run(output) == ["gate"]
    assert contents(workspace / paths.ONNX_BUNDLE) == exported
    assert json.loads((workspace / paths.GATE_DECISION).read_text())["passed"] is False


class Loaded(HTMLParser):
    """What a browser would fetch for a page."""

    def __init__(self, text):
        super().__init__()
        self.references, self.scripts = [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        self.references += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]


def test_a_run_promotes_what_passed_and_the_next_leaves_it_there(workspace):
    """`ddops run` with a reason: the flow's last task, with the real commands."""
    for name in ("name", "email"):
        run(workspace, "git", "config", f"user.{name}", "ada@example.invalid")
    said = run(workspace, "ddops", "run", "smoke", "--promote", "the first")
    assert f"0 stages ran (none), {len(STAGES)} were up to date; v1.0.0 is in production" in said
    registry = json.loads((workspace / paths.PRODUCTION).read_text())
    assert [(step["version"], step["reason"]) for step in registry["history"]] == [("v1.0.0", "the first")]
    assert registry["history"][0]["by"].startswith("run ")
    assert contents(workspace / "production/v1.0.0").keys() >= contents(workspace / paths.ONNX_BUNDLE).keys()
    assert set(run(workspace, "git", "tag").split()) == {"smoke@v1.0.0", "smoke#production#1"}
    assert run(workspace, "git", "status", "--porcelain") == ""

    # What depends on which model is in production runs again; the weights are the same, so that is all.
    assert stages_run(run(workspace, "dvc", "repro")) == ["gate"]
    said = run(workspace, "ddops", "promote", "--commit", "--if-new", "--by", "another run", "--reason", "again")
    assert "this model is in production already, as v1.0.0" in said
    assert json.loads((workspace / paths.PRODUCTION).read_text()) == registry


def test_metrics_and_plots_show_without_a_network(workspace):
    metrics = json.loads(run(workspace, "dvc", "metrics", "show", "--json"))[""]["data"]
    assert list(metrics) == [str(paths.SUMMARY)], "one file, whose figures fit into a line"
    assert metrics[str(paths.SUMMARY)]["data"]["fid"] > 0
    assert max(map(len, run(workspace, "dvc", "metrics", "show").splitlines())) <= 160
    run(workspace, "dvc", "plots", "show")
    page = (workspace / "dvc_plots" / "index.html").read_text()
    loaded = Loaded(page)
    assert loaded.references == []
    assert loaded.scripts >= 3 + 9
    assert page.count("vegaEmbed('#") == 9
    assert "cdn." not in page
    for name in ("row", "loss", "cross_entropy", "fid_1step", "fid_2step", "reconstruction_error"):
        assert name in page


def test_dvcs_experiments_compose_what_the_command_composes(workspace):
    """`dvc exp run -S preset=...` composes by itself, through DVC's Hydra setting in .dvc/config, and runs on that."""
    overrides = ["preset=smoke", "seed=4", "features.training.steps=20"]
    settings = [argument for override in overrides for argument in ("-S", override)]
    output = run(workspace, "dvc", "exp", "run", *settings, "--single-item", "features")
    assert stages_run(output) == ["features"]
    assert yaml.safe_load((workspace / "params.yaml").read_text()) == compose(workspace / "params", overrides)


def test_killed_while_distilling_it_goes_on_and_ends_with_the_same_hashes(finished, workspace, tmp_path):
    """Without the student and the trainings after it, SIGKILL to everything after its first checkpoint, the command
    again: every hash is that of the run that nobody disturbed, so nothing that follows from them runs again."""
    trainings = ["distill_dd1", "ar_diffusion", "distill_dd2"]
    forget(workspace, trainings)
    checkpoint = workspace / paths.STATE / "dd1.pt"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            ["dvc", "repro"],
            cwd=workspace,
            env=environment(workspace),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        deadline = time.monotonic() + PATIENCE
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert checkpoint.exists(), (tmp_path / "log").read_text()
    assert not (workspace / paths.DD1_STUDENT).exists()

    output = run(workspace, "dvc", "repro")
    assert stages_run(output) == trainings
    assert re.search(r"dd1 student: resuming at step [1-9]\d* of ", output)
    assert lock_of(workspace) == lock_of(finished[0])
    assert (workspace / paths.DD1_STUDENT).read_bytes() == (finished[0] / paths.DD1_STUDENT).read_bytes()
