"""The data set under DVC: pushed from one clone, pulled into another, where training starts at once."""

import shutil
import sys

import pytest
from moto.server import ThreadedMotoServer

from ddops.config.load import load_config
from ddops.stages import paths
from ddops.trajectories.dataset import TrajectoryDataset
from helpers.pipeline_world import commit, forget, lock_of, run, stages_run
from helpers.tiny import contents

pytestmark = [pytest.mark.pipeline, pytest.mark.xdist_group("pipeline")]

TRAINED_FROM = ("captions", "features", "teacher", "trajectories")


@pytest.fixture
def made(finished, tmp_path):
    """A repository with all that a student is trained from, and no student."""
    workspace = shutil.copytree(finished[0], tmp_path / "made", symlinks=True)
    forget(workspace, [name for name in lock_of(workspace) if name not in TRAINED_FROM])
    return workspace


def train_in_a_clone(made, clone, **keys):
    """Only what git and the remote hold reaches the clone, and that is enough: the student is trained on the data set
    that was pulled."""
    commit(made)
    run(made, "git", "clone", "--quiet", ".", str(clone))
    assert not (clone / paths.TRAJECTORIES).exists()
    run(clone, "dvc", "pull", "--quiet", *TRAINED_FROM, **keys)
    pulled = contents(clone / paths.TRAJECTORIES)
    assert pulled == contents(made / paths.TRAJECTORIES)
    config = load_config(clone / "params.yaml")
    dataset = TrajectoryDataset(clone / paths.TRAJECTORIES, config.teacher.model.code_dim)
    assert len(dataset) == config.trajectories.count
    assert stages_run(run(clone, "dvc", "repro", "distill_dd1")) == ["distill_dd1"]
    assert contents(clone / paths.TRAJECTORIES) == pulled
    assert (clone / paths.DD1_STUDENT).is_file()


def test_a_fresh_clone_trains_on_the_data_set_pulled_from_a_directory(made, tmp_path):
    run(made, "dvc", "remote", "add", "--default", "store", str(tmp_path / "store"))
    run(made, "dvc", "push", "--quiet", *TRAINED_FROM)
    train_in_a_clone(made, tmp_path / "clone")


@pytest.mark.rare
def test_a_fresh_clone_trains_on_the_data_set_pulled_from_an_s3_server(made, tmp_path):
    """moto speaks the S3 protocol on this machine; DVC reaches it as it would a real one."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        keys |= dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1")
        code = f"import boto3; boto3.client('s3', endpoint_url='http://{host}:{port}').create_bucket(Bucket='store')"
        run(made, sys.executable, "-c", code, **keys)
        run(made, "dvc", "remote", "add", "--default", "store", "s3://store/ddops")
        run(made, "dvc", "remote", "modify", "store", "endpointurl", f"http://{host}:{port}")
        run(made, "dvc", "push", "--quiet", *TRAINED_FROM, **keys)
        train_in_a_clone(made, tmp_path / "clone", **keys)
    finally:
        server.stop()
