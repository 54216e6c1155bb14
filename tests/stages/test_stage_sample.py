"""The stage ``sample``: killed and run again, it ends with the bytes of an undisturbed run and draws nothing twice."""

import json
import re
import subprocess
import sys

import pytest

from ddops.config.load import compose, load_config, write_params
from ddops.models.weights_dd2 import save_generator
from ddops.stages import paths
from ddops.stages import sample as stage
from ddops.stages.common import EXIT_TRY_AGAIN, sections
from helpers.few_digits import CUT_SHORT, few_digits
from helpers.here import run_stage_here
from helpers.tiny import FAMILIES, PARAMS, contents, kill_stage_in, tiny, untrained, write_recipes, write_weights

pytestmark = pytest.mark.xdist_group("sample")  # which shares an undisturbed run

ROWS = ("dd1_1step", "dd2_1step")
SETTINGS = [f"evaluate.rows=[{','.join(ROWS)}]", "evaluate.samples_per_image=1", "evaluate.seeds=[1,2]"]
OTHERS_DIE = """
import os, signal
from ddops.stages import sample
first, draw = os.getpid(), sample._draw
def draw_or_die(*arguments):
    if os.getpid() != first:
        os.kill(os.getpid(), signal.SIGKILL)
    draw(*arguments)
sample._draw = draw_or_die
sample.run_stage(sample.sample)
"""


def workspace(directory, processes=1):
    """Random weights, and no trajectory: none of the rows asks for one."""
    write_weights(directory)
    settings = [*FAMILIES["llamagen"], *SETTINGS, f"evaluate.processes={processes}"]
    write_params(compose(PARAMS, settings), directory / paths.PARAMS)
    write_recipes(directory)
    return directory


def run(directory):
    ended = run_stage_here(directory, "sample")
    assert ended.returncode == 0, ended.stderr


@pytest.fixture(scope="module", autouse=True)
def few():
    with few_digits():
        yield


@pytest.fixture(scope="module")
def undisturbed(few, tmp_path_factory):
    directory = workspace(tmp_path_factory.mktemp("whole"))
    run(directory)
    return directory


def test_every_row_and_seed_is_drawn_of_the_models_in_hand(undisturbed):
    files = {str(file) for file in contents(undisturbed / paths.SAMPLES)}
    expected = {f"{row}/seed{seed}.npz" for row in ROWS for seed in (1, 2)}
    assert files == {"manifest.json", "reconstruction/seed0.npz", *expected}
    manifest = json.loads((undisturbed / paths.SAMPLES_MANIFEST).read_text())
    assert set(manifest["rows"]) == set(ROWS)
    assert set(manifest["models"]) == {"tokenizer", "teacher", "dd1", "dd2"}


@pytest.mark.slow
@pytest.mark.parametrize("death", [1, 4])
def test_killed_between_files_it_goes_on(tmp_path, undisturbed, death):
    killed = workspace(tmp_path)
    kill_stage_in(killed, "sample", first=CUT_SHORT, suffix=".npz", number=death)
    assert not (killed / paths.SAMPLES).exists(), "nothing unfinished is taken for a result"
    unfinished = next((killed / paths.STATE / "samples").iterdir())
    drawn = {file.relative_to(unfinished): file.stat().st_mtime_ns for file in unfinished.glob("*/*.npz")}
    assert len(drawn) == death - 1
    run(killed)
    assert contents(killed / paths.SAMPLES) == contents(undisturbed / paths.SAMPLES)
    assert contents(killed / paths.GRIDS) == contents(undisturbed / paths.GRIDS)
    assert drawn == {file: (killed / paths.SAMPLES / file).stat().st_mtime_ns for file in drawn}, "drawn once"


@pytest.mark.slow
def test_samples_of_other_models_are_not_gone_on_with(tmp_path, undisturbed):
    killed = workspace(tmp_path)
    kill_stage_in(killed, "sample", first=CUT_SHORT, suffix=".npz", number=4)
    _, student = untrained("llamagen")
    third = {name: value / 3 for name, value in student.state_dict().items()}
    save_generator(killed / paths.DD2_GENERATOR, third, tiny("llamagen").teacher.model, None)
    run(killed)
    found, whole = contents(killed / paths.SAMPLES), contents(undisturbed / paths.SAMPLES)
    assert {name for name in whole if found[name] != whole[name]} >= {"dd2_1step/seed1.npz", "manifest.json"}


@pytest.mark.slow
def test_processes_share_the_files_and_draw_the_same(tmp_path, undisturbed):
    shared = workspace(tmp_path, processes=2)
    run(shared)
    assert contents(shared / paths.SAMPLES) == contents(undisturbed / paths.SAMPLES)


@pytest.mark.slow
def test_several_processes_are_killed_and_go_on(tmp_path, undisturbed):
    killed = workspace(tmp_path, processes=2)
    kill_stage_in(killed, "sample", first=CUT_SHORT, suffix=".npz", number=3)
    run(killed)
    assert contents(killed / paths.SAMPLES) == contents(undisturbed / paths.SAMPLES)


@pytest.mark.slow
def test_one_of_the_others_is_killed(tmp_path, undisturbed):
    """What it has drawn is missing, which is said; the same command draws that and nothing else."""
    killed = workspace(tmp_path, processes=2)
    result = subprocess.run(
        [sys.executable, "-c", CUT_SHORT + OTHERS_DIE], cwd=killed, capture_output=True, text=True, check=False
    )
    assert result.returncode == EXIT_TRY_AGAIN
    assert re.search(r"dd1_1step/seed2\.npz .* the same command again", result.stderr)
    run(killed)
    assert contents(killed / paths.SAMPLES) == contents(undisturbed / paths.SAMPLES)


def drawn_until(monkeypatch, most):
    """Names of the files that the stage draws in this process; it dies once there are ``most``."""
    names, write = [], stage.write_samples

    def write_or_die(path, batches, labels_N):
        if len(names) == most:
            raise KeyboardInterrupt
        write(path, batches, labels_N)
        names.append(f"{path.parent.name}/{path.name}")

    monkeypatch.setattr(stage, "write_samples", write_or_die)
    config = load_config()
    stage.sample(**{name: getattr(config, name) for name in sections(stage.sample)})
    return names


@pytest.mark.parametrize("other_recipe", [False, True])
def test_samples_of_another_recipe_are_not_gone_on_with(tmp_path, monkeypatch, raised, other_recipe):
    monkeypatch.chdir(workspace(tmp_path))
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        drawn_until(patch, 3)
    if other_recipe:
        raised("sample")
    files = 1 + 2 * len(ROWS)
    assert len(drawn_until(monkeypatch, files)) == (files if other_recipe else files - 3)
