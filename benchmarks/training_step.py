"""Time, memory and arithmetic of a training step of DD1 and DD2 beside the computed floor, and where the time goes.

    python benchmarks/training_step.py --output benchmarks/results/training_step.json [--cases digits_dd1 ...]

The digits cases are the preset's own; the published ones have its widths, tokens and codebook, fewer blocks, random
weights and one sample, since a CPU takes minutes for a full step. The floor is the step's FLOPs (counted operator by
operator) over the rate of a large float32 matrix product in the same process; both by CPU time. Each case runs in a
process of its own, so that its peak of resident memory is its own; settings of one case are timed in turns.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import has_bfloat16, run_cases
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from untrained import random_lpips

from ddops.config.evaluation import DigitsFeaturesConfig
from ddops.config.load import compose, validate
from ddops.config.stages import Config, TrainedDD1Config
from ddops.costs.ledger import Ledger
from ddops.distill.dd1 import dd1_objective, perceptual_term
from ddops.distill.dd2 import DD2Objectives
from ddops.evaluation.judge import new_classifier
from ddops.losses.perceptual import classifier_distance
from ddops.models.ar_diffusion import new_ar_diffusion
from ddops.models.interface import Student, Teacher
from ddops.models.registry import build_student, build_teacher
from ddops.models.weights_dd2 import as_backbone
from ddops.training.loop import build_optimizers, compile_blocks, frozen_copy, update, update_ema
from ddops.training.replicas import Replicas
from ddops.trajectories.dataset import TrajectoryBatch

CASES: dict[str, tuple[str, list[str], int, int]] = {
    "digits_dd1": ("digits", [], 128, 5),
    "digits_dd2": ("digits", [], 128, 3),
    "var_d16_dd1": ("var_d16", ["teacher.model.depth=2"], 1, 2),
    "llamagen_l_dd1": ("llamagen_l", ["teacher.model.depth=2"], 1, 2),
    "var_d16_perceptual": ("var_d16", ["teacher.model.depth=1"], 1, 1),
}
"""Preset, overrides, samples a step and rounds."""
ONE = Replicas(0, 1)
Step = Callable[[], Any]


class Fixed:
    """The same random trajectories at every step."""

    def __init__(self, teacher: Teacher) -> None:
        self.layout, self.codebook_VC, self.classes = teacher.layout, teacher.codebook_VC, teacher.num_conditions

    def batch(self, indices_B: Tensor, step: int) -> TrajectoryBatch:
        """As a reader's."""
        generator = torch.Generator().manual_seed(0)
        shape = len(indices_B), self.layout.length
        return TrajectoryBatch(
            torch.randint(self.classes, shape[:1], generator=generator),
            torch.randn(*shape, self.codebook_VC.shape[1], generator=generator),
            torch.randint(len(self.codebook_VC), shape, generator=generator),
        )


def no_distance(a_BIHW: Tensor, b_BIHW: Tensor) -> Tensor:
    """Stands in for LPIPS where the perceptual term is measured by itself."""
    return (a_BIHW - b_BIHW).square().mean((1, 2, 3))


def dd1_step(config: Config, teacher: Teacher, batch: int, *, decode: bool, compiled: bool = False) -> Step:
    """Objective, backward pass, optimiser, EMA; without the decoder where ``decode`` is false."""
    assert isinstance(config.dd1, TrainedDD1Config)
    student = build_student(config.teacher.model)
    student.init_from_teacher(teacher)
    if not decode:
        teacher.decode = lambda q_BLC: q_BLC[..., None]  # type: ignore[method-assign]
    distance = no_distance
    if decode:
        assert isinstance(config.features, DigitsFeaturesConfig)
        distance = classifier_distance(new_classifier(config.features))
    objective = dd1_objective(teacher, Fixed(teacher), config.dd1, distance)
    optimizers, ema = build_optimizers(student, config.dd1.training), frozen_copy(student)
    if compiled:
        compile_blocks(student)

    def step() -> None:
        values = objective(student, torch.arange(batch), 0)
        update(student, optimizers, values["loss"], 1e-4, 1.0, ONE)
        update_ema(ema, student, 0.9)

    return step


