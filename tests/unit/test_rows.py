"""What the evaluation compares: a sample is a function of row, seed and index, and the labels are the data's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from ddops.data import digits
from ddops.evaluation.drawing import Request, dd1_draw, draw_all, sample_noise
from ddops.evaluation.images import to_uint8
from ddops.evaluation.rows import Models, build_row, reconstruct
from ddops.models.ar_diffusion import new_ar_diffusion
from ddops.models.interface import Student, StudentOutput
from ddops.models.weights_dd2 import as_backbone
from ddops.sampling.ar_diffusion import refine
from ddops.sampling.few_step import sample_student
from ddops.sampling.noise import Stream, normals
from ddops.sampling.teacher import flow_picker, sample_teacher
from helpers.tiny import tiny, untrained

FAMILIES = ["llamagen", "var"]
LABELS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
STEPS = "dd1.start_positions=[0,2]"


def tokens_of(teacher):
    """Ids and labels as trajectories have them, a few of every class."""
    generator, labels_N = torch.Generator().manual_seed(0), torch.arange(40) % teacher.num_conditions
    return torch.randint(len(teacher.codebook_VC), (40, teacher.layout.length), generator=generator), labels_N


def ar_diffusion_of(family):
    """With the teacher's classifier in the place of a head, so that it draws as the teacher does."""
    return new_ar_diffusion(as_backbone(untrained(family)[0]), None).eval()


def row_of(name, family, tokens=None):
    """A row with the untrained models of a family."""
    config = tiny(family, STEPS, "trajectories.tolerance=0.01")
    teacher, student = untrained(family)
    models = Models(
        teacher,
        student,
        config.sampling,
        config.trajectories,
        config.dd1,
        Path("nowhere"),
        config.dd2,
        student,
        ar_diffusion_of(family),
        evaluations=4,
    )
    # A cached property: what is put there is not read from the disk.
    models.__dict__["drawn_tokens"] = tokens or tokens_of(teacher)
    return build_row(name, models)


def sampler(name, family, tokens=None):
    """(labels, batch size, seed) -> images of a row."""
    row = row_of(name, family, tokens)
    return lambda labels_N, batch_size, seed: draw_all(row.draw, Request(labels_N, batch_size), seed, name)


ROWS = ["teacher", "teacher_flow", "dd1_1step", "dd1_2step", "teacher_involved_1_3", "teacher_involved_2_3", "skip_1"]
ROWS += ["onestep_class", "dd2_1step", "dd2_2step", "dd2_refine_1", "ar_diffusion"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("row", ROWS)
def test_a_sample_does_not_depend_on_its_batch_or_on_how_many_there_are(row, family):
    """Up to rounding, which may move a pixel by a level and, seldom, a token that lies on a border."""
    sample = sampler(row, family)
    labels = LABELS.repeat(3)
    whole = sample(labels, 24, 7)
    assert whole.shape == (24, 1, 8, 8)
    assert whole.dtype == torch.uint8
    for count, batch_size in ((24, 5), (11, 1)):
        other = sample(labels[:count], batch_size, 7)
        moved = (other.int() - whole[:count].int()).abs() > 1
        assert moved.double().mean() < 0.01
    assert torch.equal(sample(labels, 24, 7), whole)


@pytest.mark.parametrize("row", ROWS)
def test_seed_and_index_both_matter(row):
    sample = sampler(row, "llamagen")
    same_label = torch.full((6,), 3)
    images = sample(same_label, 6, 7)
    assert len(images.unique(dim=0)) == 6
    assert not torch.equal(sample(same_label, 6, 8), images)


@pytest.mark.parametrize("row", ROWS)
def test_the_label_matters(row):
    sample = sampler(row, "llamagen")
    images = [sample(torch.full((6,), label), 6, 7) for label in (3, 8)]
    assert not torch.equal(*images)


@pytest.mark.parametrize(("count", "batch_size"), [(24, 24), (24, 7), (5, 100), (8, 1)])
def test_batches_cover_every_index_once_in_order(count, batch_size):
    labels_N = LABELS.repeat(3)[:count]
    batches = list(Request(labels_N, batch_size).batches("row"))
    assert np.array_equal(np.concatenate([indices for indices, _ in batches]), np.arange(count))
    assert torch.equal(torch.cat([labels for _, labels in batches]), labels_N)
    assert all(len(labels) <= batch_size for _, labels in batches)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [1, 2])
def test_the_students_rows_are_its_few_step_samples_of_the_shared_noise(family, steps):
    """The same noise as the flow map's row, so that the grids can be compared image by image."""
    teacher, student = untrained(family)
    dd1 = tiny(family, STEPS).dd1
    noise = normals(7, Stream.SAMPLE_NOISE, np.arange(8), (teacher.layout.length, 8))
    assert torch.equal(sample_noise(7, np.arange(8), teacher, 8), noise)
    assert torch.equal(sample_noise(7, np.arange(8), student, 8), noise)
    with torch.inference_mode():
        q = sample_student(student, teacher.codebook_VC, noise, LABELS, (0, 2)[:steps], dd1.logit_prefix)
        expected = to_uint8(teacher.decode(q))
    assert torch.equal(sampler(f"dd1_{steps}step", family)(LABELS, 8, 7), expected)


