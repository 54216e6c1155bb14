"""``ddops trajectories``: make, check and look at the trajectory data set."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ddops.commands.arguments import CommandError, Subparsers, add_params
from ddops.commands.workspace import Workspace, find_workspace
from ddops.stages import paths
from ddops.workspace.recipes import RECIPES, require_recipe

if TYPE_CHECKING:
    from torch import Tensor

    from ddops.models.interface import Teacher
    from ddops.trajectories.generate import Job

COMPARED = 256


def register(commands: Subparsers) -> None:
    """Declare the arguments."""
    parser = commands.add_parser("trajectories", help="make, check and look at the trajectory data set")
    actions = parser.add_subparsers(dest="action", required=True)

    make = actions.add_parser(
        "generate",
        help="complete the data set",
        description="Makes what is missing: after a kill, of a damaged shard, or of a larger count. Shards made with "
        "other settings are refused by name. The bytes do not depend on the number of processes or machines.",
    )
    make.add_argument("--count", type=_positive, help="samples in all; default: trajectories.count")
    make.add_argument("--workers", type=_positive, default=1, metavar="N", help="processes; default: 1")
    make.add_argument(
        "--dask", nargs="?", const="local", metavar="ADDRESS", help="a Dask scheduler; without ADDRESS a local cluster"
    )
    make.add_argument(
        "--replace", action="store_true", help="make anew what other settings made; drop what is past count"
    )
    make.add_argument(
        "--shards",
        type=_shard_numbers,
        metavar="NUMBERS",
        help="make these alone (0-3,7) and no manifest: for machines that share the work; generate ends it",
    )
    make.set_defaults(run=run_generate)

    absent = actions.add_parser("missing", help="print the numbers of the shards that are still to be made, one a line")
    absent.add_argument("--count", type=_positive, help="samples in all; default: trajectories.count")
    absent.add_argument("--replace", action="store_true", help="count shards of other settings as missing")
    absent.set_defaults(run=run_missing)

    check = actions.add_parser("verify", help="check every byte; exits with 1 where something is wrong")
    check.set_defaults(run=run_verify)

    look = actions.add_parser(
        "inspect", help="sizes, settings and class counts; pictures and token frequencies if asked"
    )
    look.add_argument("--grid", type=Path, metavar="FILE", help="decode the first 64 samples to a PNG")
    look.add_argument(
        "--compare",
        type=_positive,
        nargs="?",
        const=COMPARED,
        metavar="N",
        help="with N ordinary samples, level by level",
    )
    look.set_defaults(run=run_inspect)
    for action in (make, absent, check, look):
        action.add_argument("model", nargs="?", default=".", help="a workspace or preset; default: here")
        action.add_argument("--directory", type=Path, help=f"of the data set; default: {paths.TRAJECTORIES} there")
        add_params(action)


def run_generate(arguments: argparse.Namespace) -> None:
    """Complete the data set and keep the throughput as a metric."""
    from ddops.files import write_json
    from ddops.trajectories import mappers
    from ddops.trajectories.errors import DatasetError
    from ddops.trajectories.generate import generate, generate_some

    if arguments.shards is not None and (arguments.dask or arguments.workers > 1):
        raise CommandError("--shards is one machine's part, made in this process: leave out --workers and --dask")
    workspace, job = _job(arguments, arguments.workers)
    try:
        if arguments.shards is not None:
            metrics = generate_some(job, arguments.shards, replace=arguments.replace)
            print(f"{job.directory}: {json.dumps(metrics)}")
            return
        mapper: mappers.Mapper = mappers.in_this_process
        if arguments.dask:
            mapper = mappers.dask(None if arguments.dask == "local" else arguments.dask, max(2, arguments.workers))
        elif arguments.workers > 1:
            mapper = mappers.processes(arguments.workers)
        metrics = generate(job, replace=arguments.replace, mapper=mapper)
    except DatasetError as error:
        raise CommandError(f"{error} (--replace)" if "or replace" in str(error) else str(error)) from None
    if metrics["samples"]:
        write_json(workspace.root / paths.TRAJECTORIES_THROUGHPUT, metrics)
    print(f"{job.directory}: {job.config.count} samples, {json.dumps(metrics)}")


def run_missing(arguments: argparse.Namespace) -> None:
    """Print what ``generate --shards`` may be given."""
    from ddops.trajectories.errors import DatasetError
    from ddops.trajectories.generate import missing_shards

    _, job = _job(arguments, 1)
    try:
        for plan in missing_shards(job, replace=arguments.replace):
            print(plan.number)
    except DatasetError as error:
        raise CommandError(f"{error} (--replace)" if "or replace" in str(error) else str(error)) from None


def run_verify(arguments: argparse.Namespace) -> None:
    """Print every problem, or that there is none."""
    from ddops.trajectories.errors import DatasetError
    from ddops.trajectories.shards import read_manifest
    from ddops.trajectories.verify import problems

    workspace, directory = _place(arguments)
    model = workspace.config.teacher.model
    try:
        found = list(problems(directory, _num_conditions(workspace), model.codebook_size))
        manifest = read_manifest(directory)
    except DatasetError as error:
        raise CommandError(str(error)) from None
    if found:
        raise CommandError("\n".join([*found, "Make them again: ddops trajectories generate"]))
    print(f"{directory}: {manifest['count']} samples in {len(manifest['shards'])} shards, all as the manifest says")


def run_inspect(arguments: argparse.Namespace) -> None:
    """Print what the data set is; write pictures and compare frequencies where asked."""
    import torch

    from ddops.trajectories.dataset import TrajectoryDataset
    from ddops.trajectories.errors import DatasetError
    from ddops.trajectories.shards import read_manifest

    workspace, directory = _place(arguments)
    model = workspace.config.teacher.model
    try:
        manifest = read_manifest(directory)
        dataset = TrajectoryDataset(directory, model.code_dim)
    except DatasetError as error:
        raise CommandError(str(error)) from None
    length = dataset.ids_NL.shape[1]
    stored = sum((directory / shard["name"]).stat().st_size for shard in manifest["shards"])
    counts = torch.bincount(dataset.labels_N, minlength=_num_conditions(workspace))
    print(f"{directory}: {len(dataset)} samples in {len(manifest['shards'])} shards")
    print(f"  bytes a sample   {stored / len(dataset):.1f}; storing the noise would add {4 * length * model.code_dim}")
    print(f"  samples a class  {int(counts.min())} to {int(counts.max())}")
    print(f"  settings         {json.dumps(manifest['settings'])}")
    if arguments.grid or arguments.compare:
        _look(arguments, workspace, dataset.labels_N, dataset.ids_NL, manifest["settings"]["batch_size"])


def _look(arguments: argparse.Namespace, workspace: Workspace, labels_N: Tensor, ids_NL: Tensor, batch: int) -> None:
    from torch.nn import functional as F

    from ddops.captions.conditions import open_conditions
    from ddops.evaluation.images import grid, save_png, to_uint8
    from ddops.models.weights import load_teacher

    teacher = load_teacher(workspace.tokenizer, workspace.transformer)
    open_conditions(workspace.root / paths.TRAIN_CAPTIONS, teacher)
    if arguments.grid:
        images_NIHW = to_uint8(teacher.decode(F.embedding(ids_NL[:64].long(), teacher.codebook_VC)).detach())
        save_png(grid(images_NIHW, 8, scale=max(1, 48 // workspace.config.teacher.model.image_size)), arguments.grid)
        print(f"  {arguments.grid}: samples 0 to {len(images_NIHW) - 1}")
    if arguments.compare:
        count = min(arguments.compare, len(labels_N))
        first_NL, second_NL = (_ordinary(workspace, teacher, labels_N[:count], batch, half) for half in (0, 1))
        print(
            f"  token frequencies over {count} samples, total-variation distance: "
            "to ordinary sampling, and of that to itself drawn anew"
        )
        for level in range(teacher.layout.num_levels):
            at = teacher.layout.positions(level)
            pair = (_distance(one[:, at], first_NL[:, at]) for one in (ids_NL[:count], second_NL))
            print(f"    level {level:3d}  {next(pair):.3f}  {next(pair):.3f}")


def _ordinary(workspace: Workspace, teacher: Teacher, labels_N: Tensor, batch: int, half: int) -> Tensor:
    """Token ids (N, L) of ordinary sampling with the same labels."""
    import numpy as np
    import torch

    from ddops.sampling.noise import Stream, uniforms
    from ddops.sampling.teacher import categorical_picker, sample_teacher

    drawn = []
    for first in range(0, len(labels_N), batch):
        labels_B = labels_N[first : first + batch]
        indices_B = np.arange(first, first + len(labels_B), dtype=np.int64)
        numbers = torch.from_numpy(uniforms(half, Stream.CATEGORICAL, indices_B, teacher.layout.length))
        pick = categorical_picker(teacher.layout, numbers)
        drawn.append(sample_teacher(teacher, labels_B, workspace.config.sampling, pick))
    return torch.cat(drawn)


def _distance(one: Tensor, other: Tensor) -> float:
    """Half the sum of the differences of two sets' token frequencies."""
    size = int(max(one.max(), other.max())) + 1
    frequencies = [ids.flatten().long().bincount(minlength=size) / ids.numel() for ids in (one, other)]
    return float((frequencies[0] - frequencies[1]).abs().sum() / 2)


