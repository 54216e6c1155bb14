"""Training a teacher from scratch: its tokenizer, then its transformer on the tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddops.models.interface import Teacher, Tokenizer
from ddops.training.device import device_of
from ddops.training.loop import Objective

RESEED_EVERY = 50
"""Steps between looking for unused codes."""


def tokenizer_objective(images_NIHW: Tensor, codebook_weight: float) -> Objective:
    """Reconstruction error plus the quantiser's own terms (van den Oord et al., arXiv 1711.00937)."""

    def objective(model: nn.Module, indices_B: Tensor, step: int) -> Mapping[str, Tensor]:
        images_BIHW = images_NIHW[indices_B].to(device_of(model))
        output = cast(Tokenizer, model)(images_BIHW)
        error = F.mse_loss(output.reconstruction_BIHW, images_BIHW)
        return {"loss": error + codebook_weight * output.codebook_loss, "reconstruction_error": error}

    return objective


def reseed_schedule(images_NIHW: Tensor, steps: int) -> Callable[[nn.Module, int], None]:
    """Called before each step: codes that no image uses move to where the images are, until the last third."""

    def before_step(model: nn.Module, step: int) -> None:
        if step % RESEED_EVERY == 0 and step < steps * 2 // 3:
            cast(Tokenizer, model).reseed_unused_codes(images_NIHW.to(device_of(model)))

    return before_step


def teacher_objective(ids_NL: Tensor, labels_N: Tensor, *, label_dropout: float, token_dropout: float) -> Objective:
    """Next-level cross-entropy. Labels are dropped at random, which makes classifier-free guidance possible."""

    def objective(model: nn.Module, indices_B: Tensor, step: int) -> Mapping[str, Tensor]:
        teacher = cast(Teacher, model)
        device = device_of(model)
        ids_BL, labels_B = ids_NL[indices_B].to(device), labels_N[indices_B].to(device)
        drop_B = torch.rand(len(labels_B), device=device) < label_dropout
        given_BL = replace_tokens(ids_BL, token_dropout, len(teacher.codebook_VC))
        logits_BLV = teacher.logits(torch.where(drop_B, teacher.unconditional(labels_B), labels_B), given_BL)
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), ids_BL.flatten())
        accuracy = (logits_BLV.argmax(-1) == ids_BL).float().mean()
        return {"loss": loss, "accuracy": accuracy}

    return objective


def replace_tokens(ids_BL: Tensor, share: float, codebook_size: int) -> Tensor:
    """A random ``share`` of the tokens replaced by random codes: the input of a regularised training step."""
    if share == 0:
        return ids_BL
    replaced_BL = torch.rand(ids_BL.shape, device=ids_BL.device) < share
    return torch.where(replaced_BL, torch.randint_like(ids_BL, codebook_size), ids_BL)
