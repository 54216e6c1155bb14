"""The data set under DVC: pushed from one clone, pulled into another, where training can start at once."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from moto.server import ThreadedMotoServer

from ddops.models.weights import TOKENIZER, TRANSFORMER, save_weights
from ddops.stages import paths
from ddops.trajectories.dataset import TrajectoryDataset
from dvc_environment import dvc_environment
from tiny import contents, tiny, untrained, write_tiny_params

pytestmark = pytest.mark.pipeline

ROOT = Path(__file__).parents[1]
OVERRIDES = ("trajectories.count=40", "trajectories.shard_size=16", "trajectories.batch_size=8")


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


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A repository with the pipeline's stage `trajectories`, run by DVC on an untrained teacher."""
    workspace = tmp_path_factory.mktemp("made") / "workspace"
    write_tiny_params(workspace, *OVERRIDES)
    config, (teacher, _) = tiny("llamagen"), untrained("llamagen")
    parts = {paths.TOKENIZER: (teacher.tokenizer, TOKENIZER), paths.TRANSFORMER: (teacher.transformer, TRANSFORMER)}
    for path, (module, kind) in parts.items():
        save_weights(workspace / path, module.state_dict(), config.teacher.model, kind)
    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["trajectories"]
    stage["deps"] = ["artifacts/teacher"]
    (workspace / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"trajectories": stage}}))
    (workspace / paths.TRAJECTORIES.parent).mkdir()
    run(workspace, "git", "init", "--quiet")
    run(workspace, "dvc", "init", "--quiet")
    run(workspace, "dvc", "repro", "--quiet")
    commit(workspace)
    return workspace


def pull_into_a_clone(made, clone, **environment):
    """Only what git and the remote hold reaches the clone."""
    run(made, "git", "clone", "--quiet", ".", str(clone))
    assert not (clone / paths.TRAJECTORIES).exists()
    run(clone, "dvc", "pull", "--quiet", "trajectories", **environment)
    assert contents(clone / paths.TRAJECTORIES) == contents(made / paths.TRAJECTORIES)
    dataset = TrajectoryDataset(clone / paths.TRAJECTORIES, 8)
    assert len(dataset) == 40


def test_a_fresh_clone_pulls_the_data_set_from_a_directory(made, tmp_path):
    run(made, "dvc", "remote", "add", "--force", "--default", "store", str(tmp_path / "store"))
    run(made, "dvc", "push", "--quiet", "trajectories")
    commit(made)
    pull_into_a_clone(made, tmp_path / "clone")


def test_a_fresh_clone_pulls_the_data_set_from_an_s3_server(made, tmp_path):
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
        run(made, "dvc", "push", "--quiet", "trajectories", **keys)
        commit(made)
        pull_into_a_clone(made, tmp_path / "clone", **keys)
    finally:
        server.stop()
