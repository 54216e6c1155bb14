"""What is watched while DD2 trains: FID and recall, whether the generator collapses, and pictures of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddops.captions.conditions import Conditions
from ddops.config.dd2 import TrainedDD2Config
from ddops.config.stages import DD1Config
from ddops.distill.dd2 import check_diversity, within_class_spread
from ddops.evaluation.drawing import Indices, decode, sample_noise
from ddops.evaluation.images import grid, save_png, to_uint8
from ddops.evaluation.metrics import Seen
from ddops.models.interface import BackboneTeacher, Student
from ddops.sampling.few_step import sample_student
from ddops.stages import paths
from ddops.stages.fid_curve import CURVE_SEED, FIDCurve
from ddops.training.curves import Row
from ddops.training.replicas import gathered, own_part
from ddops.trajectories.dataset import TrajectoryDataset

COLUMNS: Final = 10
"""Conditions in a picture, spread over all of them; the same noise in every picture."""
ROWS: Final = 3
TILE: Final = 24
"""Side of an image in a picture, in pixels, for images smaller than that."""
PICTURES: Final = paths.STATE / "dd2_samples"


class DD2Watch:
    """Called with the EMA generator, its step and the curves so far; raises :class:`~ddops.training.errors.Collapsed`.
    The training's processes share the samples; the one that keeps the curves draws the picture and raises.

    Pictures wait in ``PICTURES`` until the training is over: curves are written anew when a killed run goes on.
    """

    def __init__(
        self,
        teacher: BackboneTeacher,
        dataset: TrajectoryDataset,
        dd1: DD1Config,
        dd2: TrainedDD2Config,
        conditions: Conditions,
        *,
        judged: bool,
        fingerprint: str,
    ) -> None:
        self.teacher, self.config, self.starts = teacher, dd2, dd1.start_positions
        self.logit_prefix = dd2.logit_prefix(teacher.layout.num_levels)
        self.device = teacher.codebook_VC.device
        self.batch = dataset.batch(torch.arange(min(dd2.evaluate_count, len(dataset))))
        codes_NLC = F.embedding(self.batch.ids_BL, teacher.codebook_VC.cpu())
        self.teacher_spread = within_class_spread(codes_NLC, self.batch.labels_B)
        """0 where every condition has one sample, as captions may: there is no spread to compare then."""
        self.start: Row = {}
        self.conditions = conditions
        self.fid = FIDCurve(dd2.evaluate_count, conditions) if judged else None
        self.pictures = PICTURES / fingerprint
        for other in PICTURES.glob("*"):
            if other != self.pictures:
                shutil.rmtree(other, ignore_errors=True)

    def begin(self, generator: Student) -> None:
        """Note where the training begins: a bound that the first generator meets counts from then on."""
        self.start = self._variety(generator, None if self.fid is None else self.fid.see(self._drawer(generator, 1)))

    def __call__(self, model: nn.Module, step: int, earlier: Sequence[Row] | None = ()) -> Row:
        student, values, seen = cast(Student, model), {}, []
        if self.fid is not None:
            seen = [self.fid.see(self._drawer(student, steps)) for steps in range(1, len(self.starts) + 1)]
            values = {f"fid_{steps}step": self.fid.fid(each) for steps, each in enumerate(seen, start=1)}
        values |= self._variety(student, seen[0] if seen else None)
        if earlier is not None:
            self._picture(student, step)
            check_diversity(values, [self.start, *earlier], self.config)
        return values

    @torch.no_grad()
    def _variety(self, student: Student, seen: Seen | None) -> Row:
        """Of the samples in one step."""
        values = {} if self.fid is None or seen is None else {"recall": self.fid.recall(seen)}
        if self.teacher_spread:
            training = self.config.training
            size = training.batch_size // training.processes  # what fits where the training does
            codebook_VC, count = self.teacher.codebook_VC, len(self.batch.labels_B)
            own = own_part(count)
            parts = zip(self.batch.noise_BLC[own].split(size), self.batch.labels_B[own].split(size), strict=True)
            drawn = [
                sample_student(
                    student, codebook_VC, noise_BLC.to(self.device), labels_B.to(self.device), (0,), self.logit_prefix
                ).cpu()
                for noise_BLC, labels_B in parts
            ]
            drawn_NLC = gathered(torch.cat(drawn), count)
            values["diversity"] = within_class_spread(drawn_NLC, self.batch.labels_B) / self.teacher_spread
        return values

    def keep_pictures(self, directory: Path) -> None:
        """Copy them to where they stay: ``samples_<step>.png``. A run killed after this needs them again."""
        for file in sorted(self.pictures.glob("*.png")):
            shutil.copyfile(file, directory / file.name)

    def forget_pictures(self) -> None:
        """Delete those that wait; called once the run's checkpoint is gone."""
        shutil.rmtree(PICTURES, ignore_errors=True)

    def _drawer(self, student: Student, steps: int) -> Callable[[Indices, Tensor], Tensor]:
        return lambda indices_B, labels_B: self._draw(student, indices_B, labels_B, self.starts[:steps])

    def _draw(self, student: Student, indices_B: Indices, labels_B: Tensor, starts: tuple[int, ...]) -> Tensor:
        codebook_VC = self.teacher.codebook_VC
        noise_BLC = sample_noise(CURVE_SEED, indices_B, student, codebook_VC.shape[1]).to(self.device)
        labels_B = labels_B.to(self.device)
        q_BLC = sample_student(student, codebook_VC, noise_BLC, labels_B, starts, self.logit_prefix)
        return decode(self.teacher, q_BLC)

    def _picture(self, student: Student, step: int) -> None:
        count = self.conditions.count
        columns = min(COLUMNS, count)
        labels_B = (torch.arange(columns) * count // columns).repeat(ROWS)
        with torch.no_grad():
            images_BIHW = self._draw(student, np.arange(len(labels_B), dtype=np.int64), labels_B, (0,))
        picture = grid(to_uint8(images_BIHW).cpu(), columns, scale=max(1, TILE // images_BIHW.shape[-1]))
        save_png(picture, self.pictures / f"samples_{step:06d}.png")
