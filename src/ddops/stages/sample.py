"""Stage ``sample``: draw every row's images once a seed of the protocol, and a grid a row to look at."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from ddops.captions.conditions import Conditions, open_conditions
from ddops.config.base import plain
from ddops.config.dd2 import ARDiffusionConfig, DD2Config, TrainedDD2Config
from ddops.config.evaluation import AR_DIFFUSION_ROWS, EvaluateConfig, parse_row
from ddops.config.models import SamplingConfig
from ddops.config.stages import DD1Config, TrajectoriesConfig
from ddops.evaluation.device import accelerator
from ddops.evaluation.drawing import Request, draw_batches
from ddops.evaluation.images import grid, save_png, to_uint8
from ddops.evaluation.protocols import Protocol, open_protocol
from ddops.evaluation.rows import RECONSTRUCTION, Models, Row, build_row, open_models, reconstruct
from ddops.evaluation.samples import open_samples, pick, write_samples
from ddops.evaluation.smoothness import interpolate
from ddops.files import sha256_file, sha256_json, write_json
from ddops.stages import paths
from ddops.stages.common import drawing_sha256, require, run_stage
from ddops.stages.statistics import statistics_file
from ddops.training.errors import ReplicaLost
from ddops.training.replicas import replicas
from ddops.trajectories.shards import MANIFEST
from ddops.workspace.recipes import recipe

TILE = 48
"""Side of an image in a grid, in pixels, for images smaller than that."""
FRAMES = 9
"""Images from one end of an interpolation to the other."""
UNFINISHED = paths.STATE / "samples"
"""Where files lie until all are drawn: a killed stage goes on after the last whole one."""


def sample(
    sampling: SamplingConfig,
    trajectories: TrajectoriesConfig,
    dd1: DD1Config,
    ar_diffusion: ARDiffusionConfig,
    dd2: DD2Config,
    evaluate: EvaluateConfig,
) -> None:
    """Write ``data/samples/<row>/seed<seed>.npz``, ``manifest.json`` beside them, and ``reports/grids/<row>.png``.

    Raises:
        CheckpointError: the protocol's statistics cannot be had: said before the long work, not after it.
    """
    statistics_file(evaluate)
    files = {
        "tokenizer": require(paths.TOKENIZER, "teacher"),
        "teacher": require(paths.TRANSFORMER, "teacher"),
        "dd1": require(paths.DD1_STUDENT, "distill_dd1"),
    }
    if isinstance(dd2, TrainedDD2Config):
        files["dd2"] = require(paths.DD2_GENERATOR, "distill_dd2")
    if any(parse_row(name)[0] in AR_DIFFUSION_ROWS for name in evaluate.rows):
        files["ar_diffusion"] = require(paths.AR_DIFFUSION, "ar_diffusion")
    hashes = {name: sha256_file(path) for name, path in files.items()}
    models = open_models(files, sampling, trajectories, dd1, ar_diffusion, dd2, paths.TRAJECTORIES)
    model = models.teacher
    conditions = open_conditions(paths.EVALUATE_CAPTIONS, model, *models.students)
    rows = [build_row(name, models) for name in evaluate.rows]
    protocol = open_protocol(evaluate)

    dataset = sha256_file(require(paths.TRAJECTORIES / MANIFEST, "trajectories"))
    prompts = [sha256_file(path) for path in conditions.files]
    sections = [plain(section) for section in (sampling, trajectories, dd1, ar_diffusion, dd2, evaluate)]
    settings = [recipe("sample"), hashes, prompts, dataset, *sections]
    drawn = _unfinished(sha256_json(settings))
    if real := protocol.real_images():
        batches = reconstruct(model, real.images_NIHW, evaluate.batch_size)
        _draw(drawn / RECONSTRUCTION / "seed0.npz", batches, real.labels_N)
    _draw_rows(drawn, rows, protocol, conditions, evaluate)
    _write_grids(drawn, protocol, conditions, evaluate)
    _write_interpolations(rows, models, conditions, evaluate)
    facts = {row.name: {"passes": row.passes, "parameters": row.parameters} for row in rows}
    drawing = drawing_sha256(sampling, trajectories, dd1, ar_diffusion, dd2)
    write_json(drawn / paths.SAMPLES_MANIFEST.name, {"models": hashes, "drawing_sha256": drawing, "rows": facts})
    shutil.rmtree(paths.SAMPLES, ignore_errors=True)
    paths.SAMPLES.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(drawn, paths.SAMPLES)
    shutil.rmtree(UNFINISHED)


def _unfinished(fingerprint: str) -> Path:
    """The directory of a run with these settings and this recipe; what runs with others left is deleted,
    and half a file."""
    directory = UNFINISHED / fingerprint
    for other in UNFINISHED.glob("*"):
        if other != directory:
            shutil.rmtree(other)
    for half in directory.glob("*/.*.tmp"):
        half.unlink()
    return directory


def _draw_rows(
    drawn: Path, rows: Sequence[Row], protocol: Protocol, conditions: Conditions, evaluate: EvaluateConfig
) -> None:
    """A file a row and a seed, dealt out to the processes.

    Raises:
        ReplicaLost: one of them ended before its files were there.
    """
    files = [(drawn / row.name / f"seed{seed}.npz", row, seed) for row, seed in product(rows, evaluate.seeds)]
    with replicas(evaluate.processes if accelerator().type == "cpu" else 1) as group:
        for path, row, seed in files[group.rank :: group.size]:
            labels_N = protocol.labels(seed, conditions)
            request = Request(labels_N, evaluate.batch_size, shown=group.is_first)
            batches = draw_batches(row.draw, request, seed, row.name, protocol.image_size)
            _draw(path, batches, conditions.classes_K[labels_N])
    if missing := [path for path, _, _ in files if not path.exists()]:
        raise ReplicaLost(f"a process that drew {missing[0].relative_to(drawn)} ended; run the same command again")


def _draw(path: Path, batches: Iterable[Tensor], labels_N: Tensor) -> None:
    if not path.exists():
        write_samples(path, batches, labels_N)


def _write_grids(drawn: Path, protocol: Protocol, conditions: Conditions, evaluate: EvaluateConfig) -> None:
    """The first few images of some classes, a column a class: the same classes, and of one seed, in every grid."""
    classes = _grid_classes(conditions, evaluate).tolist()
    columns = len(classes)
    for row in (RECONSTRUCTION, *evaluate.rows):
        if (file := next(iter(sorted((drawn / row).glob("*.npz"))), None)) is not None:
            images_NIHW = pick(open_samples(file), classes, evaluate.grid_per_class, evaluate.batch_size)
            _write_grid(row, images_NIHW, columns)
    if real := protocol.real_images():
        chosen = [to_uint8(real.images_NIHW[real.labels_N == label][: evaluate.grid_per_class]) for label in classes]
        _write_grid("data", torch.stack(chosen, 1).flatten(0, 1), columns)


def _write_interpolations(
    rows: Sequence[Row], models: Models, conditions: Conditions, evaluate: EvaluateConfig
) -> None:
    """For every row that is a function of its noise: a line of frames a class, from one noise to another."""
    labels_K = conditions.examples(_grid_classes(conditions, evaluate))
    shape = (models.teacher.layout.length, models.teacher.codebook_VC.shape[1])
    for row in rows:
        if row.generator is not None:
            images_NIHW = interpolate(row.generator, labels_K, FRAMES, evaluate.seeds[0], shape)
            _write_grid(f"interpolation_{row.name}", to_uint8(images_NIHW).cpu(), FRAMES)


def _grid_classes(conditions: Conditions, evaluate: EvaluateConfig) -> Tensor:
    """Classes shown in grids, spread over all of them."""
    num_classes = int(conditions.classes_K.max()) + 1
    columns = min(evaluate.grid_classes, num_classes)
    return torch.arange(columns) * num_classes // columns


def _write_grid(row: str, images_NIHW: Tensor, columns: int) -> None:
    picture = grid(images_NIHW, columns=columns, scale=max(1, TILE // images_NIHW.shape[-1]))
    save_png(picture, paths.GRIDS / f"{row}.png")


if __name__ == "__main__":
    run_stage(sample)
