"""Small trajectory data sets of the untrained teachers."""

import atexit
import shutil
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

from ddops.models.weights import TOKENIZER, TRANSFORMER, save_weights
from ddops.trajectories.generate import Job, SavedTeacher, generate
from ddops.trajectories.mappers import in_this_process
from helpers.tiny import tiny, untrained

FAMILIES = ["llamagen", "var"]
SEED = 11
COUNTS = ["trajectories.count=44", "trajectories.shard_size=12", "trajectories.batch_size=5"]
OVERRIDES = (*COUNTS, "trajectories.tolerance=0.01", f"seed={SEED}")
NAMES = [*(f"shard-{number:05d}.safetensors" for number in range(4)), "manifest.json"]
CODE_DIM = 8
NO_CAPTIONS = Path("no-captions")


@cache
def teacher_files(family="llamagen"):
    """Where the untrained teacher of a family is, for this process."""
    config, (teacher, _) = tiny(family).teacher.model, untrained(family)
    directory = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, directory)
    files = directory / "tokenizer.safetensors", directory / "transformer.safetensors"
    modules = teacher.tokenizer, teacher.transformer
    for path, module, kind in zip(files, modules, (TOKENIZER, TRANSFORMER), strict=True):
        save_weights(path, module.state_dict(), config, kind)
    return files


def job(directory, family="llamagen", *, seed=SEED, **changes):
    config = tiny(family, *OVERRIDES)
    trajectories = replace(config.trajectories, **changes)
    return Job.of(SavedTeacher.of(*teacher_files(family), NO_CAPTIONS), trajectories, config.sampling, seed, directory)


def make(directory, family="llamagen", *, anew=False, mapper=in_this_process, **changes):
    generate(job(directory, family, **changes), replace=anew, mapper=mapper)
    return directory
