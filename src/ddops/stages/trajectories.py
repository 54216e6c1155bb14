"""Stage ``trajectories``: the teacher's (class, noise, tokens) through the flow map."""

from __future__ import annotations

from ddops.config.models import SamplingConfig
from ddops.config.stages import TrajectoriesConfig
from ddops.files import write_json
from ddops.stages import paths
from ddops.stages.common import require, run_stage
from ddops.trajectories.generate import Job, SavedTeacher, generate, write_empty
from ddops.trajectories.mappers import from_environment, workers_from_environment


def trajectories(seed: int, sampling: SamplingConfig, trajectories: TrajectoriesConfig) -> None:
    """Generate what is missing of the data set; none at all where the student is a released one."""
    if trajectories.count == 0:
        write_empty(paths.TRAJECTORIES, "trajectories.count is 0: nothing is trained on them")
        return
    files = require(paths.TOKENIZER, "teacher"), require(paths.TRANSFORMER, "teacher")
    teacher = SavedTeacher.of(*files, paths.TRAIN_CAPTIONS)
    job = Job.of(teacher, trajectories, sampling, seed, paths.TRAJECTORIES, workers_from_environment())
    # DVC runs this because something changed, and keeps the data set of before in its cache.
    metrics = generate(job, replace=True, mapper=from_environment())
    if metrics["samples"]:
        write_json(paths.TRAJECTORIES_THROUGHPUT, metrics)


if __name__ == "__main__":
    run_stage(trajectories)
