"""A model family that ddops does not know, added as docs/ADD_A_TEACHER.md says: its own classes and a registry line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddops.config.models import SamplingConfig
from ddops.evaluation.drawing import Request, draw_all
from ddops.evaluation.rows import Models, build_row
from ddops.models.interface import Student, StudentOutput, Teacher, TeacherSession, Tokenizer, TokenizerOutput
from ddops.models.layout import LevelLayout
from ddops.models.registry import FAMILIES, Family, build_student, build_teacher, name_maps
from ddops.models.sampling_filters import guided_log_probs
from ddops.trajectories.dataset import TrajectoryDataset
from ddops.trajectories.generate import Job, generate
from helpers.tiny import tiny

SAMPLING = SamplingConfig(guidance=2.0, top_k=5, top_p=1.0, temperature=1.0)


@dataclass(frozen=True)
class PairsConfig:
    """Images of 4x1 pixels, a token a pixel, in two levels: the outer pair of pixels, then the inner one."""

    family: str = "pairs"
    num_classes: int = 3
    codebook_size: int = 7
    code_dim: int = 2
    level_sizes: tuple[int, ...] = (2, 2)


class PairsTokenizer(Tokenizer):
    def __init__(self, config: PairsConfig) -> None:
        super().__init__()
        self.layout = LevelLayout(config.level_sizes)
        self.codes = nn.Parameter(torch.randn(config.codebook_size, config.code_dim))

    @property
    def codebook_VC(self) -> Tensor:
        return self.codes

    def encode(self, images_BIHW: Tensor) -> Tensor:
        return torch.cdist(images_BIHW.flatten(2).transpose(1, 2).expand(-1, -1, 2), self.codes).argmin(-1)

    def decode(self, q_BLC: Tensor) -> Tensor:
        return q_BLC.mean(-1)[:, None, :, None]

    def forward(self, images_BIHW: Tensor) -> TokenizerOutput:
        raise NotImplementedError("this family is not trained here")

    def reseed_unused_codes(self, images_BIHW: Tensor, generator: torch.Generator | None = None) -> int:
        raise NotImplementedError("this family is not trained here")


class PairsTeacher(Teacher):
    def __init__(self, config: PairsConfig) -> None:
        super().__init__()
        self.layout = LevelLayout(config.level_sizes)
        self.classes = config.num_classes
        self.tokenizer = PairsTokenizer(config)
        self.transformer = nn.Embedding((config.num_classes + 1) * 2, config.codebook_size)

    @property
    def num_conditions(self) -> int:
        return self.classes

    def guidance_scale(self, guidance: float, level: int) -> float:
        return guidance

    def logits(self, labels_B: Tensor, ids_BL: Tensor) -> Tensor:
        return torch.cat([self.level_logits(labels_B, level, ids_BL) for level in (0, 1)], dim=1)

    def level_logits(self, labels_B: Tensor, level: int, ids_BL: Tensor) -> Tensor:
        """The inner pair leans towards the codes of the outer one."""
        logits_BlV = self.transformer(labels_B * 2 + level)[:, None].expand(-1, 2, -1)
        return logits_BlV + level * 2 * F.one_hot(ids_BL[:, :2], logits_BlV.shape[-1]) if level else logits_BlV

    def open(self, labels_B: Tensor, sampling: SamplingConfig) -> TeacherSession:
        return PairsSession(self, labels_B, sampling)


class PairsSession(TeacherSession):
    def __init__(self, teacher: PairsTeacher, labels_B: Tensor, sampling: SamplingConfig) -> None:
        self.teacher, self.labels_B, self.sampling = teacher, labels_B, sampling
        self.levels: list[Tensor] = []

    def next_log_probs(self) -> Tensor:
        level = len(self.levels)
        ids_BL = torch.cat(self.levels, dim=1) if self.levels else torch.empty(0)
        none_B = self.teacher.unconditional(self.labels_B)
        cond, uncond = (self.teacher.level_logits(labels_B, level, ids_BL) for labels_B in (self.labels_B, none_B))
        return guided_log_probs(cond, uncond, self.teacher.guidance_scale(self.sampling.guidance, level), self.sampling)

    def append(self, ids_Bl: Tensor) -> None:
        self.levels.append(ids_Bl)


class PairsStudent(Student):
    head_modules = ("heads",)

    def __init__(self, config: PairsConfig) -> None:
        super().__init__()
        self.layout = LevelLayout(config.level_sizes)
        self.classes = config.num_classes
        self.heads = nn.Linear(config.code_dim, config.codebook_size + config.code_dim)

    @property
    def num_conditions(self) -> int:
        return self.classes

    def forward(
        self, x_BLC: Tensor, labels_B: Tensor, start_B: Tensor, logits_at: slice = slice(None)
    ) -> StudentOutput:
        code_dim = x_BLC.shape[-1]
        out_BLX = self.heads(x_BLC)
        return StudentOutput(out_BLX[:, logits_at, :-code_dim], out_BLX[..., -code_dim:])

    def init_from_teacher(self, teacher: Teacher) -> None:
        pass


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> tuple[Teacher, Student]:
    """Registered with one line, built through the registry."""
    monkeypatch.setitem(FAMILIES, "pairs", Family(PairsTokenizer, PairsTeacher, PairsStudent))
    torch.manual_seed(0)
    config = PairsConfig()
    teacher, student = build_teacher(config), build_student(config)  # type: ignore[arg-type]
    return teacher.requires_grad_(False), student.requires_grad_(False)


def test_its_trajectories_are_generated_and_read(models: tuple[Teacher, Student], tmp_path: Path) -> None:
    config = tiny("llamagen", "trajectories.count=60", "trajectories.shard_size=25", "trajectories.batch_size=10")
    generate(Job(lambda precision: models[0], "none", config.trajectories, SAMPLING, 1, tmp_path))
    dataset = TrajectoryDataset(tmp_path, code_dim=2)
    assert dataset.ids_NL.shape == (60, 4)
    assert set(dataset.labels_N.tolist()) == {0, 1, 2}
    inner_is_outer = (dataset.ids_NL[:, 2:] == dataset.ids_NL[:, :2]).double().mean()
    assert inner_is_outer > 0.4, "the second level is drawn given the first"


def test_its_teacher_and_student_are_sampled(models: tuple[Teacher, Student]) -> None:
    teacher, student = models
    config = tiny("llamagen", "dd1.start_positions=[0,1]", "dd1.logit_prefix=1")
    models_of_rows = Models(teacher, student, SAMPLING, config.trajectories, config.dd1, Path("nowhere"))
    request = Request(torch.tensor([0, 1, 2]).repeat(4), batch_size=5)
    names = ["teacher", "teacher_flow", "dd1_1step", "dd1_2step", "teacher_involved_1_2", "skip_1"]
    rows = [draw_all(build_row(name, models_of_rows).draw, request, 0, name) for name in names]
    for images_NIHW in rows:
        assert images_NIHW.shape == (12, 1, 4, 1)
        assert len(np.unique(images_NIHW)) > 1


@pytest.mark.usefixtures("models")
def test_without_name_maps_it_has_no_published_weights() -> None:
    with pytest.raises(ValueError, match="'pairs'"):
        name_maps(PairsConfig())  # type: ignore[arg-type]