class Oracle(Student):
    """A student that answers with given ids, as logits and as embeddings."""

    def __init__(self, teacher, ids_BL):
        super().__init__()
        self.layout, self.ids_BL, self.codebook_VC = teacher.layout, ids_BL, teacher.codebook_VC

    def forward(self, x_BLC, labels_B, start_B, logits_at=slice(None)):
        logits_BLV = F.one_hot(self.ids_BL[:, logits_at], len(self.codebook_VC)).float()
        return StudentOutput(logits_BLV, F.embedding(self.ids_BL, self.codebook_VC))

    @property
    def num_conditions(self):
        return 10

    def init_from_teacher(self, teacher):
        raise NotImplementedError("it knows the answers already")


@pytest.mark.parametrize("family", FAMILIES)
def test_refined_rows_refine_the_one_step_sample_each_time_with_noise_of_its_own(family):
    row = row_of("dd2_refine_2", family)
    config, (teacher, student) = tiny(family, STEPS).dd2, untrained(family)
    shape = (teacher.layout.length, teacher.codebook_VC.shape[1])
    noise = normals(7, Stream.SAMPLE_NOISE, np.arange(8), shape)
    with torch.inference_mode():
        prefix = config.logit_prefix(teacher.layout.num_levels)
        q = sample_student(student, teacher.codebook_VC, noise, LABELS, (0,), prefix)
        for fresh in normals(7, Stream.REFINEMENT, np.arange(8), (2, *shape)).unbind(1):
            model = ar_diffusion_of(family)
            q = refine(model, q, fresh, LABELS, start=config.refine_start, evaluations=4)
        expected = to_uint8(teacher.decode(q))
    assert torch.equal(draw_all(row.draw, Request(LABELS, 8), 7, "refined"), expected)
    assert row.passes == 3
    once = draw_all(row_of("dd2_refine_1", family).draw, Request(LABELS, 8), 7, "refined")
    assert not torch.equal(once, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_perfect_student_draws_the_flow_maps_images(family):
    """The two rows are the same function but for the student's error: what the whole comparison rests on."""
    config = tiny(family, STEPS, "trajectories.tolerance=0.01")
    teacher, _ = untrained(family)
    expected = sampler("teacher_flow", family)(LABELS, 8, 7)

    noise = sample_noise(7, np.arange(8), teacher, 8)
    pick = flow_picker(teacher.layout, teacher.codebook_VC, noise, config.trajectories)
    oracle = Oracle(teacher, sample_teacher(teacher, LABELS, config.sampling, pick))
    for steps in (1, 2):
        drawn = draw_all(dd1_draw(oracle, teacher, config.dd1, steps), Request(LABELS, 8), 7, "oracle")
        assert (drawn.int() - expected.int()).abs().max() <= 1


def test_independent_tokens_draw_each_class_from_its_own_marginals():
    """A class with one trajectory has certain marginals; pooled, any class draws from all of them."""
    teacher, _ = untrained()
    certain_KL = torch.randint(64, (10, 16), generator=torch.Generator().manual_seed(3))
    tokens = (certain_KL, torch.arange(10))
    images = sampler("onestep_class", "llamagen", tokens)(LABELS, 3, 7)
    with torch.inference_mode():
        expected = to_uint8(teacher.decode(F.embedding(certain_KL[LABELS], teacher.codebook_VC)))
    assert (images.int() - expected.int()).abs().max() <= 1
    pooled = sampler("onestep_star", "llamagen", tokens)
    assert torch.equal(pooled(LABELS, 3, 7), pooled(9 - LABELS, 3, 7)), "pooled marginals know no class"
    assert len(pooled(torch.full((6,), 3), 6, 7).unique(dim=0)) == 6


@pytest.mark.parametrize("family", FAMILIES)
def test_reconstruction_is_the_tokenizer_there_and_back(family):
    teacher, _ = untrained(family)
    data = digits.load().images_NIHW[:7]
    with torch.inference_mode():
        expected = to_uint8(teacher.decode(F.embedding(teacher.tokenizer.encode(data), teacher.codebook_VC)))
    assert (torch.cat(list(reconstruct(teacher, data, 3))).int() - expected.int()).abs().max() <= 1


def test_the_data_are_the_1797_digits_in_range():
    data = digits.load()
    assert data.images_NIHW.shape == (1797, 1, 8, 8)
    assert (data.images_NIHW.min(), data.images_NIHW.max()) == (-1, 1)
    assert len(data.images_NIHW.unique()) == 17
    package = load_digits()
    assert torch.equal(data.labels_N, torch.from_numpy(package.target).long())
    assert torch.equal(data.images_NIHW[:, 0], torch.from_numpy(package.images).float() / 8 - 1)
    assert data.labels_N.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
