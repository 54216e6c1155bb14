"""The AR-diffusion model of DD2 (arXiv 2510.21003): a teacher whose classifier gave way to a small conditional head.

The backbone reads clean tokens and gives each position a hidden state; the head denoises that position's ``x_t``
given it. The head predicts the data (the posterior mean): the velocity and the score follow from it without a division
that grows as t approaches the data. Shape suffixes: see :mod:`ddops.models.interface`.
"""

from __future__ import annotations

import copy
import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddops.config.models import HeadConfig
from ddops.flow.codebook import posterior_mean
from ddops.models.conditions import Condition
from ddops.models.interface import BackboneTeacher, Student, StudentOutput, Teacher
from ddops.models.precision import full_precision

TIME_FREQUENCIES: Final = 16
MAX_TIME_FREQUENCY: Final = 64.0
"""Of the sine features of t, in turns over [0, 1] times pi."""


class ResidualBlock(nn.Module):
    """Adaptive-norm residual MLP; starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, y: Tensor, cond: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(F.silu(cond)).chunk(3, dim=-1)
        normed = F.layer_norm(y, y.shape[-1:])
        result: Tensor = y + gate * self.mlp(normed * (1 + scale) + shift)
        return result


class ConditionalHead(nn.Module):
    """``(x_t, t, h) ->`` the posterior mean ``E[q | x_t, h]`` (B, L, C), or what is added to the classifier's logits
    (B, L, V), as ``config.predicts`` says; position by position. Starts at zero."""

    def __init__(self, config: HeadConfig, hidden_width: int, codebook_size: int, code_dim: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer(
            "frequencies",
            math.pi * torch.logspace(0, math.log2(MAX_TIME_FREQUENCY), TIME_FREQUENCIES, base=2.0),
            persistent=False,
        )
        self.frequencies: Tensor
        self.input = nn.Linear(code_dim, config.width)
        self.condition = nn.Linear(hidden_width, config.width)
        self.time = nn.Linear(2 * TIME_FREQUENCIES, config.width)
        self.blocks = nn.ModuleList(ResidualBlock(config.width) for _ in range(config.blocks))
        self.output = nn.Linear(config.width, codebook_size if config.predicts == "codes" else code_dim)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    @full_precision
    def forward(self, x_BLC: Tensor, t_BL: Tensor, hidden_BLD: Tensor) -> Tensor:
        angles = t_BL[..., None] * self.frequencies
        cond = self.condition(hidden_BLD) + self.time(torch.cat([angles.sin(), angles.cos()], dim=-1))
        y = self.input(x_BLC) + cond
        for block in self.blocks:
            y = block(y, cond)
        output_BLX: Tensor = self.output(F.layer_norm(y, y.shape[-1:]))
        return output_BLX.float()


class ARDiffusion(nn.Module):
    """Posterior means ``E[q_i | x_t, q_<i, y]`` of a sequence model, from a backbone over its clean tokens.

    With a :class:`ConditionalHead` that predicts embeddings this is the paper's model. With one that predicts codes
    *(ours)* the classifier stays, the head corrects its logits, and the mean follows from them in closed form: the head
    need not learn again what the teacher knew of the codes, nor how noise decides between them. Without a head the
    classifier alone does *(ours)*. Both are exact for sequences that lie on the codebook, and only there.
    """

    def __init__(self, backbone: BackboneTeacher, head: ConditionalHead | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    @property
    def head_config(self) -> HeadConfig | None:
        return None if self.head is None else self.head.config

    @property
    def codebook_VC(self) -> Tensor:
        return self.backbone.codebook_VC

    def hidden(self, labels_B: Tensor, ids_BL: Tensor) -> Tensor:
        """Hidden states (B, L, D) from the clean tokens of earlier levels."""
        return self.backbone.hidden(labels_B, self.backbone.embed_prefix(ids_BL))

    def log_probs(self, hidden_BLD: Tensor) -> Tensor:
        """Log-probabilities (B, L, V) of a model without a head; raises TypeError for one with."""
        if self.head is not None:
            raise TypeError("this AR-diffusion model has a conditional head in place of the classifier")
        return self.backbone.classify(hidden_BLD).log_softmax(-1)

    def mean(self, x_BLC: Tensor, t_BL: Tensor, hidden_BLD: Tensor) -> Tensor:
        """Posterior means (B, L, C) of noisy tokens, each at its own time in [0, 1)."""
        if self.head is not None and self.head.config.predicts == "embedding":
            mean_BLC: Tensor = self.head(x_BLC, t_BL, hidden_BLD)
            return mean_BLC
        return codebook_mean(x_BLC, t_BL, self.code_logits(x_BLC, t_BL, hidden_BLD), self.codebook_VC)

    def code_logits(self, x_BLC: Tensor, t_BL: Tensor, hidden_BLD: Tensor) -> Tensor:
        """Logits (B, L, V) of the codes before what the noise says; not of a head that predicts embeddings."""
        logits_BLV = self.backbone.classify(hidden_BLD)
        return logits_BLV if self.head is None else logits_BLV + self.head(x_BLC, t_BL, hidden_BLD)


@full_precision
def codebook_mean(x_BLC: Tensor, t_BL: Tensor, log_p_BLV: Tensor, codebook_VC: Tensor) -> Tensor:
    """The closed form of :func:`ddops.flow.codebook.posterior_mean` for sequences, (B, L, C)."""
    mean_NC = posterior_mean(x_BLC.flatten(0, 1), t_BL.flatten(), log_p_BLV.flatten(0, 1), codebook_VC)
    return mean_NC.view(x_BLC.shape)


def new_ar_diffusion(teacher: BackboneTeacher, config: HeadConfig | None) -> ARDiffusion:
    """An AR-diffusion model whose backbone is a copy of the teacher, to be trained; the tokenizer stays frozen."""
    backbone = copy.deepcopy(teacher).requires_grad_(True)
    backbone.tokenizer.requires_grad_(False)
    shape = (teacher.config.width, *teacher.codebook_VC.shape)
    return ARDiffusion(backbone, None if config is None else ConditionalHead(config, *shape))


class ARDiffusionGenerator(Student):
    """The AR-diffusion model as a one-step generator (DD2): noise takes the place of the clean tokens, and the head
    is evaluated once, at t = 0.

    Regressed embeddings are the paper's output; the logits are then those of a Gaussian around each code, so that the
    nearest code is the likeliest. A model that predicts codes gives its own logits, and their expectation.
    """

    head_modules = ("model.head",)

    def __init__(self, model: ARDiffusion) -> None:
        super().__init__()
        if model.head is None:
            raise ValueError("a generator needs a conditional head: in closed form a token would not see its own noise")
        self.model = model
        self.predicts_codes = model.head.config.predicts == "codes"
        self.layout = model.backbone.layout
        self.prefix_layer = model.backbone.prefix_layer()

    @property
    def num_conditions(self) -> int:
        """See :attr:`Teacher.num_conditions`."""
        return self.model.backbone.num_conditions

    def forward(
        self, x_BLC: Tensor, labels_B: Condition, start_B: Tensor, logits_at: slice = slice(None)
    ) -> StudentOutput:
        """See :meth:`Student.forward`. What is data and what is noise shows from the values alone."""
        backbone = self.model.backbone
        hidden_BLD = backbone.hidden(labels_B, self.prefix_layer(backbone.prefix_inputs(x_BLC)))
        model, t_BL = self.model, torch.zeros_like(x_BLC[..., 0])
        if self.predicts_codes:
            logits_BLV = model.code_logits(x_BLC, t_BL, hidden_BLD)
            return StudentOutput(logits_BLV[:, logits_at], expected_code(logits_BLV, model.codebook_VC))
        embeddings_BLC = model.mean(x_BLC, t_BL, hidden_BLD)
        return StudentOutput(nearest_logits(embeddings_BLC[:, logits_at], model.codebook_VC), embeddings_BLC)

    def init_from_teacher(self, teacher: Teacher) -> None:
        """Raises TypeError: it starts from an AR-diffusion model, which started from the teacher."""
        raise TypeError("an ARDiffusionGenerator starts from an AR-diffusion model")


@full_precision
def expected_code(logits_BLV: Tensor, codebook_VC: Tensor) -> Tensor:
    """The posterior mean at t = 0, where the noise says nothing yet: (B, L, C)."""
    return logits_BLV.softmax(-1) @ codebook_VC


@full_precision
def nearest_logits(embeddings_BLC: Tensor, codebook_VC: Tensor) -> Tensor:
    """Logits (B, L, V) of a Gaussian around each code whose width is the codes' distance to their nearest."""
    half_norm_V = codebook_VC.square().sum(-1) / 2
    to_nearest = _squared_distance_to_nearest(codebook_VC).mean()
    return (embeddings_BLC @ codebook_VC.T - half_norm_V) / to_nearest


def _squared_distance_to_nearest(codebook_VC: Tensor, chunk: int = 1024) -> Tensor:
    """Of each code, to another one: (V,). In chunks, so that nothing is as large as V x V."""
    half_norm_V, id_V = codebook_VC.square().sum(-1) / 2, torch.arange(len(codebook_VC), device=codebook_VC.device)
    nearest = []
    for first in range(0, len(codebook_VC), chunk):
        part_vC = codebook_VC[first : first + chunk]
        squared_vV = 2 * (half_norm_V[first : first + chunk, None] + half_norm_V - part_vC @ codebook_VC.T)
        itself_vV = id_V[first : first + chunk, None] == id_V
        nearest.append(squared_vV.masked_fill(itself_vV, float("inf")).amin(1))
    return torch.cat(nearest)
