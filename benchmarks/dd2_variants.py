"""DD2's choices one by one: each variant trains its generator from the same teacher, trajectories and DD1 student.

Some train the AR-diffusion model alone, or the short DD1 before a DD2.

    python benchmarks/dd2_variants.py WORKSPACE --output benchmarks/results/dd2_choices.json --override KEY=VALUE

WORKSPACE is where the stages up to ``distill_dd1`` (and ``ar_diffusion``) ran; nothing there is changed. Overrides are
those that it was run with, and the budget of all variants, e.g. ``dd2.training.steps=20``. Run it again to go on:
finished variants are kept, a killed one resumes. FIDs are those of the stage's own curves (``dd2.evaluate_count``
samples of one seed), costs are counted in passes of the teacher over a whole sequence. The preset digits leaves the
AR-diffusion model out: for its variants, --override ar_diffusion=digits.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import resource
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from ddops.captions.conditions import open_conditions
from ddops.config.dd2 import TrainedARDiffusionConfig, TrainedDD2Config
from ddops.config.load import compose, validate, write_params
from ddops.config.stages import Config, TrainedDD1Config
from ddops.evaluation.drawing import Indices, sample_noise
from ddops.evaluation.report import read_curve
from ddops.files import write_json
from ddops.models.weights import load_teacher
from ddops.sampling.teacher import flow_picker, sample_teacher
from ddops.stages import paths
from ddops.stages.fid_curve import CURVE_SEED, FIDCurve
from ddops.workspace.files import TEMPLATE
from ddops.workspace.recipes import RECIPES

PAPERS: Final = (
    *("ar_diffusion.head.predicts=embedding", "dd2.guidance.start=ar_diffusion"),
    *("dd2.output=embeddings", "dd2.anchor_weight=0.0"),
)
"""Whose AR-diffusion model WORKSPACE must hold, with that head, as ``output: embeddings`` must; the others need one of
the preset's."""
VARIANTS: dict[str, tuple[str, ...]] = {
    "as the preset": (),
    "no anchor": ("dd2.anchor_weight=0.0",),
    "start: teacher": ("dd2.start=teacher",),
    "start: ar_diffusion": ("dd2.start=ar_diffusion", "dd2.anchor_weight=0.0"),
    "the paper's": ("dd2.start=ar_diffusion", *PAPERS),
    "guidance network: ar_diffusion": ("dd2.guidance.start=ar_diffusion",),
    "output: embeddings": (
        *("ar_diffusion.head.predicts=embedding", "dd2.guidance.start=ar_diffusion"),
        "dd2.output=embeddings",
    ),
    "1 guidance update": ("dd2.guidance.updates=1",),
    "5 guidance updates": ("dd2.guidance.updates=5",),
    "weighting: velocity": ("dd2.weighting=velocity",),
    "weighting: score": ("dd2.weighting=score",),
    "normalization: direction": ("dd2.normalization=direction",),
    "normalization: none": ("dd2.normalization=none",),
    "divergence: jensen_shannon": ("dd2.divergence=jensen_shannon",),
    "divergence: forward": ("dd2.divergence=forward",),
    "averaged guidance network": ("dd2.guidance.ema_decay=0.8",),
    "averaged guidance network, divergence: forward": ("dd2.guidance.ema_decay=0.8", "dd2.divergence=forward"),
    "4 draws": ("dd2.draws=4",),
    "EMA 0.9": ("dd2.training.ema_decay=0.9",),
    "Muon": ("dd2.training.optimizer=muon", "dd2.guidance.optimizer=muon"),
    "flow matching": ("ar_diffusion.target=flow_matching",),
    "ground-truth score": (),
    "the paper's head": ("ar_diffusion.head.predicts=embedding",),
    "a small head": ("ar_diffusion.head.width=16", "ar_diffusion.head.blocks=1"),
    "the paper's head, large": (
        "ar_diffusion.head.predicts=embedding",
        *("ar_diffusion.head.width=192", "ar_diffusion.head.blocks=4"),
    ),
    "the paper's head, flow matching": ("ar_diffusion.head.predicts=embedding", "ar_diffusion.target=flow_matching"),
}
SHORT_DD1: Final = {
    f"short DD1, {size} samples a step": (
        *(f"dd1.training.batch_size={size}", f"dd1.training.steps={32_000 // size}"),
        *(f"dd1.training.learning_rate={rate}", f"dd1.training.warmup_steps={1_600 // size}"),
        *("dd1.training.processes=1", f"dd1.evaluate_every={8_000 // size}"),
    )
    for size, rate in ((128, 3e-3), (64, 3e-3), (32, 1.5e-3), (16, 1.5e-3), (8, 1e-3))
}
"""Variants of DD1 alone, of as many samples in all; the rates are the best of those tried."""
VARIANTS |= SHORT_DD1
AR_DIFFUSION: Final = (
    *("flow matching", "ground-truth score", "a small head"),
    *("the paper's head", "the paper's head, flow matching", "the paper's head, large"),
)
"""Variants of the AR-diffusion model alone."""
GIVEN: Final = (
    "artifacts/features",
    "artifacts/teacher",
    "data/trajectories",
    "artifacts/dd1",
    "artifacts/ar_diffusion",
)
CURVES: Final = {
    "distill_dd1": ("dd1", ("fid_1step", "fid_2step")),
    "distill_dd2": ("dd2", ("fid_1step", "fid_2step", "recall", "diversity", "kl")),
    "ar_diffusion": ("ar_diffusion", ("fid", "excess")),
}
MADE: Final = {"ar_diffusion": "ar_diffusion", "distill_dd1": "dd1"}
"""What of GIVEN a stage makes itself."""
BACKWARD: Final = 2.0
"""Of a backward pass, in forward passes."""