def dd2_steps(config: Config, teacher: Teacher, batch: int) -> dict[str, Step]:
    """One update of each network."""
    assert config.dd2.source == "train"
    generator: Student = build_student(config.teacher.model)
    generator.init_from_teacher(teacher)
    guidance = new_ar_diffusion(as_backbone(teacher), None)
    objectives = DD2Objectives(teacher, Fixed(teacher), config.dd2, config.sampling, config.dd1.start_positions)
    optimizers, ema = build_optimizers(generator, config.dd2.training), frozen_copy(generator)
    guidance_optimizers = build_optimizers(guidance, config.dd2.guidance)

    def guidance_step() -> None:
        values = objectives.guidance(generator, guidance, batch)
        update(guidance, guidance_optimizers, values["loss"], 1e-4, 1.0, ONE)

    def generator_step() -> None:
        values = objectives.generator(generator, guidance, torch.arange(batch), 0)
        update(generator, optimizers, values["loss"], 1e-4, 1.0, ONE)
        update_ema(ema, generator, 0.9)

    return {"guidance": guidance_step, "generator": generator_step}


def perceptual_steps(teacher: Teacher) -> dict[str, Step]:
    """Decoding a prediction and a target, LPIPS, and the gradient in the prediction, in each setting."""
    generator = torch.Generator().manual_seed(0)
    shape = 1, teacher.layout.length, teacher.codebook_VC.shape[1]
    predicted_BLC = torch.randn(shape, generator=generator).requires_grad_()
    target_BLC = torch.randn(shape, generator=generator)

    def step(memory_format: torch.memory_format, *, half: bool) -> None:
        teacher.tokenizer.to(memory_format=memory_format)  # type: ignore[call-overload]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            term = perceptual_term(teacher, distances[memory_format], predicted_BLC, target_BLC).sum()
        torch.autograd.grad(term, predicted_BLC)

    formats = torch.contiguous_format, torch.channels_last
    distances = {memory_format: random_lpips(memory_format) for memory_format in formats}
    steps: dict[str, Step] = {
        "float32": lambda: step(torch.contiguous_format, half=False),
        "float32, channels last": lambda: step(torch.channels_last, half=False),
    }
    if has_bfloat16():
        steps["bfloat16, channels last"] = lambda: step(torch.channels_last, half=True)
    return steps


def matmul_rate(size: int = 1536) -> float:
    """Operations a second of a float32 matrix product."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(4))


def seconds(step: Step) -> float:
    """CPU time of one call on one thread: other programs take turns with this one, and the wall's clock runs on."""
    begun = time.process_time()
    step()
    return time.process_time() - begun


def measure(case: str, params: Path) -> dict[str, Any]:
    """A case's settings, each with its times, floor and largest operators."""
    preset, overrides, batch, rounds = CASES[case]
    config = validate(compose(params, [f"preset={preset}", *overrides]), preset)
    torch.manual_seed(0)
    teacher = build_teacher(config.teacher.model).requires_grad_(False).eval()
    rate = matmul_rate()
    before = _peak()
    if case.endswith("_perceptual"):
        steps = perceptual_steps(teacher)
    elif case.endswith("_dd2"):
        steps = dd2_steps(config, teacher, batch)
    else:
        decode = preset == "digits"
        steps = {
            "step": dd1_step(config, teacher, batch, decode=decode),
            "step, blocks compiled": dd1_step(config, teacher, batch, decode=decode, compiled=True),
        }
    result: dict[str, Any] = {"preset": preset, "overrides": overrides, "batch": batch, "matmul_gflops": rate / 1e9}
    flops = {}
    for name, step in steps.items():
        if flops and not case.endswith("_dd2"):
            # The same work in another way. Warmed up too, but where a pass takes a minute.
            flops[name] = next(iter(flops.values()))
            if not case.endswith("_perceptual"):
                step()
            continue
        with Ledger() as ledger:
            step()
        flops[name] = ledger.flops
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step))
    for name in steps:
        median = statistics.median(times[name])
        result[name] = {
            "seconds": {"median": median, "min": min(times[name]), "max": max(times[name])},
            "gflop": flops[name] / 1e9,
            "floor_seconds": flops[name] / rate,
            "utilisation": flops[name] / rate / median,
        }
    result["peak_memory_gb"] = _peak() / 1e9
    result["of_which_before_the_step_gb"] = before / 1e9
    name, step = next(iter(steps.items()))
    if batch > 1 or case.endswith("_dd1"):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step()
        events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in events)
        result["largest_shares"] = {event.key: round(event.self_cpu_time_total / total, 3) for event in events[:8]}
    return result


def _peak() -> float:
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    run_cases(__doc__, CASES, measure)
