"""What every stage's command line does beside the stage's work."""

import shutil

import pytest
import yaml

from ddops.stages import common, paths
from ddops.workspace import recipes
from helpers.tiny import ROOT, write_tiny_params


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tiny_params(tmp_path)
    shutil.copy(ROOT / recipes.RECIPES, recipes.RECIPES)
    monkeypatch.setattr(common, "stage_name", lambda stage: "features")


def change(path, key, value):
    values = yaml.safe_load(path.read_text())
    values[key] = value
    path.write_text(yaml.safe_dump(values))


CHANGES = {
    "a section": lambda: change(paths.PARAMS, "seed", 5),
    "the recipe": lambda: change(recipes.RECIPES, "features", 99),
    "params.yaml cut short": lambda: paths.PARAMS.write_text("seed: ["),
    "params.yaml gone": paths.PARAMS.unlink,
    "recipes.yaml gone": recipes.RECIPES.unlink,
}


@pytest.mark.parametrize("what", CHANGES)
def test_settings_that_change_while_a_stage_runs_fail_it(workspace, what, capsys):
    """Else DVC would record the new settings for the old bytes."""

    def stage(seed, features):
        CHANGES[what]()

    with pytest.raises(SystemExit) as ended:
        common.run_stage(stage)
    assert ended.value.code == 1
    assert ("recipes.yaml" if "recipe" in what else "params.yaml") in capsys.readouterr().err


def test_what_the_stage_does_not_read_may_change(workspace):
    def stage(features):
        change(paths.PARAMS, "seed", 5)
        change(recipes.RECIPES, "sample", 99)

    common.run_stage(stage)
