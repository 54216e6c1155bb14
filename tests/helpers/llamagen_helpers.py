"""The tiny LlamaGen configuration of the golden files, models loaded from them, and the published sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor, nn

from ddops.config.models import AutoencoderConfig, CaptionShape, LlamaGenConfig, SamplingConfig
from ddops.models.checkpoints_llamagen import llamagen_student_state, llamagen_teacher_state
from ddops.models.checkpoints_tokenizers import llamagen_tokenizer_state
from ddops.models.llamagen import LlamaGenTeacher
from ddops.models.llamagen_student import LlamaGenStudent
from helpers.var_helpers import golden, with_prefix

ModuleT = TypeVar("ModuleT", bound=nn.Module)

TINY = LlamaGenConfig(
    family="llamagen",
    num_classes=10,
    image_size=64,
    image_channels=3,
    codebook_size=64,
    code_dim=8,
    grid=4,
    latent_channels=32,
    autoencoder=AutoencoderConfig(channels=32, channel_multipliers=(1, 1, 2, 2, 4), res_blocks=2),
    depth=2,
    width=64,
    heads=4,
    ffn_hidden=256,
    rope_base=10000.0,
    norm_eps=1e-5,
)
SMALL = replace(
    TINY,
    num_classes=4,
    image_size=8,
    image_channels=1,
    codebook_size=24,
    autoencoder=AutoencoderConfig(channels=32, channel_multipliers=(1, 2), res_blocks=1),
    width=32,
    ffn_hidden=48,
)
LENGTH = 16
PUBLISHED = replace(
    TINY,
    num_classes=1000,
    image_size=256,
    codebook_size=16384,
    grid=16,
    latent_channels=256,
    autoencoder=replace(TINY.autoencoder, channels=128),
)


def published(depth: int, heads: int, width: int, ffn_hidden: int) -> LlamaGenConfig:
    return replace(PUBLISHED, depth=depth, heads=heads, width=width, ffn_hidden=ffn_hidden)


@cache
def golden_teacher() -> LlamaGenTeacher:
    teacher = LlamaGenTeacher(TINY)
    reference = with_prefix(golden("llamagen_c2i_teacher"), "sd.")
    teacher.transformer.load_state_dict(llamagen_teacher_state(reference, TINY))
    tokenizer = with_prefix(golden("llamagen_tokenizer"), "sd.")
    teacher.tokenizer.load_state_dict(llamagen_tokenizer_state(tokenizer, TINY))
    return teacher.eval()


@cache
def golden_student() -> LlamaGenStudent:
    student = LlamaGenStudent(TINY)
    student.load_state_dict(llamagen_student_state(with_prefix(golden("dd1_llamagen"), "sd."), TINY))
    return student.eval()


def randomised(module: ModuleT, std: float = 0.2) -> ModuleT:
    """The module with weights so large that each of them matters."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module.eval()


def random_tokens(config: LlamaGenConfig, batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels_B = torch.randint(config.num_classes, (batch,), generator=generator)
    return labels_B, torch.randint(config.codebook_size, (batch, len(config.level_sizes)), generator=generator)


PLAIN = SamplingConfig(guidance=1.0, top_k=0, top_p=1.0, temperature=1.0)
GUIDED = replace(PLAIN, guidance=2.0)
FILTERED = replace(GUIDED, top_k=20, top_p=0.9)
Draw = Callable[[Tensor], Tensor]


def force(teacher: LlamaGenTeacher, labels_B: Tensor, ids_BL: Tensor, sampling: SamplingConfig) -> Tensor:
    """Log-probabilities (B, L, V) of a session in which these tokens are fixed, one after the other."""
    session, log_probs = teacher.open(labels_B, sampling), []
    for ids_B1 in ids_BL.split(1, dim=1):
        log_probs.append(session.next_log_probs())
        session.append(ids_B1)
    return torch.cat(log_probs, dim=1)


def sample(teacher: LlamaGenTeacher, labels_B: Tensor, sampling: SamplingConfig, draw: Draw) -> Tensor:
    """Token ids (B, L), each drawn from the log-probabilities (B, V) of its position."""
    session, ids = teacher.open(labels_B, sampling), []
    for _ in range(teacher.layout.length):
        ids.append(draw(session.next_log_probs()[:, 0]))
        session.append(ids[-1])
    return torch.cat(ids, dim=1)


def multinomial(log_probs_BV: Tensor) -> Tensor:
    return torch.multinomial(log_probs_BV.exp(), 1)


SMALL_CAPTIONS = replace(SMALL, num_classes=0, captions=CaptionShape(length=5, width=6))
