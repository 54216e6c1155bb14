"""Teacher-involved sampling and skip-n: against the student and the teacher where they coincide with one of them, and
the prefix that the teacher goes on from against its masked full pass."""

import pytest
import torch
import torch.nn.functional as F

from ddops.evaluation.drawing import sample_noise
from ddops.models.sampling_filters import guided_log_probs
from ddops.sampling.few_step import sample_student
from ddops.sampling.mixed import nearest_codes, sample_skipping, sample_teacher_involved
from ddops.sampling.teacher import sample_teacher
from helpers.tiny import tiny, untrained

FAMILIES = pytest.mark.parametrize("family", ["llamagen", "var"])
LABELS = torch.tensor([3, 1, 4])
INDICES = torch.arange(3).numpy()


def likeliest(level, log_p_BlV):
    return log_p_BlV.argmax(-1)


def involved(family, levels, pick=likeliest, logit_prefix=None):
    teacher, student = untrained(family)
    config = tiny(family)
    noise_BLC = sample_noise(7, INDICES, teacher, teacher.codebook_VC.shape[1])
    prefix = config.dd1.logit_prefix if logit_prefix is None else logit_prefix
    return sample_teacher_involved(student, teacher, noise_BLC, LABELS, levels, prefix, config.sampling, pick)


def students(family, starts):
    teacher, student = untrained(family)
    noise_BLC = sample_noise(7, INDICES, teacher, teacher.codebook_VC.shape[1])
    return sample_student(student, teacher.codebook_VC, noise_BLC, LABELS, starts, tiny(family).dd1.logit_prefix)


def guided_full_pass(family, ids_BL, level):
    """The distribution of a level given all tokens, from the teacher-forced pass with its training mask."""
    teacher, _ = untrained(family)
    sampling, here = tiny(family).sampling, teacher.layout.positions(level)
    labels = (LABELS, torch.full_like(LABELS, teacher.num_conditions))
    cond, uncond = (teacher.logits(labels_B, ids_BL)[:, here] for labels_B in labels)
    return guided_log_probs(cond, uncond, teacher.guidance_scale(sampling.guidance, level), sampling)


@FAMILIES
@torch.inference_mode()
def test_a_teacher_that_answers_as_the_student_did_changes_nothing(family):
    """Then teacher-involved sampling is the student's own two steps."""
    teacher, _ = untrained(family)
    two_steps = students(family, (0, 2))
    own_BL = nearest_codes(students(family, (0,)), teacher.codebook_VC)
    echo = involved(family, (1, 2), lambda level, log_p: own_BL[:, teacher.layout.positions(level)], logit_prefix=2)
    expected = sample_student(
        untrained(family)[1],
        teacher.codebook_VC,
        sample_noise(7, INDICES, teacher, teacher.codebook_VC.shape[1]),
        LABELS,
        (0, 2),
        2,
    )
    torch.testing.assert_close(echo, expected)
    assert two_steps.shape == echo.shape


@FAMILIES
@torch.inference_mode()
def test_the_teacher_goes_on_from_the_prefix_as_it_was_trained_to(family):
    """Causally: what it predicts after the student's levels is what its full pass, mask and all, predicts there."""
    teacher, _ = untrained(family)
    seen = {}

    def watching(level, log_p_BlV):
        seen[level] = log_p_BlV
        return log_p_BlV.argmax(-1)

    q_BLC = involved(family, (2, 3), watching)
    ids_BL = nearest_codes(q_BLC, teacher.codebook_VC)
    own_BL = nearest_codes(students(family, (0,)), teacher.codebook_VC)
    given = slice(0, teacher.layout.offsets[2])
    assert torch.equal(ids_BL[:, given], own_BL[:, given])
    assert list(seen) == [2]
    torch.testing.assert_close(seen[2], guided_full_pass(family, ids_BL, 2), rtol=1e-4, atol=1e-4)


@FAMILIES
@torch.inference_mode()
def test_from_the_first_level_on_it_is_the_teacher_then_the_student(family):
    teacher, student = untrained(family)
    alone_BL = sample_teacher(teacher, LABELS, tiny(family).sampling, likeliest)
    q_BLC = involved(family, (0, 2))
    given = slice(0, teacher.layout.offsets[2])
    assert torch.equal(nearest_codes(q_BLC, teacher.codebook_VC)[:, given], alone_BL[:, given])
    noise_BLC = sample_noise(7, INDICES, teacher, teacher.codebook_VC.shape[1])
    x_BLC = torch.cat([q_BLC[:, given], noise_BLC[:, given.stop :]], dim=1)
    output = student(x_BLC, LABELS, torch.full_like(LABELS, 2))
    prefix = teacher.layout.offsets[min(tiny(family).dd1.logit_prefix, teacher.layout.num_levels)]
    from_logits = F.embedding(output.logits_BLV.argmax(-1), teacher.codebook_VC)
    expected = torch.cat([from_logits[:, :prefix], output.embeddings_BLC[:, prefix:]], dim=1)
    torch.testing.assert_close(q_BLC[:, given.stop :], expected[:, given.stop :])


@pytest.mark.parametrize("levels", [(2, 2), (-1, 2), (1, 4)])
def test_impossible_levels_are_refused(levels):
    with pytest.raises(ValueError, match="levels 0 <= first < last < 4"):
        involved("var", levels)


@FAMILIES
@torch.inference_mode()
def test_skipping_draws_the_teachers_levels_and_the_rest_at_once(family):
    """Up to the first level of the parallel step all is known, and it is the teacher; later levels see fillers."""
    teacher, _ = untrained(family)
    sampling = tiny(family).sampling
    alone_BL = sample_teacher(teacher, LABELS, sampling, likeliest)
    ids_BL = sample_skipping(teacher, LABELS, 1, sampling, likeliest)
    known = slice(0, teacher.layout.offsets[-2])
    assert torch.equal(ids_BL[:, known], alone_BL[:, known])
    filler = nearest_codes(teacher.codebook_VC.mean(0)[None, None], teacher.codebook_VC).item()
    inputs_BL = ids_BL.clone()
    inputs_BL[:, teacher.layout.positions(teacher.layout.num_levels - 2)] = filler
    last = teacher.layout.num_levels - 1
    expected = guided_full_pass(family, inputs_BL, last).argmax(-1)
    assert torch.equal(ids_BL[:, teacher.layout.positions(last)], expected)


def test_skipping_everything_or_nothing_is_refused():
    teacher, _ = untrained("var")
    for skipped in (0, 4):
        with pytest.raises(ValueError, match="1 <= n < 4"):
            sample_skipping(teacher, LABELS, skipped, tiny("var").sampling, likeliest)
