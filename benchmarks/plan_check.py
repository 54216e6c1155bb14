"""The cost model of `ddops plan` beside what the same things take on this machine.

    python benchmarks/plan_check.py --output benchmarks/results/plan_check.json [--cases digits ...]

Before and after each measurement the machine is probed (as `ddops plan --device this` does), and what is predicted is
the mean of both. One thread, and its CPU time instead of the clock on the wall, in the probe and in what is measured:
other programs take turns with this one.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import run_cases
from torch import Tensor

from ddops.config.evaluation import DigitsFeaturesConfig
from ddops.config.load import compose, validate
from ddops.config.stages import Config, TrainedDD1Config, TrainedTeacherConfig
from ddops.costs import passes
from ddops.costs.devices import probe
from ddops.costs.ledger import shapes_only
from ddops.costs.passes import ALONE, Shapes, Step, Work
from ddops.distill.dd1 import dd1_objective
from ddops.distill.dd2 import DD2Objectives
from ddops.evaluation.judge import new_classifier
from ddops.losses.perceptual import classifier_distance
from ddops.models.ar_diffusion import new_ar_diffusion
from ddops.models.registry import build_student, build_teacher
from ddops.models.weights_dd2 import as_backbone
from ddops.pretrain.teacher import teacher_objective
from ddops.sampling.few_step import sample_student
from ddops.sampling.teacher import flow_picker, sample_teacher
from ddops.training.loop import build_optimizers, frozen_copy, update, update_ema
from ddops.trajectories.generate import trajectory_noise

FULL_SIZE = ("var_d16", "llamagen_l")
CASES = ("digits", "digits_var", *FULL_SIZE)
DIGITS_BATCH = 250
ROUNDS = {"digits": 3, "digits_var": 3, "var_d16": 2, "llamagen_l": 2}
NOISE_SAMPLES, NOISE_ROUNDS = 64, 5
CLOCK = time.process_time
Run = Callable[[], Any]


def predictions(config: Config, *, full_size: bool) -> dict[str, list[Work]]:
    """What each measured thing is made of."""
    model = config.teacher.model
    with shapes_only():
        teacher, student = passes.teacher_and_student(model)
        if full_size:
            return {
                "student, one step": [passes.student_work(teacher, student, config, 1, 1)],
                "decoder": [passes.decode_work(teacher, 1)],
                "teacher": passes.teacher_work(teacher, config, 1),
            }
        sampling = passes.teacher_work(teacher, config, DIGITS_BATCH)
        assert isinstance(config.dd1, TrainedDD1Config)
        assert isinstance(config.teacher, TrainedTeacherConfig)
        guidance, generator = passes.dd2_steps(teacher, student, config)
        steps = {
            "teacher's step": passes.teacher_steps(teacher, config.teacher)[1],
            "distill_dd1's step": passes.dd1_step(teacher, student, config.dd1, config.features),
            "distill_dd2's guidance step": guidance,
            "distill_dd2's generator step": generator,
        }
    flow = passes.map_work(model, config.trajectories, DIGITS_BATCH, "cpu")
    return {
        f"{DIGITS_BATCH} trajectories": sampling + flow,
        **{name: [_work(step)] for name, step in steps.items()},
    }


def _work(step: Step) -> Work:
    return Work(step.operators)


def full_size_runs(config: Config) -> dict[str, Run]:
    """One image."""
    teacher, student = build_teacher(config.teacher.model).eval(), build_student(config.teacher.model).eval()
    noise_BLC = trajectory_noise(0, torch.arange(1).numpy(), (teacher.layout.length, teacher.codebook_VC.shape[1]))
    label_B, prefix = torch.zeros(1, dtype=torch.long), config.dd1.logit_prefix

    @torch.inference_mode()
    def draw() -> Tensor:
        return sample_student(student, teacher.codebook_VC, noise_BLC, label_B, (0,), prefix)

    @torch.inference_mode()
    def decode() -> Tensor:
        return teacher.decode(noise_BLC)

    def sample() -> Tensor:
        return sample_teacher(teacher, label_B, config.sampling, lambda level, log_p_BlV: log_p_BlV.argmax(-1))

    return {"student, one step": draw, "decoder": decode, "teacher": sample}


def noise_row(config: Config) -> dict[str, float]:
    """Of a thread, which the plan counts at one rate whatever the machine."""
    model = config.teacher.model
    shape, times = (sum(model.level_sizes), model.code_dim), []
    for first in range(0, NOISE_ROUNDS * NOISE_SAMPLES, NOISE_SAMPLES):
        begun = CLOCK()
        trajectory_noise(0, torch.arange(first, first + NOISE_SAMPLES).numpy(), shape)
        times.append(CLOCK() - begun)
    took, guess = statistics.median(times), NOISE_SAMPLES * passes.noise_seconds(model)
    return {"measured_seconds": took, "predicted_seconds": guess, "predicted_over_measured": guess / took}


def digits_runs(config: Config) -> dict[str, Run]:
    """A batch of trajectories, and the steps of the stages that train."""
    assert isinstance(config.dd1, TrainedDD1Config)
    assert isinstance(config.teacher, TrainedTeacherConfig)
    assert isinstance(config.features, DigitsFeaturesConfig)
    assert config.dd2.source == "train"
    dd1, dd2, learning = config.dd1, config.dd2, config.teacher
    teacher = build_teacher(learning.model).eval().requires_grad_(False)
    shape = teacher.layout.length, teacher.codebook_VC.shape[1]
    noise_BLC = trajectory_noise(0, torch.arange(DIGITS_BATCH).numpy(), shape)
    labels_B = torch.arange(DIGITS_BATCH) % 10
    student, learner = build_student(learning.model), build_teacher(learning.model)
    learner.tokenizer.requires_grad_(False)
    guidance, data = new_ar_diffusion(as_backbone(teacher), None), Shapes(teacher)
    ids_NL = torch.zeros(learning.training.batch_size, shape[0], dtype=torch.long)
    dropouts = {"label_dropout": learning.label_dropout, "token_dropout": learning.token_dropout}
    learn = teacher_objective(ids_NL, ids_NL[:, 0], **dropouts)
    objective = dd1_objective(teacher, data, dd1, classifier_distance(new_classifier(config.features)))
    objectives = DD2Objectives(teacher, data, dd2, config.sampling, dd1.start_positions)
    networks = {
        "teacher": (learner, learning.training),
        "student": (student, dd1.training),
        "guidance": (guidance, dd2.training),
    }
    optimizers = {name: build_optimizers(*pair) for name, pair in networks.items()}
    averages = {name: frozen_copy(pair[0]) for name, pair in networks.items()}

    def trajectories() -> Tensor:
        pick = flow_picker(teacher.layout, teacher.codebook_VC, noise_BLC, config.trajectories)
        return sample_teacher(teacher, labels_B, config.sampling, pick)

    def train(name: str, loss: Tensor, *, ema: bool = True) -> None:
        model, training = networks[name]
        update(model, optimizers[name], loss, 1e-5, training.gradient_clip, ALONE)
        if ema:
            update_ema(averages[name], model, 0.9)

    every = {name: torch.arange(pair[1].batch_size) for name, pair in networks.items()}
    count = dd2.guidance.batch_size
    return {
        f"{DIGITS_BATCH} trajectories": trajectories,
        "teacher's step": lambda: train("teacher", learn(learner, every["teacher"], 0)["loss"]),
        "distill_dd1's step": lambda: train("student", objective(student, every["student"], 0)["loss"]),
        "distill_dd2's guidance step": lambda: train(
            "guidance", objectives.guidance(student, guidance, count)["loss"], ema=False
        ),
        "distill_dd2's generator step": lambda: train(
            "student", objectives.generator(student, guidance, every["guidance"], 0)["loss"]
        ),
    }


def measure(case: str, params: Path) -> dict[str, Any]:
    """Each thing's time, measured and predicted."""
    config = validate(compose(params, [f"preset={case}"]), case)
    torch.manual_seed(0)
    predicted = predictions(config, full_size=case in FULL_SIZE)
    runs = full_size_runs(config) if case in FULL_SIZE else digits_runs(config)
    rows: dict[str, Any] = {}
    for name, run in runs.items():
        run()
        times, expected = [], []
        for _ in range(ROUNDS[case]):
            before = probe(CLOCK)
            begun = CLOCK()
            run()
            times.append(CLOCK() - begun)
            after = probe(CLOCK)
            seconds = [
                sum(work.times * device.seconds(work.operators) for work in predicted[name])
                for device in (before, after)
            ]
            expected.append(statistics.mean(seconds))
        rows[name] = {
            "measured_seconds": statistics.median(times),
            "predicted_seconds": statistics.median(expected),
            "predicted_over_measured": statistics.median(
                guess / took for guess, took in zip(expected, times, strict=True)
            ),
            "gflop": sum(work.flops for work in predicted[name]) / 1e9,
        }
    if case in FULL_SIZE:
        rows[f"noise of {NOISE_SAMPLES} samples"] = noise_row(config)
    rows["last_probe"] = {
        "gflops": after.flops / 1e9,
        "gigabytes_a_second": after.bandwidth / 1e9,
        "launch_microseconds": after.launch * 1e6,
    }
    rows["peak_memory_gb"] = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
    return rows


if __name__ == "__main__":
    run_cases(__doc__, CASES, measure)
