"""Training at full size on a GPU: every phase of a published preset at its batch, with random weights.

    python benchmarks/full_size.py measure --output benchmarks/results/full_size_h200.json        # on the GPU
    python benchmarks/full_size.py plan --output benchmarks/results/full_size_h200.json --device h200   # anywhere

``measure`` runs the stages' own code (files of weights, trajectories by the flow map, the training loops with the
published losses): only the weights are random, LPIPS' too, the steps few, and no checkpoint is written. A step's time
is that between two moments on the device's own clock, which nothing waits for. Each preset runs in a process of its
own, whose results are written phase by phase. ``plan`` adds what ``ddops plan`` predicts, and the share of the card's
arithmetic that was used: a step's FLOPs, counted operator by operator, over its time and the rate of a large product.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from lean import matmul_tflops
from torch import Tensor, nn
from untrained import random_lpips, with_weights

from ddops.config.dd2 import TrainedARDiffusionConfig, TrainedDD2Config
from ddops.config.load import compose, validate
from ddops.config.stages import Config, TrainedDD1Config
from ddops.config.training import TrainingConfig
from ddops.costs.devices import find_device
from ddops.costs.stages import StageCost, predict
from ddops.distill.ar_diffusion import ar_diffusion_objective
from ddops.distill.dd1 import dd1_objective
from ddops.distill.dd2 import DD2Objectives
from ddops.files import write_json
from ddops.models.ar_diffusion import new_ar_diffusion
from ddops.models.interface import BackboneTeacher, Student
from ddops.models.registry import build_student, build_teacher
from ddops.models.weights import TOKENIZER, TRANSFORMER, load_teacher, save_weights
from ddops.models.weights_dd2 import as_backbone
from ddops.training.alternating import train_alternating
from ddops.training.checkpoint import CheckpointFile
from ddops.training.loop import seeded, train
from ddops.training.schedule import batch_indices
from ddops.trajectories.dataset import TrajectoryDataset
from ddops.trajectories.generate import Job, SavedTeacher, generate
from ddops.trajectories.reader import batch_source

PRESETS: Final = ("var_d16_dd2", "llamagen_l_dd2")
PHASES: Final = ("trajectories", "distill_dd1", "ar_diffusion", "distill_dd2", "distill_dd1_float32")
"""In the order in which they run."""
BATCHES: Final = 3
"""Of trajectories."""
WARM_UP: Final = 5
"""Steps that are not timed."""
FLOAT32_STEPS: Final = 15
SEED: Final = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("measure", "one", "plan"), help="one: a preset, in this process")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS)
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--steps", type=int, default=100, help="of each training phase")
    parser.add_argument("--params", type=Path, default=Path("params"))
    parser.add_argument("--work", type=Path, default=Path(".ddops/full_size"), help="removed by nobody: 2 GB a preset")
    parser.add_argument("--device", default="h200", help="plan: the card in ddops' table")
    parser.add_argument("--overrides", nargs="+", default=[], help="section.key=value")
    arguments = parser.parse_args()
    if arguments.action == "measure":
        command = [sys.executable, sys.argv[0], "one", *sys.argv[2:]]
        runs = [subprocess.run([*command, "--presets", preset], check=False) for preset in arguments.presets]
        raise SystemExit(max(run.returncode != 0 for run in runs))
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    for preset in arguments.presets:
        values = compose(arguments.params, [f"preset={preset}", *arguments.overrides])
        config = validate(values, preset)
        if arguments.action == "one":
            measure(results, arguments, preset, config)
        else:
            results[preset]["plan"] = compare(results[preset], config, arguments.device)
            write_json(arguments.output, results)


def measure(results: dict[str, Any], arguments: argparse.Namespace, preset: str, config: Config) -> None:
    """Run the phases asked for; the file is written after each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results["date"], results["torch"] = datetime.now(UTC).date().isoformat(), torch.__version__
    results["machine"] = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    results.setdefault("commands", []).append(" ".join(["python", *sys.argv]))
    row: dict[str, Any] = results.setdefault(preset, {})
    bench = Bench(config, arguments.work / preset, device, arguments.steps)
    bench.prepare()
    if device.type == "cuda":
        row["matmul_tflops"] = matmul_tflops()
        row["memory_gb"] = torch.cuda.get_device_properties(device).total_memory / 1e9
    for phase in arguments.phases:
        begun = time.monotonic()
        try:
            figures = getattr(bench, phase)()
        except torch.OutOfMemoryError as error:
            figures = {"out_of_memory": str(error).splitlines()[0][:300]}
        row[phase] = {**figures, "whole_phase_seconds": round(time.monotonic() - begun, 1)}
        print(preset, phase, json.dumps(row[phase]), flush=True)
        write_json(arguments.output, results)