def training_passes(config: Config) -> dict[str, float]:
    """Sequences' passes through a transformer of the teacher's size, of each stage for its whole training; a guided
    teacher counts twice, heads and tokenizer do not count."""
    plain = 1.0 if config.teacher.model.family == "llamagen" else 0.0
    guided = 2.0 if config.sampling.guidance > plain else 1.0
    passes = {"trajectories": guided * config.trajectories.count}
    if isinstance(dd1 := config.dd1, TrainedDD1Config):
        passes["distill_dd1"] = dd1.training.steps * dd1.training.batch_size * (1 + BACKWARD)
    if isinstance(ar := config.ar_diffusion, TrainedARDiffusionConfig):
        passes["ar_diffusion"] = ar.training.steps * ar.training.batch_size * (guided + 1 + BACKWARD)
    if isinstance(dd2 := config.dd2, TrainedDD2Config):
        guidance = dd2.guidance.batch_size * (1 + 1 + BACKWARD)
        anchor = 1 + BACKWARD if dd2.anchor_weight else 0.0
        update = dd2.training.batch_size * (1 + BACKWARD + guided + 1 + anchor)
        passes["dd2_alignment"] = dd2.guidance.alignment_steps * guidance
        passes["dd2_update"] = dd2.guidance.updates * guidance + update
    return passes


def run_variant(name: str, workspace: Path, place: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Curves, cost and CPU seconds of one variant; raises SystemExit where its stage fails."""
    stage = "ar_diffusion" if name in AR_DIFFUSION else "distill_dd1" if name in SHORT_DD1 else "distill_dd2"
    for given in GIVEN:
        if given != f"artifacts/{MADE.get(stage)}" and (workspace / given).exists():
            link = place / given
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to((workspace / given).resolve(), target_is_directory=True)
    write_params(values, place / "params.yaml")
    shutil.copy(TEMPLATE / RECIPES, place)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    if subprocess.run([sys.executable, "-m", f"ddops.stages.{stage}"], cwd=place, check=False).returncode:
        raise SystemExit(f"{name}: {stage} failed in {place}; run the same command again to go on")
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    directory, names = CURVES[stage]
    files = [place / "reports/curves" / directory / "plots/metrics" / f"{curve}.tsv" for curve in names]
    curves = {file.stem: dict(zip(*read_curve(file), strict=True)) for file in files if file.exists()}
    return {"overrides": list(VARIANTS[name]), "cpu_seconds": round(seconds, 1), "curves": curves}


def teacher_fid(workspace: Path, config: Config) -> float:
    """Of the teacher through the flow map, by the curves' ruler and from the curves' noise."""
    if not isinstance(config.dd2, TrainedDD2Config):
        raise SystemExit("a preset without DD2")
    with contextlib.chdir(workspace), torch.inference_mode():
        teacher = load_teacher(paths.TOKENIZER, paths.TRANSFORMER)

        def decode(indices_B: Indices, labels_B: Tensor) -> Tensor:
            noise_BLC = sample_noise(CURVE_SEED, indices_B, teacher, teacher.codebook_VC.shape[1])
            picker = flow_picker(teacher.layout, teacher.codebook_VC, noise_BLC, config.trajectories)
            ids_BL = sample_teacher(teacher, labels_B, config.sampling, picker)
            return teacher.decode(F.embedding(ids_BL, teacher.codebook_VC))

        return FIDCurve(config.dd2.evaluate_count, open_conditions(paths.TRAIN_CAPTIONS, teacher))(decode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--params", type=Path, default=Path("params"))
    parser.add_argument("--work", type=Path, default=Path(".ddops/dd2_variants"), help="where the variants run")
    parser.add_argument("--override", action="append", default=[], dest="overrides", metavar="section.key=value")
    arguments = parser.parse_args()
    known = {"preset": arguments.preset, "overrides": arguments.overrides}
    places = {str(arguments.workspace): "WORKSPACE", str(arguments.work): "WORK"}
    command = " ".join(places.get(word, word) for word in sys.argv)
    result: dict[str, Any] = {"command": command, **known, "variants": {}}
    if arguments.output.exists():
        earlier = json.loads(arguments.output.read_text())
        if any(earlier[key] != value for key, value in known.items()):
            raise SystemExit(f"{arguments.output} is of other settings: {earlier['preset']} {earlier['overrides']}")
        result["variants"] = earlier["variants"]
        result |= {key: earlier[key] for key in ("teacher_fid",) if key in earlier}
    result["date"] = datetime.now(UTC).date().isoformat()
    result["machine"] = f"{platform.system()} {platform.machine()}, shared"
    if "teacher_fid" not in result:
        values = compose(arguments.params, [f"preset={arguments.preset}", *arguments.overrides])
        result["teacher_fid"] = teacher_fid(arguments.workspace, validate(values, arguments.preset))
        write_json(arguments.output, result)
    for name in arguments.only:
        values = compose(arguments.params, [f"preset={arguments.preset}", *arguments.overrides, *VARIANTS[name]])
        if name not in result["variants"]:
            place = arguments.work / name.replace(" ", "_").replace(":", "").replace("'", "")
            found = run_variant(name, arguments.workspace, place, values)
            result["variants"][name] = {**found, "passes": training_passes(validate(values, name))}
            write_json(arguments.output, result)
    for name, found in result["variants"].items():
        shown = "; ".join(
            f"{curve} " + " / ".join(f"{value:.3g}" for value in points.values())
            for curve, points in found["curves"].items()
            if curve.startswith("fid")
        )
        print(f"{name}: {shown} ({found['cpu_seconds']} CPU s)")


if __name__ == "__main__":
    main()
