"""The FID on a training's curves: the training's processes share the samples, and read the same figure."""

import os

import numpy as np
import pytest
import torch

from ddops.captions.conditions import Conditions
from ddops.config.evaluation import DigitsFeaturesConfig
from ddops.evaluation.judge import new_classifier, save_classifier
from ddops.stages import paths
from ddops.stages.fid_curve import FIDCurve
from ddops.training.errors import ReplicaLost
from ddops.training.replicas import gathered, own_part, replicas
from helpers.tiny import tiny

COUNT = 1201
"""No multiple of the processes, nor of the batch."""


@pytest.fixture
def fid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny().features
    assert isinstance(config, DigitsFeaturesConfig)
    torch.manual_seed(0)
    paths.CLASSIFIER.parent.mkdir(parents=True)
    save_classifier(paths.CLASSIFIER, new_classifier(config), config)
    return FIDCurve(COUNT, Conditions(10))


def drawn(indices_B, labels_B):
    """A function of index and label, as every row of the evaluation is."""
    each = [np.random.default_rng(int(index)).standard_normal((1, 8, 8)) for index in indices_B]
    return torch.tensor(np.stack(each), dtype=torch.float32) * (1 + labels_B[:, None, None, None]) / 10


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_samples_and_see_what_one_sees(fid, tmp_path, processes):
    alone, asked = fid.see(drawn), []

    def noted(indices_B, labels_B):
        asked.extend(indices_B.tolist())
        return drawn(indices_B, labels_B)

    with replicas(processes) as group:
        together = fid.see(noted)
        np.savez(tmp_path / f"{group.rank}.npz", asked=asked, features=together.features_NF, fid=fid.fid(together))
    found = [np.load(tmp_path / f"{rank}.npz") for rank in range(processes)]
    assert [index for each in found for index in each["asked"]] == list(range(COUNT)), "each sample is drawn once"
    assert max(len(each["asked"]) for each in found) == -(-COUNT // processes)
    for each in found:
        np.testing.assert_allclose(each["features"], alone.features_NF, rtol=1e-5, atol=1e-6)
        assert float(each["fid"]) == pytest.approx(fid.fid(alone), rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_what_is_gathered_is_whole_and_in_order(tmp_path, count):
    """Also where a process has nothing to add."""
    values_NC = torch.arange(2.0 * count).view(count, 2)
    with replicas(3) as group:
        torch.save(gathered(values_NC[own_part(count)], count), tmp_path / str(group.rank))
    for rank in range(3):
        assert torch.equal(torch.load(tmp_path / str(rank), weights_only=True), values_NC)


def test_a_process_lost_while_samples_are_drawn_is_said(fid):
    def dying(indices_B, labels_B):
        if os.getpid() != parent:
            os._exit(1)
        return drawn(indices_B, labels_B)

    parent = os.getpid()

    def see_together():
        with replicas(2):
            fid.see(drawn)
            fid.see(dying)

    with pytest.raises(ReplicaLost, match="run the same command again"):
        see_together()
