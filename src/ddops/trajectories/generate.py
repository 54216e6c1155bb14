"""Generating trajectories: (class, noise, token ids) with the ids from the flow map under the teacher (DD1, 3.2).

A shard is a pure function of the settings and its place, so it does not matter which process or machine makes it, nor
in which order: see :mod:`ddops.trajectories.mappers`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ddops.captions.conditions import open_conditions
from ddops.captions.store import MANIFEST as CAPTIONS_MANIFEST
from ddops.config.models import SamplingConfig
from ddops.config.stages import Precision, TrajectoriesConfig
from ddops.files import sha256_file, sha256_json
from ddops.models.interface import Teacher
from ddops.models.reduced import sampled_in_bfloat16
from ddops.models.weights import TRANSFORMER, load_metadata, load_teacher
from ddops.sampling.noise import NOISE_VERSION, Stream, integers, normals
from ddops.sampling.teacher import flow_picker, sample_teacher
from ddops.trajectories.errors import DatasetError, SettingsDiffer
from ddops.trajectories.mappers import Mapper, in_this_process
from ddops.trajectories.memory import fitting_batch, free_bytes
from ddops.trajectories.shards import (
    MANIFEST,
    ShardPlan,
    plan_shards,
    read_manifest,
    read_shard,
    shard_problem,
    write_manifest,
    write_shard,
)
from ddops.workspace.recipes import recipe

log = logging.getLogger(__name__)

STAGE = "trajectories"
"""Whose recipe the shards are made by."""
NOISE_THREADS = {"cuda": 4}
"""Of a process, by its device; elsewhere one, since the processors are at work themselves."""
MOST_CODES = 2**16 - 1
"""What sixteen bits hold: ids always, labels unless there are more conditions than that."""


@dataclass(frozen=True)
class SavedTeacher:
    """A teacher in its two files, opened once a process; on a GPU where there is one. With the prompt set that it draws
    for, if it draws for captions."""

    tokenizer: Path
    transformer: Path
    captions: Path
    sha256: str

    @classmethod
    def of(cls, tokenizer: Path, transformer: Path, captions: Path) -> SavedTeacher:
        """With the hash of the files, by their absolute paths; ``captions`` is read where there is a prompt set."""
        files = [tokenizer, transformer, *(path for path in [captions / CAPTIONS_MANIFEST] if path.exists())]
        sha256 = sha256_json([sha256_file(path) for path in files])
        return cls(tokenizer.absolute(), transformer.absolute(), captions.absolute(), sha256)

    def fitting_batch(self, workers: int, precision: Precision) -> int:
        """Samples a batch that fit into the memory at hand where ``workers`` processes share this machine."""
        # In float32 whatever the precision: that is how they are read.
        weights = self.tokenizer.stat().st_size + self.transformer.stat().st_size
        return fitting_batch(load_metadata(self.transformer, TRANSFORMER)[0], weights, free_bytes(workers), precision)

    @cache  # noqa: B019  one teacher a process, kept to its end
    def __call__(self, precision: Precision) -> Teacher:
        teacher = load_teacher(self.tokenizer, self.transformer)
        if precision == "bfloat16":
            teacher = sampled_in_bfloat16(teacher)
        teacher.to("cuda" if torch.cuda.is_available() else "cpu")
        open_conditions(self.captions, teacher)
        return teacher


@dataclass(frozen=True)
class Job:
    """What a worker needs in order to make any shard of a data set. Travels between processes and machines: the paths
    must mean the same files there."""

    open_teacher: Callable[[Precision], Teacher]
    """To be sampled in this precision."""
    teacher_sha256: str
    config: TrajectoriesConfig
    """With a number for a batch size."""
    sampling: SamplingConfig
    seed: int
    directory: Path
    recipe: int = field(default_factory=lambda: recipe(STAGE))
    """Of who asks; a worker that computes by another makes no shard."""

    @classmethod
    def of(
        cls,
        teacher: SavedTeacher,
        config: TrajectoriesConfig,
        sampling: SamplingConfig,
        seed: int,
        directory: Path,
        workers: int = 1,
    ) -> Job:
        """For a teacher in files, to be made by ``workers`` processes of this machine (or of machines like it)."""
        if config.batch_size == "auto":
            fitting = teacher.fitting_batch(workers, config.precision)
            recorded = _recorded_batch_size(directory)
            batch_size = recorded if recorded is not None and recorded <= fitting else fitting
            log.info("trajectories: batches of %d (%d fit)", batch_size, fitting)
            config = replace(config, batch_size=batch_size)
        return cls(teacher, teacher.sha256, config, sampling, seed, directory.absolute())

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that a trajectory's bytes depend on besides its index (and the platform's arithmetic)."""
        sampling, config = self.sampling, self.config
        return {
            "recipe": self.recipe,
            "teacher_sha256": self.teacher_sha256,
            "sampling": {
                "guidance": sampling.guidance,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
                "temperature": sampling.temperature,
            },
            "solver": config.solver,
            "evaluations": config.evaluations,
            "tolerance": config.tolerance,
            "precision": config.precision,
            # Named where it is so: the bytes of other shards stay what they were.
            **({"compiled": True} if config.compiled else {}),
            "shard_size": config.shard_size,
            # Rounding in a matrix product may depend on its size, and a rounding error can move a token.
            "batch_size": config.batch_size,
            "seed": self.seed,
            "noise_version": NOISE_VERSION,
        }


