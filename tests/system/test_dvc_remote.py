"""The data set under DVC: pushed from one clone, pulled into another, where training starts at once."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from moto.server import ThreadedMotoServer

from ddops.models.weights import TOKENIZER, TRANSFORMER, save_weights
from ddops.stages import paths
from ddops.trajectories.dataset import TrajectoryDataset
from helpers.dvc_environment import dvc_environment
from helpers.tiny import contents, tiny, untrained, write_tiny_params

pytestmark = pytest.mark.pipeline

ROOT = Path(__file__).parents[2]
OVERRIDES = (
    *("trajectories.count=40", "trajectories.shard_size=16", "trajectories.batch_size=8"),
    *("features.training.steps=4", "features.training.warmup_steps=1"),
    *("dd1.training.steps=4", "dd1.training.warmup_steps=1", "dd1.training.batch_size=8", "dd1.evaluate_every=4"),
    *("dd1.perceptual.batch_size=2", "dd1.evaluate_count=20"),
)
TRAINED_FROM = ("trajectories", "features")


def run(directory, *command, **environment):
    result = subprocess.run(
        command,
        cwd=directory,
        env=dvc_environment(directory.parent / "dvc", ROOT / "src", **environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def commit(directory):
    run(directory, "git", "add", "--all")
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.invalid")
    run(directory, "git", *identity, "commit", "--quiet", "--message", "everything")


def declared():
    """The pipeline's stages up to the student, without their code: it is this checkout's."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    chosen = {name: stages[name] for name in (*TRAINED_FROM, "distill_dd1")}
    for stage in chosen.values():
        stage["deps"] = [path for path in stage["deps"] if not path.startswith("src/") and path != "data/captions"]
    return {"stages": chosen}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A repository with an untrained teacher, from which DVC made the data set and the judge, but no student."""
    workspace = tmp_path_factory.mktemp("made") / "workspace"
    write_tiny_params(workspace, *OVERRIDES)
    config, (teacher, _) = tiny("llamagen"), untrained("llamagen")
    parts = {paths.TOKENIZER: (teacher.tokenizer, TOKENIZER), paths.TRANSFORMER: (teacher.transformer, TRANSFORMER)}
    for path, (module, kind) in parts.items():
        save_weights(workspace / path, module.state_dict(), config.teacher.model, kind)
    (workspace / "dvc.yaml").write_text(yaml.safe_dump(declared()))
    for directory in (paths.TRAJECTORIES.parent, paths.CURVES):
        (workspace / directory).mkdir(parents=True)
    run(workspace, "git", "init", "--quiet")
    run(workspace, "dvc", "init", "--quiet")
    commit(workspace)
    run(workspace, "dvc", "repro", "--quiet", *TRAINED_FROM)
    commit(workspace)
    return workspace


def train_in_a_clone(made, clone, **environment):
    """Only what git and the remote hold reaches the clone, and that is enough: the student is trained on the data set
    that was pulled."""
    run(made, "git", "clone", "--quiet", ".", str(clone))
    assert not (clone / paths.TRAJECTORIES).exists()
    run(clone, "dvc", "pull", "--quiet", *TRAINED_FROM, **environment)
    pulled = contents(clone / paths.TRAJECTORIES)
    assert pulled == contents(made / paths.TRAJECTORIES)
    assert len(TrajectoryDataset(clone / paths.TRAJECTORIES, 8)) == 40
    said = run(clone, "dvc", "repro", "distill_dd1")
    assert "Stage 'trajectories' didn't change, skipping" in said
    assert "Running stage 'distill_dd1'" in said
    assert "Running stage 'trajectories'" not in said
    assert contents(clone / paths.TRAJECTORIES) == pulled
    assert (clone / paths.DD1_STUDENT).is_file()


def test_a_fresh_clone_trains_on_the_data_set_pulled_from_a_directory(made, tmp_path):
    run(made, "dvc", "remote", "add", "--force", "--default", "store", str(tmp_path / "store"))
    run(made, "dvc", "push", "--quiet", *TRAINED_FROM)
    commit(made)
    train_in_a_clone(made, tmp_path / "clone")


def test_a_fresh_clone_trains_on_the_data_set_pulled_from_an_s3_server(made, tmp_path):
    """moto speaks the S3 protocol on this machine; DVC reaches it as it would a real one."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        code = f"import boto3; boto3.client('s3', endpoint_url='http://{host}:{port}').create_bucket(Bucket='store')"
        run(tmp_path, sys.executable, "-c", code, **keys)
        run(made, "dvc", "remote", "add", "--force", "--default", "store", "s3://store/ddops")
        run(made, "dvc", "remote", "modify", "store", "endpointurl", f"http://{host}:{port}")
        run(made, "dvc", "push", "--quiet", *TRAINED_FROM, **keys)
        commit(made)
        train_in_a_clone(made, tmp_path / "clone", **keys)
    finally:
        server.stop()
