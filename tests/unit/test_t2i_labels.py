"""Trajectories of more captions than sixteen bits hold."""

import numpy as np
import pytest

from ddops.trajectories.shards import ShardPlan, read_shard, shard_problem, write_shard


@pytest.mark.parametrize("largest", [65_535, 65_536, 1_199_999])
def test_a_captions_number_survives_its_shard(tmp_path, largest):
    labels_N = np.array([0, largest]).astype(np.min_scalar_type(max(largest, 65_535)))
    path, settings = tmp_path / "shard-00000.safetensors", {"seed": 0}
    write_shard(path, labels_N, np.zeros((2, 4), np.uint16), 0, settings)
    assert read_shard(path).labels_N.tolist() == [0, largest]
    assert labels_N.itemsize == (2 if largest < 2**16 else 4)
    assert shard_problem(path, ShardPlan(0, 0, 2), settings) is None