@dataclass(frozen=True)
class Throughput:
    """Samples made, and the seconds that went into each part of it; of the noise, those that were waited for."""

    samples: int = 0
    teacher: float = 0.0
    flow_map: float = 0.0
    noise: float = 0.0
    writing: float = 0.0

    def __add__(self, other: Throughput) -> Throughput:
        return Throughput(*(mine + theirs for mine, theirs in zip(self._parts(), other._parts(), strict=True)))

    def _parts(self) -> tuple[Any, ...]:
        return self.samples, self.teacher, self.flow_map, self.noise, self.writing

    @property
    def seconds(self) -> float:
        """Of work, in all processes together."""
        return self.teacher + self.flow_map + self.noise + self.writing

    def shares(self) -> dict[str, float]:
        """Each part's share of the time."""
        total = self.seconds or 1.0
        parts = {"teacher": self.teacher, "flow_map": self.flow_map, "noise": self.noise, "writing": self.writing}
        return {name: round(value / total, 4) for name, value in parts.items()}


def trajectory_labels(seed: int, indices_N: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    """Class labels (N,), uniform over the classes, a function of (seed, index)."""
    return integers(seed, Stream.LABEL, indices_N, 1, num_classes)[:, 0]


def trajectory_noise(seed: int, indices_N: NDArray[np.int64], shape: tuple[int, int]) -> Tensor:
    """Noise sequences (N, L, C), a function of (seed, index); ``shape`` is (L, C)."""
    return normals(seed, Stream.TRAJECTORY_NOISE, indices_N, shape)


def generate(job: Job, *, replace: bool = False, mapper: Mapper = in_this_process) -> dict[str, Any]:
    """Complete the data set in ``job.directory``: what is there and whole is kept, what is damaged is made again.

    Args:
        replace: make anew what was made with other settings, and remove what is not part of this data set. Without
            it, both are refused.
        mapper: where the shards are made.

    Returns:
        Samples made, samples a second, and the shares of the time.

    Raises:
        SettingsDiffer: shards are there that this data set would not hold, and ``replace`` is not set. See
            :func:`missing_shards` for the one exception.
    """
    plans = plan_shards(job.config.count, job.config.shard_size)
    job.directory.mkdir(parents=True, exist_ok=True)
    missing = missing_shards(job, replace=replace)
    # While shards change there must be no manifest that vouches for the old ones.
    (job.directory / MANIFEST).unlink(missing_ok=True)
    _remove_strangers(job.directory, plans)
    done = job.config.count - sum(plan.count for plan in missing)
    if done:
        log.info("trajectories: %d of %d are there already", done, job.config.count)
    total, started = Throughput(), time.perf_counter()
    with tqdm(total=job.config.count, initial=done, desc="trajectories", unit="sample", mininterval=1.0) as bar:
        for made in mapper(partial(make_shard, job), missing):
            total += made
            bar.set_postfix({name: f"{share:.0%}" for name, share in total.shares().items()}, refresh=False)
            bar.update(made.samples)
    write_manifest(job.directory, job.settings, plans)
    return _metrics(total, time.perf_counter() - started)


def generate_some(job: Job, numbers: Collection[int], *, replace: bool = False) -> dict[str, Any]:
    """Make those of the shards ``numbers`` that are missing, and no manifest: :func:`generate` adds that once all are
    there. Several machines may do so at once, each with numbers of its own.

    Returns:
        As :func:`generate`.

    Raises:
        DatasetError: a number past the last shard.
        SettingsDiffer: as :func:`generate`.
    """
    count = len(plan_shards(job.config.count, job.config.shard_size))
    if past := sorted(number for number in numbers if not 0 <= number < count):
        raise DatasetError(f"no shard {past[0]}: {job.config.count} samples are shards 0 to {count - 1}")
    total, started = Throughput(), time.perf_counter()
    for plan in missing_shards(job, replace=replace):
        if plan.number in numbers:
            (job.directory / MANIFEST).unlink(missing_ok=True)
            total += make_shard(job, plan)
            log.info("trajectories: made %s", plan.name)
    return _metrics(total, time.perf_counter() - started)


def _metrics(total: Throughput, elapsed: float) -> dict[str, Any]:
    return {
        "samples": total.samples,
        "samples_per_second": round(total.samples / elapsed, 3) if total.samples else 0.0,
        "share": total.shares(),
    }


def missing_shards(job: Job, *, replace: bool = False) -> list[ShardPlan]:
    """The shards that are not there, or not whole; with ``replace`` also those of other settings.

    A shard of other settings in a data set whose manifest is of these settings is a stranger there: it counts as
    damaged, since nothing is lost by making it again.

    Raises:
        SettingsDiffer: as :func:`generate`.
    """
    plans = plan_shards(job.config.count, job.config.shard_size)
    replaceable = replace or _is_complete(job)
    missing = []
    for plan in plans:
        path = job.directory / plan.name
        try:
            problem = shard_problem(path, plan, job.settings)
        except SettingsDiffer as error:
            if not replaceable:
                raise SettingsDiffer(f"{error}. Restore the settings, choose another directory, or replace") from None
            problem = str(error)
        if problem:
            missing.append(plan)
            if path.exists():
                log.info("trajectories: making %s again: %s", plan.name, problem)
    beyond = sorted(set(job.directory.glob("shard-*.safetensors")) - {job.directory / plan.name for plan in plans})
    if beyond and not replace:
        raise SettingsDiffer(
            f"{beyond[0]}: past the {job.config.count} samples asked for ({len(beyond)} such shards); ask for at "
            "least as many as there are, choose another directory, or replace"
        )
    return missing


def _is_complete(job: Job) -> bool:
    """Whether a manifest declares the directory to be a data set of just these settings."""
    try:
        return bool(read_manifest(job.directory)["fingerprint"] == sha256_json(job.settings))
    except DatasetError:
        return False


def _recorded_batch_size(directory: Path) -> int | None:
    """What a data set was made with: so its manifest says, or where it is unfinished its first whole shard."""
    settings: list[dict[str, Any]] = []
    with suppress(DatasetError):
        settings.append(read_manifest(directory)["settings"])
    for path in sorted(directory.glob("shard-*.safetensors")):
        if settings:
            break
        with suppress(DatasetError):
            settings.append(read_shard(path).settings)
    size = settings[0].get("batch_size") if settings else None
    return size if isinstance(size, int) else None


def write_empty(directory: Path, reason: str) -> None:
    """A data set of no trajectories, whose manifest says why."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).unlink(missing_ok=True)
    _remove_strangers(directory, [])
    log.info("trajectories: none (%s)", reason)
    write_manifest(directory, {"empty": reason}, [])


def make_shard(job: Job, plan: ShardPlan) -> Throughput:
    """Make one shard and write it.

    Raises:
        DatasetError: the ddops that runs here, on a worker perhaps, computes by another recipe than asked for.
    """
    if job.recipe != recipe(STAGE):
        raise DatasetError(
            f"{plan.name}: asked for is recipe {job.recipe}, the ddops of this worker computes by {recipe(STAGE)}: let "
            "every machine have the same ddops"
        )
    teacher, half = job.open_teacher(job.config.precision), job.config.precision == "bfloat16"
    codebook_VC, length = teacher.codebook_VC, teacher.layout.length
    device, clock = codebook_VC.device, time.perf_counter
    total, labels, ids = Throughput(), [], []
    begun = clock()
    shape, threads = (length, codebook_VC.shape[1]), NOISE_THREADS.get(device.type, 1)
    for indices_B, host_noise_BLC in _noise_ahead(job, plan, shape, threads):
        labels_B = trajectory_labels(job.seed, indices_B, teacher.num_conditions)
        noise_BLC = host_noise_BLC.to(device)
        noise_done, in_map = clock(), 0.0
        pick = flow_picker(teacher.layout, codebook_VC, noise_BLC, job.config)

        def timed_pick(level: int, log_p_BlV: Tensor, pick: Any = pick) -> Tensor:
            nonlocal in_map
            if device.type == "cuda":  # or the map, which waits for the device, would be blamed for the teacher
                torch.cuda.synchronize(device)
            start = clock()
            chosen: Tensor = pick(level, log_p_BlV)
            in_map += clock() - start
            return chosen

        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            ids_BL = sample_teacher(teacher, torch.from_numpy(labels_B).to(device), job.sampling, timed_pick).cpu()
        labels.append(labels_B.astype(np.min_scalar_type(max(teacher.num_conditions - 1, MOST_CODES))))
        ids.append(ids_BL.numpy().astype(np.uint16))
        done = clock()
        total += Throughput(len(indices_B), done - noise_done - in_map, in_map, noise_done - begun)
        begun = done
    write_shard(job.directory / plan.name, np.concatenate(labels), np.concatenate(ids), plan.first, job.settings)
    return total + Throughput(writing=clock() - begun)


def _noise_ahead(
    job: Job, plan: ShardPlan, shape: tuple[int, int], threads: int
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """The shard's batches: sample indices (B,) and their noise (B, L, C). Threads draw the next batch's while this one
    is worked on: the noise is the processor's, and a GPU would have to wait for it."""
    size, end = int(job.config.batch_size), plan.first + plan.count
    batches = [np.arange(first, min(first + size, end), dtype=np.int64) for first in range(plan.first, end, size)]
    with ThreadPoolExecutor(threads) as pool:

        def begin(indices_B: NDArray[np.int64]) -> list[Future[Tensor]]:
            parts = np.array_split(indices_B, min(threads, len(indices_B)))
            return [pool.submit(trajectory_noise, job.seed, part, shape) for part in parts]

        ahead = begin(batches[0])
        for indices_B, following in zip_longest(batches, batches[1:]):
            noise_BLC = torch.cat([part.result() for part in ahead])
            ahead = begin(following) if following is not None else []
            yield indices_B, noise_BLC


def _remove_strangers(directory: Path, plans: list[ShardPlan]) -> None:
    wanted = {plan.name for plan in plans}
    for path in directory.iterdir():
        if path.is_file() and path.name not in wanted:
            log.info("trajectories: removing %s, which is not part of this data set", path)
            path.unlink()