def _place(arguments: argparse.Namespace) -> tuple[Workspace, Path]:
    workspace = find_workspace(arguments.model, arguments.params)
    return workspace, arguments.directory or workspace.root / paths.TRAJECTORIES


def _job(arguments: argparse.Namespace, workers: int) -> tuple[Workspace, Job]:
    from dataclasses import replace

    from ddops.trajectories.generate import STAGE, Job, SavedTeacher

    workspace, directory = _place(arguments)
    if (workspace.root / "dvc.yaml").is_file():
        require_recipe(STAGE, workspace.root / RECIPES)
    config = workspace.config
    teacher = SavedTeacher.of(workspace.tokenizer, workspace.transformer, workspace.root / paths.TRAIN_CAPTIONS)
    trajectories = replace(config.trajectories, count=arguments.count or config.trajectories.count)
    if not trajectories.count:
        raise CommandError("trajectories.count is 0: nothing is to be made; pass --count N")
    return workspace, Job.of(teacher, trajectories, config.sampling, config.seed, directory, workers)


def _shard_numbers(text: str) -> frozenset[int]:
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise argparse.ArgumentTypeError(f"numbers and ranges such as 0-3,7, got {text!r}")
        numbers.update(range(int(first), int(last or first) + 1))
    return frozenset(numbers)


def _num_conditions(workspace: Workspace) -> int:
    """Classes, or captions."""
    from ddops.captions.store import read_manifest

    if classes := workspace.config.teacher.model.num_classes:
        return classes
    return int(read_manifest(workspace.root / paths.TRAIN_CAPTIONS)["count"])


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on, got {text!r}")
    return int(text)
