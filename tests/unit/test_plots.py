"""The page of `dvc plots show` has something to see: its headline is FID by row."""

import json
import shutil
import subprocess
import sys

import yaml

from ddops.stages import paths
from helpers.tiny import ROOT

TABLE = "row,fid,fid_spread\nteacher,10.5,0.25\ndd1_1step,9.75,0.5\nonestep_star,169.0,0.0\n"


def dvc(directory, *arguments):
    subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=directory, check=True, capture_output=True)


def test_the_headline_plot_places_every_row_by_its_fid(tmp_path):
    """The template takes its fields by name: were they the wrong way round, the plot would be there and empty."""
    headline = yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"][0]
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"plots": [headline]}))
    table = tmp_path / paths.ROWS_TABLE
    table.parent.mkdir()
    table.write_text(TABLE)
    dvc(tmp_path, "init", "--no-scm", "--quiet")
    shutil.copytree(ROOT / ".dvc/plots", tmp_path / ".dvc/plots")
    dvc(tmp_path, "plots", "show", "--out", "page")
    page = (tmp_path / "page/index.html").read_text()
    start = page.index("var spec = ") + len("var spec = ")
    plot, _ = json.JSONDecoder().raw_decode(page[start:])
    values = plot["data"]["values"]
    assert plot["encoding"]["y"]["field"] == "row"
    assert [(value["row"], float(value["fid"])) for value in values] == [
        ("teacher", 10.5),
        ("dd1_1step", 9.75),
        ("onestep_star", 169.0),
    ]
    assert {step["as"] for step in plot["transform"]} >= {layer["encoding"]["x"]["field"] for layer in plot["layer"]}
    assert plot["transform"][0] == {"calculate": "toNumber(datum['fid'])", "as": "centre"}
    assert "DVC_METRIC" not in json.dumps(plot), "every place of the template is filled in"


def test_a_workspace_that_ddops_makes_has_the_same_template():
    own = ROOT / "src/ddops/workspace/template/dot_dvc/plots/by_row.json"
    assert own.read_bytes() == (ROOT / ".dvc/plots/by_row.json").read_bytes()
