"""Recipes: a stage runs where the workspace asks for what this ddops computes, and goes on with nothing of another."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import ddops
from ddops.captions.encode import PromptSet, encode_set
from ddops.cli import main
from ddops.commands import workspace as workspaces
from ddops.commands.arguments import load_preset
from ddops.commands.fetch import CONVERTED_BY, conversion
from ddops.config.captions import EncodedCaptionsConfig
from ddops.config.load import write_params
from ddops.evaluation.gate import comparable, recipes_of_figures
from ddops.files import write_json
from ddops.stages import common, paths
from ddops.stages.checkpoints import checkpoint_file
from ddops.stages.common import StageError, require_own_code
from ddops.training.checkpoint import CheckpointFile
from ddops.trajectories.generate import Job, generate
from ddops.trajectories.shards import DatasetError, SettingsDiffer, read_shard
from ddops.trajectories.verify import problems
from ddops.workspace.files import TEMPLATE
from ddops.workspace.recipes import RECIPES, RecipeError, known_recipes, read_recipes, recipe, require_recipe
from helpers.tiny import PARAMS, tiny, untrained, write_tiny_params

ROOT = Path(__file__).parents[2]
STAGES = list(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])


def write(path, **changes):
    """This ddops' recipes with changes; None leaves one out."""
    values = {stage: value for stage, value in {**known_recipes(), **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(values))
    return path


def test_every_stage_has_a_recipe_and_the_clone_has_those_of_its_code():
    assert list(known_recipes()) == STAGES
    assert (ROOT / RECIPES).read_bytes() == (TEMPLATE / RECIPES).read_bytes()
    assert read_recipes(ROOT / RECIPES) == known_recipes()
    for stage in STAGES:
        require_recipe(stage, ROOT / RECIPES)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"teacher": None}, ("has no recipe for teacher", "ddops migrate")),
        ({"techer": 1}, ("techer", "no stage of this ddops", "update ddops")),
        ({"teacher": "1"}, ("teacher", "whole number", "'1'")),
        ({"teacher": True}, ("teacher", "whole number", "True")),
        ({"teacher": 0}, ("teacher", "whole number", "0")),
        ({"teacher": 1.5}, ("teacher", "whole number", "1.5")),
        ({"teacher": 99}, ("teacher is 99", "newer ddops", "update ddops", "git checkout")),
    ],
)
def test_a_recipe_that_cannot_be_is_named_with_the_way_out(tmp_path, changes, named):
    with pytest.raises(RecipeError) as error:
        require_recipe("teacher", write(tmp_path / RECIPES, **changes))
    assert all(words in str(error.value) for words in (str(tmp_path / RECIPES), *named))


@pytest.mark.parametrize(
    ("content", "named"), [(None, "ddops migrate"), ("[1, 2]", "list"), ("", "NoneType"), ("a: [", "YAML")]
)
def test_a_file_without_recipes_is_named_with_the_way_out(tmp_path, content, named):
    if content is not None:
        (tmp_path / RECIPES).write_text(content)
    with pytest.raises(RecipeError, match=named) as error:
        require_recipe("teacher", tmp_path / RECIPES)
    assert str(tmp_path / RECIPES) in str(error.value)
    assert "ddops migrate" in str(error.value)


def test_an_older_workspace_is_told_to_migrate_for_the_raised_stage_alone(tmp_path, raised):
    file = write(tmp_path / RECIPES)
    now = recipe("teacher")
    raised("teacher")
    with pytest.raises(RecipeError) as error:
        require_recipe("teacher", file)
    said = str(error.value)
    assert all(words in said for words in (f"teacher is {now}", f"recipe {now + 1}", "ddops migrate", "dvc repro"))
    require_recipe("features", file)


# Commands


def run_stage_in(workspace, stage="report"):
    command = [sys.executable, "-m", f"ddops.stages.{stage}"]
    return subprocess.run(command, cwd=workspace, capture_output=True, text=True, check=False)


