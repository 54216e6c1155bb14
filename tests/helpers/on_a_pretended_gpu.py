"""Every step of every training on a device that only pretends; test_training_device.py runs this in its own process."""

import pytest
import torch

from ddops.data.digits import LabelledImages
from ddops.distill.ar_diffusion import ar_diffusion_objective
from ddops.distill.dd1 import dd1_objective
from ddops.distill.dd2 import DD2Objectives
from ddops.evaluation.drawing import dd1_generator
from ddops.losses.perceptual import classifier_distance
from ddops.models.ar_diffusion import new_ar_diffusion
from ddops.models.classifier import DigitsClassifier
from ddops.models.registry import build_student, build_teacher, build_tokenizer
from ddops.models.weights_dd2 import as_backbone
from ddops.pretrain.classifier import classifier_objective
from ddops.pretrain.teacher import teacher_objective, tokenizer_objective
from ddops.training.loop import build_optimizers, frozen_copy, update, update_ema
from ddops.training.replicas import Replicas
from ddops.trajectories.dataset import TrajectoryBatch
from helpers.pretend_gpu import on, pretend_gpu
from helpers.tiny import tiny

FAMILIES = ["llamagen", "var"]


class OnTheCPU:
    """Trajectories as the reader gives them."""

    def __init__(self, teacher):
        self.length, (self.codes, self.code_dim) = teacher.layout.length, teacher.codebook_VC.shape

    def sequences(self, indices_B):
        size = len(indices_B), self.length
        return torch.randint(10, size[:1]), torch.randint(self.codes, size)

    def batch(self, indices_B, step):
        labels_B, ids_BL = self.sequences(indices_B)
        return TrajectoryBatch(labels_B, torch.randn(*ids_BL.shape, self.code_dim), ids_BL)


def classifier():
    return DigitsClassifier(channels=32, feature_dim=8, dropout=0.1)


def step(model, config, objective):
    """One step of the loop; the devices of what it logs and of what it moved."""
    optimizers, ema = build_optimizers(model, config), frozen_copy(model)
    values = objective()
    norm = update(model, optimizers, values["loss"], 1e-3, 1.0, Replicas(0, 1))
    update_ema(ema, model, 0.9)
    assert {value.device for value in values.values()} == {norm.device}
    return norm.device


def test_the_pretended_gpu_refuses_what_a_gpu_refuses():
    with pretend_gpu() as gpu:
        there, here = torch.empty(3, device=gpu), torch.empty(3)
        with pytest.raises(Exception, match="device"):
            there + here
        with pytest.raises(Exception, match="_local_scalar_dense"):
            float(there.sum())


def test_the_classifier_and_the_tokenizer_train_on_the_models_device():
    images = torch.zeros(20, 1, 8, 8)
    with pretend_gpu() as gpu:
        judge = on(gpu, classifier)
        learn = classifier_objective(LabelledImages(images, torch.zeros(20, dtype=torch.int64)))
        config = tiny().features.training
        assert step(judge, config, lambda: learn(judge, torch.arange(4), 0)) == gpu
        config = tiny().teacher
        tokenizer = on(gpu, lambda: build_tokenizer(config.model))
        rebuild = tokenizer_objective(images, config.codebook_weight)
        assert step(tokenizer, config.tokenizer_training, lambda: rebuild(tokenizer, torch.arange(4), 0)) == gpu


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_trains_on_its_device(family):
    config = tiny(family).teacher
    with pretend_gpu() as gpu:
        teacher = on(gpu, lambda: build_teacher(config.model))
        teacher.tokenizer.requires_grad_(False)
        labels_N, ids_NL = torch.zeros(20, dtype=torch.int64), torch.zeros(20, teacher.layout.length, dtype=torch.int64)
        learn = teacher_objective(ids_NL, labels_N, label_dropout=0.1, token_dropout=0.3)
        assert step(teacher, config.training, lambda: learn(teacher, torch.arange(4), 0)) == gpu


@pytest.mark.parametrize("family", FAMILIES)
def test_dd1_trains_and_is_watched_on_its_device(family):
    config = tiny(family)
    with pretend_gpu() as gpu:
        teacher = on(gpu, lambda: build_teacher(config.teacher.model)).requires_grad_(False).eval()
        student = on(gpu, lambda: build_student(config.teacher.model))
        distance = classifier_distance(on(gpu, classifier))
        learn = dd1_objective(teacher, OnTheCPU(teacher), config.dd1, distance)
        assert step(student, config.dd1.training, lambda: learn(student, torch.arange(4), 0)) == gpu
        labels_B, noise_BLC, _ = OnTheCPU(teacher).batch(torch.arange(4), 0)
        assert dd1_generator(student, teacher, config.dd1, 2)(noise_BLC, labels_B).device == gpu


@pytest.mark.parametrize("family", FAMILIES)
def test_dd2_and_its_ar_diffusion_model_train_on_their_device(family):
    config = tiny(family)
    with pretend_gpu() as gpu:
        teacher = as_backbone(on(gpu, lambda: build_teacher(config.teacher.model)).requires_grad_(False).eval())
        data = OnTheCPU(teacher)
        model = on(gpu, lambda: new_ar_diffusion(build_teacher(config.teacher.model), config.ar_diffusion.head))
        learn = ar_diffusion_objective(teacher, data, config.ar_diffusion, config.sampling)
        assert step(model, config.ar_diffusion.training, lambda: learn(model, torch.arange(4), 0)) == gpu
        generator = on(gpu, lambda: build_student(config.teacher.model))
        for guidance in (model, on(gpu, lambda: new_ar_diffusion(build_teacher(config.teacher.model), None))):
            objectives = DD2Objectives(teacher, data, config.dd2, config.sampling, config.dd1.start_positions)
            aligned = step(guidance, config.dd2.guidance, lambda: objectives.guidance(generator, guidance, 4))  # noqa: B023
            moved = step(
                generator,
                config.dd2.training,
                lambda: objectives.generator(generator, guidance, torch.arange(4), 0),  # noqa: B023
            )
            assert aligned == moved == gpu
