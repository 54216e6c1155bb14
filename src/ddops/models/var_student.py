"""The DD1 student of VAR: the teacher's transformer over partly noisy sequences (arXiv 2412.17153, released code).

Shape suffixes: see :mod:`ddops.models.interface` and :mod:`ddops.models.var`; P = L + 1 positions of the model.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddops.config.models import VARConfig
from ddops.models.conditions import Condition
from ddops.models.interface import Student, StudentOutput, StudentSession, Teacher
from ddops.models.layout import LevelLayout, noise_data_rows
from ddops.models.level_attention import LevelAttention, student_mask
from ddops.models.precision import full_precision
from ddops.models.var import (
    VARTeacher,
    VARTransformer,
    attend_masked,
    embedding,
    init_std,
    linear,
    modulate,
    normal_parameter,
)


class RegressionHead(nn.Module):
    """Embeddings (B, L, C) from the residual stream (B, L, D), its norm shifted and scaled by the condition (B, D)."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        std = init_std(config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps, elementwise_affine=False)
        self.shift_scale_2D = normal_parameter(2, config.width, std=std)
        self.linear = linear(config.width, config.code_dim, std=std)

    @full_precision
    def forward(self, x_BLD: Tensor, cond_BD: Tensor) -> Tensor:
        shift_B1D, scale_B1D = (self.shift_scale_2D + cond_BD[:, None]).split(1, dim=1)
        embeddings_BLC: Tensor = self.linear(modulate(self.norm(x_BLD), scale_B1D, shift_B1D))
        return embeddings_BLC.float()


class VARStudent(Student):
    """One pass from noise, or from some given levels and noise, to both heads at every position.

    The transformer's own first level is the class embedding, which everything sees; then every position holds its
    own value. The noise/data embedding enters with the input, in every block between attention and feed-forward, and
    before the heads, each time but the first through a linear layer.
    """

    head_modules = ("transformer.head_norm", "transformer.head", "regression_head")

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.config = config
        self.layout = LevelLayout(config.level_sizes)
        self.transformer = VARTransformer(config, LevelLayout((1, *config.level_sizes)))
        self.noise_data_embedding = embedding(2, config.width)
        """Row 0 marks noise, row 1 data."""
        self.noise_data_linears = nn.ModuleList(_zero_linear(config.width) for _ in range(config.depth + 1))
        """One a block, then the heads'. They start at zero, and learn at once since the embedding does not."""
        self.regression_head = RegressionHead(config)

    @property
    def num_conditions(self) -> int:
        """See :attr:`Teacher.num_conditions`."""
        return self.config.num_classes

    def forward(
        self, x_BLC: Tensor, labels_B: Condition, start_B: Tensor, logits_at: slice = slice(None)
    ) -> StudentOutput:
        """See :meth:`Student.forward`. Both outputs are float32."""
        transformer = self.transformer
        is_data_BP = F.pad(self.layout.given_mask(start_B).long(), (1, 0), value=1)
        attend = partial(attend_masked, mask_lK=student_mask(transformer.layout, x_BLC.device))
        cond_BD = transformer.class_embedding(labels_B)
        vectors = transformer.modulation_vectors(cond_BD)
        x_BPD = transformer.embed_sequence(cond_BD, x_BLC) + self.noise_data_embedding(is_data_BP)
        *block_linears, head_linear = self.noise_data_linears
        for block, vectors_B16D, layer in zip(transformer.blocks, vectors.blocks, block_linears, strict=True):
            x_BPD = block(x_BPD, vectors_B16D, attend, between_BlD=self._noise_data_term(layer, is_data_BP))
        x_BLD = (x_BPD + self._noise_data_term(head_linear, is_data_BP))[:, 1:]
        return StudentOutput(transformer.predict(x_BLD[:, logits_at], vectors), self.regression_head(x_BLD, cond_BD))

    def _noise_data_term(self, layer: nn.Module, is_data_BP: Tensor) -> Tensor:
        """The linear layer is applied to the table's two rows, before they are spread over the positions."""
        return F.embedding(is_data_BP, layer(self.noise_data_embedding.weight))

    def open(self, labels_B: Condition) -> VARStudentSession:
        """See :meth:`Student.open`."""
        return VARStudentSession(self, labels_B)

    @torch.no_grad()
    def init_from_teacher(self, teacher: Teacher) -> None:
        """Copy the teacher's transformer. What only the student has keeps its initialisation.

        Position i + 1 of the student predicts token i, as position i of the teacher does, and takes its position
        and level embeddings; the same holds for level 1, which the released code leaves at its initialisation. The
        class position, new as an input only, also takes those of the teacher's first position, so that the class
        embedding runs through the blocks as it does in the teacher.

        Raises TypeError unless the teacher is a :class:`VARTeacher`, ValueError unless its configuration is ours.
        """
        if not isinstance(teacher, VARTeacher):
            raise TypeError(f"a VARStudent starts from a VARTeacher, not from a {type(teacher).__name__}")
        if teacher.config != self.config:
            raise ValueError(f"the student's configuration {self.config} is not the teacher's {teacher.config}")
        state = teacher.transformer.state_dict()
        state["start_1lD"] = state["start_1lD"][:, :1]
        state["position_1LD"] = _repeat_first(state["position_1LD"], dim=1)
        state["level_embedding.weight"] = _repeat_first(state["level_embedding.weight"], dim=0)
        self.transformer.load_state_dict(state)


class VARStudentSession(StudentSession):
    """Passes of :class:`VARStudent` without what a pass need not compute (docs/FAST_PATH.md)."""

    def __init__(self, student: VARStudent, labels_B: Condition) -> None:
        self._student = student
        self._cond_BD = student.transformer.class_embedding(labels_B)
        self._vectors = student.transformer.modulation_vectors(self._cond_BD)
        table_2D = student.noise_data_embedding.weight
        self._tables = [table_2D, *(layer(table_2D) for layer in student.noise_data_linears)]
        """(2, D) each: the input's, the blocks', the heads'."""

    def predict(self, x_BlC: Tensor, given: int, coded: int) -> StudentOutput:
        """See :meth:`StudentSession.predict`."""
        transformer, positions = self._student.transformer, x_BlC.shape[1] + 1
        # One after the other: together the rows of all blocks would be most of a pass's memory.
        terms = (noise_data_rows(table, given + 1, positions) for table in self._tables)
        attend = LevelAttention(transformer.layout, positions, x_BlC)
        x_BPD = transformer.embed_sequence(self._cond_BD, x_BlC) + next(terms)
        for block, vectors_B16D in zip(transformer.blocks, self._vectors.blocks, strict=True):
            x_BPD = block(x_BPD, vectors_B16D, attend, between_BlD=next(terms))
        x_BlD = (x_BPD + next(terms))[:, 1:]
        logits_BlV = transformer.predict(x_BlD[:, given:coded], self._vectors)
        return StudentOutput(logits_BlV, self._student.regression_head(x_BlD[:, coded:], self._cond_BD))


def _zero_linear(width: int) -> nn.Linear:
    layer = nn.Linear(width, width)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _repeat_first(rows: Tensor, dim: int) -> Tensor:
    return torch.cat([rows.narrow(dim, 0, 1), rows], dim)