def test_a_stage_refuses_before_anything_else(tmp_path):
    """An old workspace's parameters may be unreadable too: its recipes say so first."""
    result = run_stage_in(tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("\nreport: recipes.yaml: missing")
    assert "Traceback" not in result.stderr


def test_a_checkout_runs_its_own_code_alone(tmp_path, monkeypatch):
    """Else a queued experiment records the queued code and runs what the editable install holds by then."""
    monkeypatch.chdir(tmp_path)
    require_own_code("teacher")
    own = tmp_path / "src" / "ddops"
    own.mkdir(parents=True)
    (own / "__init__.py").write_text("")
    with pytest.raises(StageError) as error:
        require_own_code("teacher")
    assert all(words in str(error.value) for words in ("sh stage.sh teacher", str(Path(ddops.__file__).parent)))
    monkeypatch.setattr(ddops, "__file__", str(own / "__init__.py"))
    require_own_code("teacher")


def test_a_checkout_reached_by_a_link_is_itself(tmp_path, monkeypatch):
    (tmp_path / "src").symlink_to(Path(ddops.__file__).parents[1])
    monkeypatch.chdir(tmp_path)
    require_own_code("teacher")


def test_the_stage_asks_for_its_own_code(tmp_path):
    write_tiny_params(tmp_path)
    (tmp_path / common.OWN_CODE).parent.mkdir(parents=True)
    (tmp_path / common.OWN_CODE).write_text("")
    result = run_stage_in(tmp_path)
    assert result.returncode == 1
    assert "sh stage.sh report" in result.stderr


@pytest.mark.parametrize("command", [("run", "smoke"), ("promote", "--reason", "why"), ("trajectories", "missing")])
def test_commands_refuse_a_workspace_of_another_ddops(tmp_path, monkeypatch, capsys, raised, command):
    """In the middle of a run, or once something was overwritten, would be too late."""
    monkeypatch.chdir(tmp_path)
    write_tiny_params(tmp_path)
    (tmp_path / "dvc.yaml").write_text("stages: {}")
    for path in (paths.TOKENIZER, paths.TRANSFORMER):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("weights")
    monkeypatch.setattr("ddops.commands.promote.require_tools", lambda: None)
    monkeypatch.setattr("ddops.commands.promote.user", lambda: "Ada")
    raised("trajectories")
    assert main(command) == 1
    assert "recipes.yaml: trajectories is 1" in capsys.readouterr().err


# Nothing goes on with what another recipe began


def test_a_checkpoint_of_another_recipe_is_not_resumed(tmp_path, monkeypatch, raised):
    monkeypatch.chdir(tmp_path)
    checkpoint_file("distill_dd1", "dd1", [1]).save({"step": 3})

    def resumed():
        return checkpoint_file("distill_dd1", "dd1", [1]).load(["step"], range(5))

    assert resumed() == {"step": 3}
    raised("teacher")
    assert resumed() == {"step": 3}, "another stage's recipe"
    raised("distill_dd1")
    assert resumed() is None


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        *(("features", "classifier"), ("teacher", "tokenizer"), ("teacher", "transformer")),
        *(("distill_dd1", "dd1"), ("ar_diffusion", "ar_diffusion"), ("distill_dd2", "dd2")),
    ],
)
def test_every_training_states_the_stage_that_it_is_of(stage, name):
    source = Path(ddops.__file__).parent.joinpath("stages", f"{stage}.py").read_text()
    assert f'checkpoint_file("{stage}", "{name}"' in source.replace("(\n        ", "(").replace(",\n        ", ", ")


def test_checkpoints_are_made_here_alone():
    """Else one could be matched by its settings without the recipe."""
    package = Path(ddops.__file__).parent
    makers = {str(file.relative_to(package)) for file in package.rglob("*.py") if "CheckpointFile(" in file.read_text()}
    assert makers == {"stages/checkpoints.py"}
    assert CheckpointFile(Path("a"), "b").fingerprint == "b"


def job(directory):
    config = tiny("llamagen", "trajectories.count=6", "trajectories.shard_size=3", "trajectories.batch_size=3")
    return Job(lambda _: untrained("llamagen")[0], "teacher", config.trajectories, config.sampling, 1, directory)


def test_shards_of_another_recipe_are_made_again(tmp_path, raised):
    generate(job(tmp_path))
    first = tmp_path / "shard-00000.safetensors"
    assert read_shard(first).settings["recipe"] == recipe("trajectories") == 1
    assert generate(job(tmp_path), replace=True)["samples"] == 0
    raised("trajectories")
    with pytest.raises(SettingsDiffer, match="recipe 1, now 2"):
        generate(job(tmp_path))
    assert generate(job(tmp_path), replace=True)["samples"] == 6
    assert read_shard(first).settings["recipe"] == 2
    assert json.loads((tmp_path / "manifest.json").read_text())["settings"]["recipe"] == 2


def test_verify_names_a_data_set_of_another_recipe(tmp_path, raised):
    generate(job(tmp_path))
    assert not list(problems(tmp_path, 10, 64))
    raised("trajectories")
    (found,) = problems(tmp_path, 10, 64)
    assert "made by recipe 1, this version computes by 2" in found


def test_a_worker_of_another_ddops_makes_no_shard(tmp_path, raised):
    asked = job(tmp_path)
    raised("trajectories")
    with pytest.raises(DatasetError, match="every machine have the same ddops"):
        generate(asked, replace=True)


def test_captions_of_another_recipe_are_encoded_again(tmp_path, raised):
    config = tiny("llamagen", "preset=digits_t2i").captions
    assert isinstance(config, EncodedCaptionsConfig)

    def encode(texts):
        return [torch.ones(2, 4) for _ in texts]

    prompts = PromptSet(["one", "two", "three"])
    assert encode_set(tmp_path, prompts, encode, config, {}) == 3
    assert encode_set(tmp_path, prompts, encode, config, {}) == 0
    raised("captions")
    assert encode_set(tmp_path, prompts, encode, config, {}) == 3


def test_figures_of_another_recipe_do_not_compare(raised):
    before = {"recipes": recipes_of_figures()}
    assert comparable(before, {"recipes": recipes_of_figures()}) == []
    assert comparable(before, {}) == [], "of before there were recipes, vouched for since"
    raised("evaluate")
    assert comparable(before, {"recipes": recipes_of_figures()}) == ["recipes"]


def test_published_weights_are_converted_again_by_another_recipe(tmp_path, monkeypatch, raised):
    """What `ddops fetch` left is taken up by its settings, so it must say who converted it too."""
    monkeypatch.chdir(tmp_path)
    directory, made = workspaces.FETCHED / "var_d16", []
    for path in (paths.TOKENIZER, paths.TRANSFORMER):
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text("weights")
    write_params(load_preset("var_d16", PARAMS).values, directory / paths.PARAMS)
    monkeypatch.setattr(workspaces, "fetch_preset", lambda preset, directory: made.append(directory))
    workspaces.find_workspace("var_d16", PARAMS)
    assert made == [directory], "nobody knows what converted it"
    write_json(directory / CONVERTED_BY, conversion())
    workspaces.find_workspace("var_d16", PARAMS)
    assert made == [directory]
    raised("distill_dd1")
    workspaces.find_workspace("var_d16", PARAMS)
    assert made == [directory] * 2
