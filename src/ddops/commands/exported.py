"""The exported graph judged as a model is: its own samples, the protocol's ruler."""

from __future__ import annotations

import torch
from torch import Tensor

from ddops.captions.conditions import open_conditions
from ddops.config.stages import Config
from ddops.evaluation.drawing import Indices, Request, draw_batches, sample_noise
from ddops.evaluation.protocols import open_protocol
from ddops.evaluation.ruler import open_ruler
from ddops.export.manifest import MODEL
from ddops.export.session import open_session, run_session
from ddops.models.weights_dd2 import load_generator
from ddops.stages import paths
from ddops.stages.statistics import statistics_file


def judge_exported(config: Config) -> dict[str, float]:
    """Every figure of the ONNX graph at the protocol's first seed, with the noise and labels of the student's row."""
    student = load_generator(paths.TOKENIZER, paths.STUDENTS[config.export.student])
    session = open_session(paths.ONNX_BUNDLE / MODEL)
    code_dim = config.teacher.model.code_dim

    def draw(seed: int, indices_B: Indices, labels_B: Tensor) -> Tensor:
        noise_BLC = sample_noise(seed, indices_B, student, code_dim)
        return torch.from_numpy(run_session(session, noise_BLC.numpy(), labels_B.numpy()))

    protocol, seed = open_protocol(config.evaluate), config.evaluate.seeds[0]
    ruler = open_ruler(config.evaluate, paths.CLASSIFIER, statistics_file(config.evaluate))
    conditions = open_conditions(paths.EVALUATE_CAPTIONS, student)
    labels_N = protocol.labels(seed, conditions)
    request = Request(labels_N, config.evaluate.batch_size)
    return ruler.figures(
        draw_batches(draw, request, seed, "exported", protocol.image_size), conditions.classes_K[labels_N]
    )
