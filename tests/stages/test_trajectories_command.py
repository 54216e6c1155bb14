"""`ddops trajectories`: what it makes, what it refuses, and what it says."""

import json
import logging
import shutil

import pytest
from PIL import Image

from ddops.cli import main
from ddops.models.weights import TOKENIZER, TRANSFORMER, save_weights
from ddops.stages import paths
from helpers.tiny import contents, tiny, untrained, write_tiny_params

pytestmark = pytest.mark.xdist_group("trajectories command")  # which shares a data set

OVERRIDES = ("trajectories.count=24", "trajectories.shard_size=8", "trajectories.batch_size=8")


@pytest.fixture(scope="module")
def teacher_workspace(tmp_path_factory):
    """A workspace with an untrained teacher and no data set; not to be changed."""
    workspace = tmp_path_factory.mktemp("workspace")
    write_tiny_params(workspace, *OVERRIDES)
    config, (teacher, _) = tiny("llamagen"), untrained("llamagen")
    parts = {paths.TOKENIZER: (teacher.tokenizer, TOKENIZER), paths.TRANSFORMER: (teacher.transformer, TRANSFORMER)}
    for path, (module, kind) in parts.items():
        save_weights(workspace / path, module.state_dict(), config.teacher.model, kind)
    return workspace


@pytest.fixture(scope="module")
def made(teacher_workspace, tmp_path_factory):
    """A workspace with a data set; not to be changed."""
    workspace = shutil.copytree(teacher_workspace, tmp_path_factory.mktemp("made") / "workspace")
    assert main(["trajectories", "generate", str(workspace)]) == 0
    return workspace


@pytest.fixture
def workspace(teacher_workspace, tmp_path):
    return shutil.copytree(teacher_workspace, tmp_path / "workspace")


@pytest.fixture
def with_data(made, tmp_path):
    return shutil.copytree(made, tmp_path / "workspace")


def test_it_is_made_checked_extended_and_looked_at(workspace, capsys):
    data = workspace / paths.TRAJECTORIES
    assert main(["trajectories", "generate", str(workspace), "--count", "16"]) == 0
    metrics = json.loads((workspace / paths.TRAJECTORIES_THROUGHPUT).read_text())
    assert metrics["samples"] == 16
    assert metrics["samples_per_second"] > 0
    assert sum(metrics["share"].values()) == pytest.approx(1, abs=1e-3)
    small = contents(data)

    assert main(["trajectories", "generate", str(workspace)]) == 0
    assert json.loads((workspace / paths.TRAJECTORIES_THROUGHPUT).read_text())["samples"] == 8
    assert all(contents(data)[name] == content for name, content in small.items() if name != "manifest.json")
    capsys.readouterr()
    assert main(["trajectories", "verify", str(workspace)]) == 0
    assert "24 samples in 3 shards" in capsys.readouterr().out

    picture = workspace / "grid.png"
    assert main(["trajectories", "inspect", str(workspace), "--grid", str(picture), "--compare", "20"]) == 0
    said = capsys.readouterr().out
    stored = sum(len(content) for name, content in contents(data).items() if name != "manifest.json")
    assert f"bytes a sample   {stored / 24:.1f}; storing the noise would add {4 * 16 * 8}" in said
    assert said.count("    level ") == 16
    assert Image.open(picture).width > 100


def test_a_damaged_shard_is_named_and_mended_alone(with_data, capsys, caplog):
    caplog.set_level(logging.INFO)
    workspace = with_data
    whole = contents(workspace / paths.TRAJECTORIES)
    shard = workspace / paths.TRAJECTORIES / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main(["trajectories", "verify", str(workspace)]) == 1
    said = capsys.readouterr().err
    assert f"{shard}: altered, damaged or truncated" in said
    assert "shard-00000" not in said
    assert main(["trajectories", "generate", str(workspace)]) == 0
    assert "making shard-00001.safetensors again" in caplog.text
    assert contents(workspace / paths.TRAJECTORIES) == whole


def test_other_settings_are_refused_unless_replacing_is_asked_for(with_data, capsys):
    workspace = with_data
    before = contents(workspace / paths.TRAJECTORIES)
    write_tiny_params(workspace, *OVERRIDES, "seed=5")
    assert main(["trajectories", "generate", str(workspace)]) == 1
    said = capsys.readouterr().err
    assert "made with other settings: seed 0, now 5" in said
    assert "--replace" in said
    assert contents(workspace / paths.TRAJECTORIES) == before
    assert main(["trajectories", "generate", str(workspace), "--replace"]) == 0
    assert contents(workspace / paths.TRAJECTORIES) != before


def test_the_precision_is_said_and_not_mixed(workspace, capsys):
    short = (*OVERRIDES, "trajectories.count=8")
    write_tiny_params(workspace, *short, "trajectories.precision=bfloat16")
    assert main(["trajectories", "generate", str(workspace)]) == 0
    assert main(["trajectories", "verify", str(workspace)]) == 0
    assert main(["trajectories", "inspect", str(workspace)]) == 0
    assert '"precision": "bfloat16"' in capsys.readouterr().out
    write_tiny_params(workspace, *short)
    assert main(["trajectories", "generate", str(workspace)]) == 1
    assert "precision bfloat16, now float32" in capsys.readouterr().err


def test_without_a_data_set_it_says_what_to_do(workspace, capsys):
    assert main(["trajectories", "verify", str(workspace)]) == 1
    assert "no manifest, the data set is incomplete" in capsys.readouterr().err


def test_machines_share_the_shards_and_one_ends_it(workspace, capsys):
    data = workspace / paths.TRAJECTORIES
    assert main(["trajectories", "generate", str(workspace), "--shards", "2,0-1"]) == 0
    assert not (data / "manifest.json").exists()
    (data / "shard-00001.safetensors").unlink()
    capsys.readouterr()
    assert main(["trajectories", "missing", str(workspace)]) == 0
    assert capsys.readouterr().out == "1\n"
    assert main(["trajectories", "generate", str(workspace)]) == 0
    assert json.loads((workspace / paths.TRAJECTORIES_THROUGHPUT).read_text())["samples"] == 8
    assert main(["trajectories", "generate", str(workspace), "--shards", "3"]) == 1
    assert "no shard 3" in capsys.readouterr().err
    assert main(["trajectories", "generate", str(workspace), "--shards", "0", "--workers", "2"]) == 1
    assert "one machine's part" in capsys.readouterr().err
