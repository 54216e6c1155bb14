"""Stage ``trajectories``: the teacher's (class, noise, tokens) through the flow map."""

from __future__ import annotations

from ddops.config.models import SamplingConfig
from ddops.config.stages import TrajectoriesConfig
from ddops.files import sha256_file, sha256_json
from ddops.models.weights import load_teacher
from ddops.stages import paths
from ddops.stages.common import require, run_stage
from ddops.trajectories.generate import generate, write_empty


def trajectories(seed: int, sampling: SamplingConfig, trajectories: TrajectoriesConfig) -> None:
    """Generate what is missing of the data set; none at all where the student is a released one."""
    if trajectories.count == 0:
        write_empty(paths.TRAJECTORIES, "trajectories.count is 0: nothing is trained on them")
        return
    files = [require(paths.TOKENIZER, "teacher"), require(paths.TRANSFORMER, "teacher")]
    generate(
        load_teacher(*files),
        trajectories,
        sampling,
        seed=seed,
        teacher_sha256=sha256_json([sha256_file(file) for file in files]),
        directory=paths.TRAJECTORIES,
    )


if __name__ == "__main__":
    run_stage(trajectories)