@dataclass
class Marks:
    """Moments on the device's own clock, and the losses at them."""

    device: torch.device
    names: list[str] = field(default_factory=list)
    moments: list[Any] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    def begin(self, name: str) -> None:
        """A step of this kind begins, and with it the one before has ended."""
        self.names.append(name)
        if self.device.type == "cuda":
            self.moments.append(torch.cuda.Event(enable_timing=True))
            self.moments[-1].record()
        else:
            self.moments.append(time.perf_counter())

    def objective(self, name: str, objective: Callable[..., Mapping[str, Tensor]]) -> Callable[..., Any]:
        """The same objective, noted."""

        def noted(*arguments: Any) -> Mapping[str, Tensor]:
            self.begin(name)
            values = objective(*arguments)
            self.losses.append(values["loss"].detach())
            return values

        return noted

    def seconds(self) -> list[float]:
        """Between each moment and the next."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in pairwise(self.moments)]
        return [b - a for a, b in pairwise(self.moments)]

    def figures(self, keep: Callable[[int], bool] = lambda index: True) -> dict[str, Any]:
        """Of those steps whose place passes ``keep``, the first few left out of the times."""
        taken, losses = self.seconds(), [float(loss) for loss in self.losses]
        kept = [index for index in range(len(taken)) if keep(index)]
        times = sorted(taken[index] for index in kept[min(WARM_UP, len(kept) - 1) :])
        return {
            "steps": len(kept),
            "seconds": {"median": statistics.median(times), "min": times[0], "max": times[-1]},
            "loss": {"first": losses[kept[0]], "last": losses[kept[-1]]},
            "finite": all(math.isfinite(loss) for loss in losses),
        }


class Unsaved(CheckpointFile):
    """No checkpoint: gigabytes, and nothing is resumed."""

    def save(self, state: dict[str, Any]) -> None:
        """Nothing."""


class Bench:
    """The phases of one preset in a directory of its own."""

    def __init__(self, config: Config, work: Path, device: torch.device, steps: int) -> None:
        self.config, self.work, self.device, self.steps = config, work, device, steps
        self.files = work / "tokenizer.safetensors", work / "transformer.safetensors"

    def prepare(self) -> None:
        """A teacher's files, as the stage of that name leaves them."""
        model = self.config.teacher.model
        with self.device:
            teacher = with_weights(seeded(SEED, lambda: build_teacher(model)))
        for path, name in zip(self.files, (TOKENIZER, TRANSFORMER), strict=True):
            save_weights(path, teacher.get_submodule(name).state_dict(), model, name)

    def trajectories(self) -> dict[str, Any]:
        """A few batches of as many as fit."""
        teacher = SavedTeacher.of(*self.files, self.work / "captions")
        section = self.config.trajectories
        if section.batch_size == "auto":
            section = replace(section, batch_size=teacher.fitting_batch(1, section.precision))
        size = int(section.batch_size)
        section = replace(section, count=BATCHES * size, shard_size=size)
        with Peak(self.device) as peak:
            job = Job.of(teacher, section, self.config.sampling, SEED, self.work / "trajectories")
            found = generate(job, replace=True)
        teacher.__call__.cache_clear()  # type: ignore[attr-defined]
        return {"batch": size, "precision": section.precision, **found, **peak.figures()}

    def distill_dd1(self, precision: str = "bfloat16", steps: int | None = None) -> dict[str, Any]:
        """DD1's student."""
        assert isinstance(self.config.dd1, TrainedDD1Config)
        dd1 = replace(self.config.dd1, training=self._short(self.config.dd1.training, steps, precision=precision))
        with Peak(self.device) as peak:
            teacher, student, dataset, marks = self._opened()
            lie = torch.channels_last if dd1.perceptual.channels_last else torch.contiguous_format
            teacher.tokenizer.to(memory_format=lie)  # type: ignore[call-overload]
            batches = batch_source(
                dataset, lambda step: batch_indices(SEED, step, dd1.training.batch_size, len(dataset)), self.device
            )
            objective = dd1_objective(teacher, batches, dd1, random_lpips(lie, self.device))
            self._train(student, marks.objective("step", objective), dd1.training, dataset, "dd1")
            marks.begin("end")
        return {**_said(dd1.training), **marks.figures(), **peak.figures()}

    def distill_dd1_float32(self) -> dict[str, Any]:
        """The same in float32, fewer steps."""
        return self.distill_dd1("float32", min(self.steps, FLOAT32_STEPS))

    def ar_diffusion(self) -> dict[str, Any]:
        """DD2's AR-diffusion model."""
        assert isinstance(self.config.ar_diffusion, TrainedARDiffusionConfig)
        section = self.config.ar_diffusion
        training = self._short(section.training)
        with Peak(self.device) as peak:
            teacher, _, dataset, marks = self._opened()
            model = seeded(SEED, lambda: new_ar_diffusion(teacher, section.head)).to(self.device)
            objective = ar_diffusion_objective(teacher, dataset, section, self.config.sampling)
            self._train(model, marks.objective("step", objective), training, dataset, "ar_diffusion")
            marks.begin("end")
        return {**_said(training), **marks.figures(), **peak.figures()}

    def distill_dd2(self) -> dict[str, Any]:
        """Alignment, then the alternating updates. A student that begins at the teacher stands for DD1's."""
        dd2 = self.config.dd2
        assert isinstance(dd2, TrainedDD2Config)
        guidance = replace(dd2.guidance, alignment_steps=self.steps)
        dd2 = replace(dd2, guidance=guidance, training=self._short(dd2.training))
        with Peak(self.device) as peak:
            teacher, generator, dataset, marks = self._opened()
            network = new_ar_diffusion(teacher, None).to(self.device).train()
            batches = batch_source(
                dataset, lambda step: batch_indices(SEED, step, dd2.training.batch_size, len(dataset)), self.device
            )
            objectives = DD2Objectives(teacher, batches, dd2, self.config.sampling, self.config.dd1.start_positions)
            train_alternating(
                generator,
                network,
                Noted(objectives, marks),
                config=dd2.training,
                guidance_config=guidance,
                seed=SEED,
                dataset_size=len(dataset),
                checkpoint=self._checkpoint(),
                curves_dir=self.work / "curves/dd2",
                description="dd2 generator",
            )
            marks.begin("end")
        kinds = {
            "alignment": lambda index: index < self.steps,
            "guidance": lambda index: index >= self.steps and marks.names[index] == "guidance",
            "generator": lambda index: marks.names[index] == "generator",
        }
        return {
            **_said(dd2.training),
            "guidance_updates": guidance.updates,
            **{name: marks.figures(keep) for name, keep in kinds.items()},
            **peak.figures(),
        }

    # what the phases share

    def _short(self, training: TrainingConfig, steps: int | None = None, **changes: Any) -> TrainingConfig:
        """The preset's optimisation, cut to the steps of this run."""
        steps = steps or self.steps
        return replace(training, steps=steps, warmup_steps=min(training.warmup_steps, steps // 2), **changes)

    def _opened(self) -> tuple[BackboneTeacher, Student, TrajectoryDataset, Marks]:
        """As the stages open them, but built where they are used: that is sooner done."""
        with self.device:
            teacher = as_backbone(load_teacher(*self.files).requires_grad_(False))
            student = seeded(SEED, lambda: build_student(teacher.config))
        student.init_from_teacher(teacher)
        dataset = TrajectoryDataset(self.work / "trajectories", teacher.codebook_VC.shape[1])
        return teacher, student.train(), dataset, Marks(self.device)

    def _train(
        self, model: nn.Module, objective: Any, training: TrainingConfig, dataset: TrajectoryDataset, name: str
    ) -> None:
        train(
            model,
            objective,
            config=training,
            seed=SEED,
            dataset_size=len(dataset),
            checkpoint=self._checkpoint(),
            curves_dir=self.work / "curves" / name,
            description=name,
        )

    def _checkpoint(self) -> CheckpointFile:
        return Unsaved(self.work / "none.pt", "")


class Noted:
    """DD2's objectives, noted."""

    def __init__(self, objectives: DD2Objectives, marks: Marks) -> None:
        self.guidance = marks.objective("guidance", objectives.guidance)
        self.generator = marks.objective("generator", objectives.generator)


class Peak:
    """The most memory of the device that its body held."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def __enter__(self) -> Peak:
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_: object) -> None:
        self.held, self.reserved = (
            (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if self.cuda else (0, 0)
        )

    def figures(self) -> dict[str, float]:
        """In GB: by tensors, and by PyTorch."""
        return {"peak_memory_gb": self.held / 1e9, "reserved_memory_gb": self.reserved / 1e9}


def _said(training: TrainingConfig) -> dict[str, Any]:
    return {"batch": training.batch_size, "precision": training.precision}


def compare(row: Mapping[str, Any], config: Config, device: str) -> dict[str, Any]:
    """What is predicted for the phases that were measured, beside it; arithmetic used as a share of the product's."""
    assert isinstance(config.dd1, TrainedDD1Config)
    whole = replace(config, dd1=replace(config.dd1, training=replace(config.dd1.training, precision="float32")))
    found: dict[str, Any] = {}
    card = find_device(device)
    costs = {"distill_dd1_float32": predict(whole, card)["distill_dd1"], **predict(config, card)}
    for phase in PHASES:
        if "out_of_memory" in row.get(phase, {"out_of_memory"}):
            continue
        found[phase] = _beside(row[phase], costs[phase], config, phase)
        if "matmul_tflops" in row:
            found[phase]["share_of_the_product's_rate"] = found[phase]["tflop_a_second"] / row["matmul_tflops"]
    return found


def _beside(row: Mapping[str, Any], cost: StageCost, config: Config, phase: str) -> dict[str, float]:
    """Of a whole stage's FLOPs and seconds, those of what was measured."""
    dd2 = config.dd2
    assert isinstance(config.dd1, TrainedDD1Config)
    assert isinstance(config.ar_diffusion, TrainedARDiffusionConfig)
    assert isinstance(dd2, TrainedDD2Config)
    if phase == "trajectories":
        seconds, times = 1.0 / row["samples_per_second"], float(config.trajectories.count)
    elif phase == "distill_dd2":
        updates = dd2.guidance.updates + dd2.guidance.alignment_steps / dd2.training.steps
        seconds = updates * row["guidance"]["seconds"]["median"] + row["generator"]["seconds"]["median"]
        times = float(dd2.training.steps)
    else:
        training = config.ar_diffusion.training if phase == "ar_diffusion" else config.dd1.training
        seconds, times = row["seconds"]["median"], float(training.steps)
    return {
        "tflop": cost.flops / times / 1e12,
        "tflop_a_second": cost.flops / times / seconds / 1e12,
        "predicted_over_measured_seconds": cost.seconds / times / seconds,
        "predicted_memory_gb": cost.memory / 1e9,
        "whole_stage_hours": times * seconds / 3600,
    }


if __name__ == "__main__":
    main()
