"""`ddops table` on a small workspace: every column, going on after a kill, and no figures of anything else."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch

from ddops.cli import main
from ddops.commands import table
from ddops.config.load import compose, load_config, write_params
from ddops.evaluation.judge import new_classifier, save_classifier
from ddops.files import write_json
from ddops.models.errors import CheckpointError
from ddops.stages import paths
from helpers.few_digits import FEW, few_digits
from helpers.tiny import FAMILIES, PARAMS, write_weights

pytestmark = pytest.mark.xdist_group("table")  # which shares a table

ROWS = ("teacher", "teacher_involved_1_3", "dd1_1step", "skip_4")
COMMAND = ["table", "--rows", ",".join(ROWS), "--timing-batch", "2", "--timing-rounds", "1", "--ppl-samples", "20"]
RESULT, TEXT = paths.METRICS.with_name("table.json"), paths.METRICS.with_name("table.md")


def settings(*overrides):
    judged = ["evaluate.samples_per_image=1", "evaluate.seeds=[1,2]", "evaluate.kid.subset_size=100"]
    smaller = ["ar_diffusion=none", "dd2=none", "export.student=dd1", "evaluate.rows=[teacher,dd1_1step]"]
    write_params(compose(PARAMS, [*FAMILIES["llamagen"], *judged, *smaller, *overrides]), paths.PARAMS)


@pytest.fixture(scope="module", autouse=True)
def few():
    with few_digits():
        yield


@pytest.fixture(scope="module")
def begun(few, tmp_path_factory):
    """A workspace in which no table was made. Not to be changed."""
    directory = tmp_path_factory.mktemp("begun")
    with contextlib.chdir(directory):
        write_weights(directory)
        settings()
        config = load_config(paths.PARAMS).features
        torch.manual_seed(0)
        save_classifier(paths.CLASSIFIER, new_classifier(config).eval(), config)
    return directory


@pytest.fixture(scope="module")
def finished(begun, tmp_path_factory):
    """A workspace with a table, and the rows that were really drawn and judged for it. Not to be changed."""
    directory = shutil.copytree(begun, tmp_path_factory.mktemp("finished") / "workspace")
    with contextlib.chdir(directory), counting() as names:
        assert main(COMMAND) == 0
    return directory, names


@pytest.fixture
def workspace(begun, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(begun, tmp_path / "workspace"))
    return Path()


@pytest.fixture
def with_table(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(finished[0], tmp_path / "workspace"))
    return Path()


@contextlib.contextmanager
def counting():
    """The rows that are really drawn and judged, in order."""
    names, judge = [], table._judge

    def counted(row, *rest):
        figures = judge(row, *rest)
        names.append(row.name)
        return figures

    with mock.patch.object(table, "_judge", counted):
        yield names


@pytest.fixture
def judged():
    with counting() as names:
        yield names


def test_every_row_has_the_papers_columns_and_says_what_it_is_of(finished, with_table):
    result = json.loads(RESULT.read_text())
    assert finished[1] == list(ROWS)
    for name in ROWS:
        row = result["rows"][name]
        assert row.keys() >= {"fid", "inception_score", "precision", "recall", "parameters", "passes", "seconds"}
        assert (row["samples"], row["runs"]) == (FEW, 2)
        assert row["seconds_range"][0] <= row["seconds"] <= row["seconds_range"][1]
        assert ("ppl" in row) == (name == "dd1_1step")
        assert row["commit"] == result["provenance"]["Git commit"]
    assert result["rows"]["teacher"]["fid_spread"] > 0
    assert result["protocol"].keys() >= {"name", "reference_sha256", "seeds", "asked_for", "drawing_sha256", "versions"}
    assert result["ppl"] == {"samples": 20, "epsilon": 0.01}
    text = TEXT.read_text()
    for heading in ("fid", "inception_score", "precision", "recall", "parameters", "passes", "ms an image", "speed-up"):
        assert f" {heading} |" in text.splitlines()[0]
    assert len([line for line in text.splitlines() if line.startswith("- ")]) == len(ROWS) - 1, "a claim a pair"


@pytest.mark.slow
def test_a_table_that_was_ended_half_way_goes_on_and_reads_the_same(with_table, judged, monkeypatch):
    whole = json.loads(RESULT.read_text())["rows"]
    RESULT.unlink()

    def ended(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(table, "_path_lengths", lambda row, *_: ended() if row.name == "dd1_1step" else {})
        with pytest.raises(KeyboardInterrupt):
            main(COMMAND)
    assert list(json.loads(RESULT.read_text())["rows"]) == list(ROWS[:2])
    judged.clear()
    assert main(COMMAND) == 0
    assert judged == list(ROWS[2:])
    again = json.loads(RESULT.read_text())["rows"]
    timeless = [
        {name: {key: row[key] for key in row if not key.startswith("seconds")} for name, row in rows.items()}
        for rows in (whole, again)
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize(
    ("change", "names"),
    [
        pytest.param(lambda: settings("sampling.guidance=3.0"), "protocol", marks=pytest.mark.slow),
        (lambda: settings("evaluate.seeds=[1]"), "protocol"),
        pytest.param(lambda: COMMAND.__setitem__(-1, "10"), "ppl", marks=pytest.mark.slow),
    ],
    ids=["sampling", "seeds", "paths"],
)
def test_figures_of_other_settings_do_not_stay_in_the_table(with_table, judged, capsys, monkeypatch, change, names):
    monkeypatch.setattr(f"{__name__}.COMMAND", [*COMMAND])
    change()
    assert main(COMMAND) == 0
    assert f"table.json: is of other {names}: begun anew" in capsys.readouterr().err
    assert judged == list(ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("same", [True, False])
def test_what_the_pipeline_judged_by_this_protocol_is_taken_over(with_table, judged, same):
    result = json.loads(RESULT.read_text())
    RESULT.unlink()
    protocol = result["protocol"] | ({} if same else {"asked_for": "9 samples a real image"})
    figures = result["rows"]["teacher"] | {"fid": 123.0}
    row = {name: value for name, value in figures.items() if isinstance(value, int | float)}
    write_json(paths.METRICS, {"protocol": protocol, "models": result["models"], "teacher": row})
    assert main(COMMAND) == 0
    assert ("teacher" in judged) != same
    assert (json.loads(RESULT.read_text())["rows"]["teacher"]["fid"] == 123.0) == same


def test_times_of_two_runs_do_not_stand_in_one_table(with_table, judged):
    assert main([*COMMAND[:2], "teacher", *COMMAND[3:]]) == 0
    rows = json.loads(RESULT.read_text())["rows"]
    assert [name for name, row in rows.items() if "seconds" in row] == ["teacher"]


def test_the_clock_does_not_see_noise_being_made(workspace, judged, monkeypatch):
    """Of a student, which needs nothing else; the noise is made before."""
    drawn = []
    generator = type("Row", (), {"draw": None, "generator": staticmethod(lambda noise, labels: drawn.append(noise))})
    models = type("Models", (), {"device": torch.device("cpu")})
    models.teacher = type("Teacher", (), {"num_conditions": 2, "codebook_VC": torch.zeros(5, 3)})
    models.teacher.layout = type("Layout", (), {"length": 7})
    draw = table._prepared(generator, models, 4, 0)
    monkeypatch.setattr("ddops.evaluation.drawing.sample_noise", lambda *_: 1 / 0)
    draw()
    assert drawn[0].shape == (4, 7, 3)


@pytest.mark.slow
def test_without_the_network_of_the_path_length_nothing_is_begun(workspace, judged, capsys, monkeypatch):
    def away(*_):
        raise CheckpointError("LPIPS needs VGG-16")

    monkeypatch.setattr(table, "_distance", away)
    assert main(COMMAND) == 1
    assert "LPIPS needs VGG-16" in capsys.readouterr().err
    assert judged == []
    assert main([*COMMAND[:-1], "0"]) == 0, "0 paths need none"
    assert "ppl" not in json.loads(RESULT.read_text())["rows"]["dd1_1step"]


def test_a_damaged_table_is_named(workspace, capsys):
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text('{"rows": ')
    assert main(COMMAND) == 1
    assert "table.json: damaged" in capsys.readouterr().err


def test_without_models_it_is_said_what_to_run(workspace, capsys):
    paths.DD1_STUDENT.unlink()
    assert main(COMMAND) == 1
    assert "dvc repro evaluate" in capsys.readouterr().err
