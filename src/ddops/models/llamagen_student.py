"""DD1 student of LlamaGen (arXiv 2412.17153): one causal pass from a partly noisy sequence to all tokens.

The teacher's transformer with a linear input layer instead of the token table, a noise/data embedding added once at
the input, and a second head that regresses embeddings. Position i holds its own value; nothing is shifted.
Structure as in the released code, so that published checkpoints load.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddops.config.models import LlamaGenConfig
from ddops.models.conditions import Condition, condition_embedding
from ddops.models.interface import Student, StudentOutput, StudentSession, Teacher
from ddops.models.layout import LevelLayout, noise_data_rows
from ddops.models.llamagen import INIT_STD, CausalTrunk, LlamaGenTeacher, fit_linear, init_weights
from ddops.models.precision import WholeLinear, full_precision

NOISE, DATA = 0, 1
"""Rows of the noise/data embedding."""


class EmbeddingHead(nn.Module):
    """Regressed embeddings (B, L, C) from hidden states, modulated by the condition: the class's token, or the mean of
    the caption's *(ours: the authors released no student of captions)*."""

    def __init__(self, width: int, code_dim: int) -> None:
        super().__init__()
        self.shift_scale_2D = nn.Parameter(torch.randn(2, width) * INIT_STD)
        self.proj = nn.Linear(width, code_dim)

    @full_precision
    def forward(self, h_BLD: Tensor, condition_B1D: Tensor) -> Tensor:
        shift_B1D, scale_B1D = (self.shift_scale_2D + condition_B1D).chunk(2, dim=1)
        normed_BLD = F.layer_norm(h_BLD, h_BLD.shape[-1:], eps=1e-6)
        embeddings_BLC: Tensor = self.proj(normed_BLD * (1 + scale_B1D) + shift_B1D)
        return embeddings_BLC.float()


class LlamaGenStudent(Student):
    """See :class:`Student`. Every token is a level, so ``start_B`` counts tokens."""

    head_modules = ("norm", "head", "embedding_head")

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.config = config
        self.layout = LevelLayout(config.level_sizes)
        self.class_embedding = condition_embedding(config.num_classes, config.captions, config.width)
        self.input_proj = nn.Linear(config.code_dim, config.width)
        self.noise_data_embedding = nn.Embedding(2, config.width)
        self.trunk = CausalTrunk(config)
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = WholeLinear(config.width, config.codebook_size, bias=False)
        self.embedding_head = EmbeddingHead(config.width, config.code_dim)
        self.apply(init_weights)

    @property
    def num_conditions(self) -> int:
        """See :attr:`Teacher.num_conditions`."""
        return self.class_embedding.num_conditions

    def forward(
        self, x_BLC: Tensor, labels_B: Condition, start_B: Tensor, logits_at: slice = slice(None)
    ) -> StudentOutput:
        """See :meth:`Student.forward`. Both outputs are float32."""
        condition = self.class_embedding.tokens(labels_B)
        given = condition.tokens_BTD.shape[1]
        h_BTD = torch.cat([condition.tokens_BTD, self.input_proj(x_BLC)], dim=1)
        # Condition tokens are always data; image token j sits at position j + given.
        is_data_BT = torch.arange(1 - given, h_BTD.shape[1] + 1 - given, device=x_BLC.device) <= start_B[:, None]
        h_BTD = h_BTD + self.noise_data_embedding(torch.where(is_data_BT, DATA, NOISE))
        h_BLD = self.trunk(h_BTD, condition.mask_BT)[:, given:]
        logits_BLV: Tensor = self.head(self.norm(h_BLD[:, logits_at]))
        return StudentOutput(logits_BLV.float(), self.embedding_head(h_BLD, condition.mean_B1D))

    def open(self, labels_B: Condition) -> LlamaGenStudentSession:
        """See :meth:`Student.open`."""
        return LlamaGenStudentSession(self, labels_B)

    @torch.no_grad()
    def init_from_teacher(self, teacher: Teacher) -> None:
        """See :meth:`Student.init_from_teacher`. The input layer is fitted to the teacher's token table.

        Raises TypeError unless the teacher is a :class:`LlamaGenTeacher`, ValueError unless its configuration is ours.
        """
        if not isinstance(teacher, LlamaGenTeacher):
            raise TypeError(f"a LlamaGenStudent starts from a LlamaGenTeacher, not from a {type(teacher).__name__}")
        if teacher.config != self.config:
            raise ValueError(f"the student's configuration {self.config} is not the teacher's {teacher.config}")
        for name in ("class_embedding", "trunk", "norm", "head"):
            source = getattr(teacher.transformer, name)
            getattr(self, name).load_state_dict(source.state_dict())
        fit_linear(self.input_proj, teacher.codebook_VC, teacher.transformer.token_embedding.weight)


class LlamaGenStudentSession(StudentSession):
    """Passes of :class:`LlamaGenStudent` without what a pass need not compute (docs/FAST_PATH.md)."""

    def __init__(self, student: LlamaGenStudent, labels_B: Condition) -> None:
        self._student = student
        self._condition = student.class_embedding.tokens(labels_B)
        self._mean_B1D = self._condition.mean_B1D

    def predict(self, x_BlC: Tensor, given: int, coded: int) -> StudentOutput:
        """See :meth:`StudentSession.predict`."""
        student, (tokens_BTD, mask_BT) = self._student, self._condition
        before = tokens_BTD.shape[1]
        h_BTD = torch.cat([tokens_BTD, student.input_proj(x_BlC)], dim=1)
        h_BTD = h_BTD + noise_data_rows(student.noise_data_embedding.weight, before + given, h_BTD.shape[1])
        h_BlD = student.trunk(h_BTD, mask_BT)[:, before:]
        logits_BlV: Tensor = student.head(student.norm(h_BlD[:, given:coded]))
        return StudentOutput(logits_BlV.float(), student.embedding_head(h_BlD[:, coded:], self._mean_B1D))
