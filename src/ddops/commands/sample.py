"""``ddops sample``: images of some classes, or for some prompts, from a teacher or a student, as one picture."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ddops.commands.arguments import CommandError, Subparsers, add_params
from ddops.commands.classes import parse_classes
from ddops.commands.workspace import Workspace, find_workspace

if TYPE_CHECKING:
    from torch import Tensor

    from ddops.captions.store import CaptionList
    from ddops.evaluation.drawing import Request

ALL = "all"
COLUMNS = 8
SMALLEST_TILE = 48


def register(commands: Subparsers) -> None:
    """Declare the arguments."""
    parser = commands.add_parser(
        "sample",
        help="draw images from a teacher or a student",
        description="Draw images: `ddops sample released_dd1_var_d16 --classes 207,otter --steps 1 --seed 0 "
        "--grid out.png`. An image depends on its class, the seed and its place in the list, not on the others.",
    )
    parser.add_argument("model", help="a preset, a workspace, or a directory that ddops fetch wrote")
    parser.add_argument("--classes", help="numbers or ImageNet names, with commas between them")
    parser.add_argument("--prompt", action="append", default=[], help="of a model of captions; may be repeated")
    parser.add_argument("--count", type=_positive, default=1, help="images a class or prompt; default: 1")
    parser.add_argument("--row", choices=["teacher", "dd1", "dd2"], help="default: the student that is exported")
    parser.add_argument("--steps", type=_steps, help=f"of the student, default: 1; of a teacher: {ALL}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=_positive, default=8, metavar="N")
    parser.add_argument("--grid", type=Path, required=True, metavar="FILE", help="the picture to write, a PNG")
    add_params(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the picture and say what is on it."""
    if arguments.seed < 0:
        raise CommandError(f"--seed: at least 0, got {arguments.seed}")
    workspace = find_workspace(arguments.model, arguments.params)
    config = workspace.config
    conditions = _conditions(arguments, config.teacher.model.num_classes)
    row, steps = _choose(arguments, workspace)

    import torch

    from ddops.evaluation.drawing import Request
    from ddops.evaluation.images import grid, save_png

    numbers = range(len(conditions)) if arguments.prompt else conditions
    labels_N = torch.tensor(numbers).repeat_interleave(arguments.count)
    start = time.perf_counter()
    images_NIHW = _draw(
        workspace, row, steps, Request(labels_N, arguments.batch_size), arguments.seed, arguments.prompt
    )
    seconds = time.perf_counter() - start
    columns = arguments.count if arguments.count > 1 else min(len(conditions), COLUMNS)
    scale = max(1, SMALLEST_TILE // config.teacher.model.image_size)
    save_png(grid(images_NIHW, columns, scale=scale), arguments.grid)
    what = "for" if arguments.prompt else "of classes"
    shown = f"{len(labels_N)} image{'s' if len(labels_N) > 1 else ''} {what} {', '.join(map(str, conditions))}"
    print(f"{arguments.grid}: {shown}; {config.preset}, {row}, steps: {steps}, seed {arguments.seed}, {seconds:.1f} s")


def _conditions(arguments: argparse.Namespace, num_classes: int) -> list[int] | list[str]:
    """The classes, or the prompts, whichever the model draws for."""
    if num_classes:
        if arguments.prompt or not arguments.classes:
            raise CommandError("--classes: this model draws for classes, and for no prompt")
        return parse_classes(arguments.classes, num_classes)
    if arguments.classes or not arguments.prompt:
        raise CommandError("--prompt: this model draws for captions, and for no classes")
    prompts: list[str] = arguments.prompt
    if not all(map(str.strip, prompts)):
        raise CommandError("--prompt: empty")
    return prompts


def _captions(workspace: Workspace, prompts: list[str]) -> CaptionList:
    """The prompts, encoded as the stage captions encodes them."""
    from ddops.captions.pretrained import TextEncoder
    from ddops.captions.store import CaptionList
    from ddops.config.captions import EncodedCaptionsConfig, PublishedEncoderConfig
    from ddops.hub.acquire import obtain_directory
    from ddops.stages import paths

    config = workspace.config.captions
    assert isinstance(config, EncodedCaptionsConfig)  # a model of captions has some
    directory = workspace.root / paths.TEXT_ENCODER
    if isinstance(config.encoder, PublishedEncoderConfig):
        directory, _ = obtain_directory(config.encoder)
    return CaptionList(TextEncoder(directory, config.length)(prompts), config.length)


def _choose(arguments: argparse.Namespace, workspace: Workspace) -> tuple[str, int]:
    """The row and its number of steps, refused where they do not go together."""
    row = arguments.row or (workspace.config.export.student if workspace.student.is_file() else "teacher")
    levels = len(workspace.config.teacher.model.level_sizes)
    if row == "teacher":
        if arguments.steps not in (None, ALL, levels):
            raise CommandError(f"--steps {arguments.steps}: a teacher takes all of its {levels} steps: --steps {ALL}")
        return row, levels
    student = workspace.student_of(row)
    if not student.is_file():
        raise CommandError(f"{student}: missing; run dvc repro distill_{row}, or ask for --row teacher")
    most = len(workspace.config.dd1.start_positions)
    steps = most if arguments.steps == ALL else arguments.steps or 1
    if steps > most:
        raise CommandError(f"--steps {steps}: dd1.start_positions {workspace.config.dd1.start_positions} allow {most}")
    return row, steps


def _draw(workspace: Workspace, row: str, steps: int, request: Request, seed: int, prompts: list[str]) -> Tensor:
    """uint8 images (N, I, H, W)."""
    from ddops.evaluation.device import accelerator
    from ddops.evaluation.drawing import draw_all
    from ddops.evaluation.rows import Models, build_row, open_teacher
    from ddops.models.conditions import attach_captions
    from ddops.models.weights import load_student
    from ddops.models.weights_dd2 import load_generator
    from ddops.stages import paths

    config = workspace.config
    teacher = open_teacher(workspace.tokenizer, workspace.transformer)
    student = load_student(workspace.student_of(row)).to(accelerator()) if row == "dd1" else None
    dd2_file = workspace.student_of("dd2")
    generator = load_generator(workspace.tokenizer, dd2_file).to(accelerator()) if row == "dd2" else None
    if prompts:
        captions = _captions(workspace, prompts)
        for model in (teacher, student, generator):
            if model is not None:
                attach_captions(model, captions)
    trajectories = workspace.root / paths.TRAJECTORIES
    models = Models(
        teacher, student, config.sampling, config.trajectories, config.dd1, trajectories, config.dd2, generator
    )
    name = row if row == "teacher" else f"{row}_{steps}step"
    return draw_all(build_row(name, models).draw, request, seed, name)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on, got {text!r}")
    return int(text)


def _steps(text: str) -> int | str:
    return ALL if text == ALL else _positive(text)
