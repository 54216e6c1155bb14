"""What the evaluation compares: a sample is a function of row, seed and index, and the labels are the data's."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from ddops.data import digits
from ddops.evaluation import rows
from ddops.evaluation.images import to_uint8
from ddops.evaluation.rows import Protocol
from ddops.models.interface import StudentOutput
from ddops.sampling.few_step import sample_student
from ddops.sampling.noise import Stream, normals
from ddops.sampling.teacher import flow_picker, sample_teacher
from tiny import tiny, untrained

FAMILIES = ["llamagen", "var"]
LABELS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
STEPS = "dd1.start_positions=[0,2]"


def marginals_of(teacher):
    shape = (teacher.num_classes, teacher.layout.length, len(teacher.codebook_VC))
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def sampler(row, family):
    """(protocol, seed) -> images of a row, with the untrained models of a family."""
    config = tiny(family, STEPS, "trajectories.tolerance=0.01")
    teacher, student = untrained(family)
    sampling = config.sampling
    return {
        "teacher": lambda *which: rows.sample_teacher_row(teacher, sampling, *which),
        "teacher_flow": lambda *which: rows.sample_flow_row(teacher, sampling, config.trajectories, *which),
        "dd1_1step": lambda *which: rows.sample_dd1(student, teacher, config.dd1, 1, *which),
        "dd1_2step": lambda *which: rows.sample_dd1(student, teacher, config.dd1, 2, *which),
        "onestep_class": lambda *which: rows.sample_independent(teacher, marginals_of(teacher), *which),
    }[row]


ROWS = ["teacher", "teacher_flow", "dd1_1step", "dd1_2step", "onestep_class"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("row", ROWS)
def test_a_sample_does_not_depend_on_its_batch_or_on_how_many_there_are(row, family):
    """Up to rounding, which may move a pixel by a level and, seldom, a token that lies on a border."""
    sample = sampler(row, family)
    whole = sample(Protocol(LABELS, 24, 24), 7)
    assert whole.shape == (24, 1, 8, 8)
    assert whole.dtype == torch.uint8
    for count, batch_size in ((24, 5), (11, 1)):
        other = sample(Protocol(LABELS, count, batch_size), 7)
        moved = (other.int() - whole[:count].int()).abs() > 1
        assert moved.double().mean() < 0.01
    assert torch.equal(sample(Protocol(LABELS, 24, 24), 7), whole)


@pytest.mark.parametrize("row", ROWS)
def test_seed_and_index_both_matter(row):
    sample = sampler(row, "llamagen")
    same_label = Protocol(torch.tensor([3]), 6, 6)
    images = sample(same_label, 7)
    assert len(images.unique(dim=0)) == 6
    assert not torch.equal(sample(same_label, 8), images)


@pytest.mark.parametrize("row", ROWS)
def test_the_label_matters(row):
    sample = sampler(row, "llamagen")
    images = [sample(Protocol(torch.tensor([label]), 6, 6), 7) for label in (3, 8)]
    assert not torch.equal(*images)


def test_labels_come_in_the_datas_proportions():
    reference = digits.load().labels_N
    labels = Protocol(reference, 3 * len(reference), 1000).labels
    assert torch.equal(labels.bincount(), 3 * reference.bincount())
    assert torch.equal(labels[: len(reference)], reference)


@pytest.mark.parametrize(("count", "batch_size"), [(24, 24), (24, 7), (5, 100), (8, 1)])
def test_batches_cover_every_index_once_in_order(count, batch_size):
    protocol = Protocol(LABELS, count, batch_size)
    batches = list(protocol.batches("row"))
    assert np.array_equal(np.concatenate([indices for indices, _ in batches]), np.arange(count))
    assert torch.equal(torch.cat([labels for _, labels in batches]), protocol.labels)
    assert all(len(labels) <= batch_size for _, labels in batches)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [1, 2])
def test_the_students_rows_are_its_few_step_samples_of_the_shared_noise(family, steps):
    """The same noise as the flow map's row, so that the grids can be compared image by image."""
    teacher, student = untrained(family)
    dd1 = tiny(family, STEPS).dd1
    noise = normals(7, Stream.SAMPLE_NOISE, np.arange(8), (teacher.layout.length, 8))
    assert torch.equal(rows.sample_noise(7, np.arange(8), teacher, 8), noise)
    assert torch.equal(rows.sample_noise(7, np.arange(8), student, 8), noise)
    with torch.inference_mode():
        q = sample_student(student, teacher.codebook_VC, noise, LABELS, (0, 2)[:steps], dd1.logit_prefix)
        expected = to_uint8(teacher.decode(q))
    assert torch.equal(sampler(f"dd1_{steps}step", family)(Protocol(LABELS, 8, 8), 7), expected)


class Oracle(torch.nn.Module):
    """A student that answers with given ids, as logits and as embeddings."""

    def __init__(self, teacher, ids_BL):
        super().__init__()
        self.layout, self.ids_BL, self.codebook_VC = teacher.layout, ids_BL, teacher.codebook_VC

    def forward(self, x_BLC, labels_B, start_B, logits_at=slice(None)):
        logits_BLV = F.one_hot(self.ids_BL[:, logits_at], len(self.codebook_VC)).float()
        return StudentOutput(logits_BLV, F.embedding(self.ids_BL, self.codebook_VC))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_perfect_student_draws_the_flow_maps_images(family):
    """The two rows are the same function but for the student's error: what the whole comparison rests on."""
    config = tiny(family, STEPS, "trajectories.tolerance=0.01")
    teacher, _ = untrained(family)
    protocol = Protocol(LABELS, 8, 8)
    expected = sampler("teacher_flow", family)(protocol, 7)

    noise = rows.sample_noise(7, np.arange(8), teacher, 8)
    pick = flow_picker(teacher.layout, teacher.codebook_VC, noise, config.trajectories)
    oracle = Oracle(teacher, sample_teacher(teacher, LABELS, config.sampling, pick))
    for steps in (1, 2):
        drawn = rows.sample_dd1(oracle, teacher, config.dd1, steps, protocol, 7)
        assert (drawn.int() - expected.int()).abs().max() <= 1


def test_independent_tokens_draw_each_class_from_its_own_marginals():
    teacher, _ = untrained()
    certain_KL = torch.randint(64, (10, 16), generator=torch.Generator().manual_seed(3))
    images = rows.sample_independent(teacher, F.one_hot(certain_KL, 64).double(), Protocol(LABELS, 8, 3), 7)
    with torch.inference_mode():
        expected = to_uint8(teacher.decode(F.embedding(certain_KL[LABELS], teacher.codebook_VC)))
    assert (images.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_reconstruction_is_the_tokenizer_there_and_back(family):
    teacher, _ = untrained(family)
    data = digits.load().images_NIHW[:7]
    with torch.inference_mode():
        expected = to_uint8(teacher.decode(F.embedding(teacher.tokenizer.encode(data), teacher.codebook_VC)))
    assert (rows.reconstruct(teacher, data, 3).int() - expected.int()).abs().max() <= 1


def test_the_data_are_the_1797_digits_in_range():
    data = digits.load()
    assert data.images_NIHW.shape == (1797, 1, 8, 8)
    assert (data.images_NIHW.min(), data.images_NIHW.max()) == (-1, 1)
    assert len(data.images_NIHW.unique()) == 17
    package = load_digits()
    assert torch.equal(data.labels_N, torch.from_numpy(package.target).long())
    assert torch.equal(data.images_NIHW[:, 0], torch.from_numpy(package.images).float() / 8 - 1)
    assert data.labels_N.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
