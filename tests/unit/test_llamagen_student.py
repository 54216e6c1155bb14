"""The DD1 student of LlamaGen and few-step sampling against the golden file of the released code, and themselves."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddops.models.checkpoints_llamagen import llamagen_student_state
from ddops.models.errors import CheckpointError
from ddops.models.interface import StudentOutput
from ddops.models.llamagen import LlamaGenTeacher, fit_linear
from ddops.models.llamagen_student import LlamaGenStudent
from ddops.models.var_student import VARStudent
from ddops.sampling.few_step import renoise, sample_student
from ddops.sampling.plain import final_sequence, plain_sample
from helpers.llamagen_helpers import LENGTH, SMALL, TINY, golden_student, golden_teacher, random_tokens, randomised
from helpers.var_helpers import TINY as TINY_VAR
from helpers.var_helpers import TOLERANCE, Sample, golden, with_prefix

SPLIT = 5
TWO_STEPS = (0, 5)


@cache
def data() -> dict[str, Tensor]:
    return golden("dd1_llamagen")


@cache
def small_student() -> LlamaGenStudent:
    return randomised(LlamaGenStudent(SMALL))


def starts() -> Tensor:
    return data()["in.t"].long()


def small_inputs(batch: int = 3) -> tuple[Tensor, Tensor]:
    """Inputs (B, L, C) and labels."""
    generator = torch.Generator().manual_seed(2)
    x_BLC = torch.randn(batch, LENGTH, SMALL.code_dim, generator=generator)
    return x_BLC, random_tokens(SMALL, batch)[0]


@torch.no_grad()
def test_both_heads_at_each_start() -> None:
    logits_BLV, embeddings_BLC = golden_student()(data()["in.x"], data()["in.cond_idx"], starts())
    torch.testing.assert_close(logits_BLV, data()["out.logits"], **TOLERANCE)
    torch.testing.assert_close(embeddings_BLC, data()["out.tokens"], **TOLERANCE)


@torch.no_grad()
def test_renoise_both_heads_and_final_sequence() -> None:
    layout, codebook_VC = golden_student().layout, data()["in.codebook"]
    torch.testing.assert_close(golden_teacher().codebook_VC, codebook_VC)
    x_BLC = renoise(F.embedding(data()["in.data_idx"], codebook_VC), data()["in.noise_fp"], starts(), layout)
    torch.testing.assert_close(x_BLC, data()["out.perturbed"], **TOLERANCE)

    output, predicted_BL = golden_student()(x_BLC, data()["in.cond_idx"], starts()), ~layout.given_mask(starts())
    for ours, key in zip(output, ("out.fp_logits", "out.fp_tokens"), strict=True):
        torch.testing.assert_close(ours[predicted_BL], data()[key][predicted_BL], **TOLERANCE)
    for split in (0, SPLIT, LENGTH):
        sequence_BLC = final_sequence(x_BLC, output, codebook_VC, starts(), split, layout)
        torch.testing.assert_close(sequence_BLC, data()[f"out.final_x_split{split}"], **TOLERANCE)
    for row, start in enumerate(starts().tolist()):
        if start == LENGTH:
            continue
        one, coded = slice(row, row + 1), max(start, SPLIT)
        lean = golden_student().open(data()["in.cond_idx"][one]).predict(x_BLC[one], start, coded)
        torch.testing.assert_close(lean.embeddings_BLC, data()["out.fp_tokens"][one][:, coded:], **TOLERANCE)
        torch.testing.assert_close(lean.logits_BLV, data()["out.fp_logits"][one][:, start:coded], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("sample", [sample_student, plain_sample])
@pytest.mark.parametrize(("name", "start_positions"), [("step1", (0,)), ("step2", TWO_STEPS)])
def test_sampled_sequences_and_images(name: str, start_positions: tuple[int, ...], sample: Sample) -> None:
    q_BLC = sample(
        golden_student(),
        data()["in.codebook"],
        data()["in.sample_noise"],
        data()["in.sample_cond_idx"],
        start_positions,
        SPLIT,
    )
    torch.testing.assert_close(q_BLC, data()[f"out.{name}.seq_{len(start_positions) - 1}"], **TOLERANCE)
    images_BIHW = (golden_teacher().decode(q_BLC) + 1) / 2
    torch.testing.assert_close(images_BIHW, data()[f"out.{name}.image"], **TOLERANCE)


@torch.no_grad()
def test_each_step_of_two() -> None:
    student, layout, noise_BLC = golden_student(), golden_student().layout, data()["in.sample_noise"]
    labels_B, x_BLC = data()["in.sample_cond_idx"], noise_BLC
    for step, start in enumerate(TWO_STEPS):
        start_B = torch.full_like(labels_B, start)
        x_BLC = renoise(x_BLC, noise_BLC, start_B, layout)
        torch.testing.assert_close(x_BLC, data()[f"out.step2.x_in_{step}"], **TOLERANCE)
        output: StudentOutput = student(x_BLC, labels_B, start_B)
        expected_BLC, expected_BLV = data()[f"out.step2.fp_tokens_{step}"], data()[f"out.step2.fp_logits_{step}"]
        torch.testing.assert_close(output.embeddings_BLC[:, start:], expected_BLC[:, start:], **TOLERANCE)
        torch.testing.assert_close(output.logits_BLV[:, start:], expected_BLV[:, start:], **TOLERANCE)
        x_BLC = final_sequence(x_BLC, output, data()["in.codebook"], start_B, SPLIT, layout)
        torch.testing.assert_close(x_BLC, data()[f"out.step2.seq_{step}"], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("position", [0, 5, LENGTH - 1])
def test_a_position_is_seen_by_itself_and_later_ones_only(position: int) -> None:
    x_BLC, labels_B = small_inputs()
    start_B = torch.tensor([0, 5, 16])
    before = small_student()(x_BLC, labels_B, start_B)
    x_BLC[:, position] += 1
    after = small_student()(x_BLC, labels_B, start_B)
    for head_before, head_after in zip(before, after, strict=True):
        changed_L = (head_before != head_after).any(dim=(0, 2))
        assert changed_L.tolist() == [row >= position for row in range(LENGTH)]


@torch.no_grad()
@pytest.mark.parametrize("start", [1, 6, LENGTH])
def test_the_start_marks_exactly_the_given_positions_as_data(start: int) -> None:
    x_BLC, labels_B = small_inputs()
    before = small_student()(x_BLC, labels_B, torch.full_like(labels_B, start - 1))
    after = small_student()(x_BLC, labels_B, torch.full_like(labels_B, start))
    changed_L = (before.embeddings_BLC != after.embeddings_BLC).any(dim=(0, 2))
    assert changed_L.tolist() == [row >= start - 1 for row in range(LENGTH)]


def test_a_row_does_not_depend_on_its_batch() -> None:
    x_BLC, labels_B = small_inputs()
    start_B = torch.tensor([0, 5, 16])
    with torch.no_grad():
        together = small_student()(x_BLC, labels_B, start_B)
        alone = small_student()(x_BLC[1:2], labels_B[1:2], start_B[1:2])
    torch.testing.assert_close(alone.logits_BLV, together.logits_BLV[1:2], **TOLERANCE)
    torch.testing.assert_close(alone.embeddings_BLC, together.embeddings_BLC[1:2], **TOLERANCE)


def test_init_from_teacher_copies_what_is_shared() -> None:
    student = LlamaGenStudent(TINY)
    student.init_from_teacher(golden_teacher())
    theirs, ours = golden_teacher().transformer.state_dict(), student.state_dict()
    shared = theirs.keys() - {"token_embedding.weight"}
    assert shared < ours.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in shared)
    assert all(ours[key].data_ptr() != theirs[key].data_ptr() for key in shared)


def test_init_from_teacher_fits_the_input_to_the_token_table() -> None:
    """A teacher whose token table is linear in its codes is met exactly."""
    torch.manual_seed(0)
    teacher, student = LlamaGenTeacher(SMALL), LlamaGenStudent(SMALL)
    linear = torch.nn.Linear(SMALL.code_dim, SMALL.width)
    with torch.no_grad():
        teacher.transformer.token_embedding.weight.copy_(linear(teacher.codebook_VC))
    student.init_from_teacher(teacher)
    torch.testing.assert_close(student.input_proj.weight, linear.weight, **TOLERANCE)
    torch.testing.assert_close(student.input_proj.bias, linear.bias, **TOLERANCE)


def test_fit_linear_is_the_least_squares_fit() -> None:
    torch.manual_seed(0)
    inputs_VC, targets_VD = torch.randn(20, 3), torch.randn(20, 5)
    linear = torch.nn.Linear(3, 5)
    fit_linear(linear, inputs_VC, targets_VD)
    residual_VD = targets_VD - linear(inputs_VC).detach()
    torch.testing.assert_close(inputs_VC.T @ residual_VD, torch.zeros(3, 5), **TOLERANCE)
    torch.testing.assert_close(residual_VD.sum(0), torch.zeros(5), **TOLERANCE)


def test_init_from_another_teacher_is_refused() -> None:
    with pytest.raises(ValueError, match="configuration"):
        LlamaGenStudent(replace(SMALL, depth=1)).init_from_teacher(LlamaGenTeacher(SMALL))
    with pytest.raises(TypeError, match="LlamaGenTeacher"):
        LlamaGenStudent(SMALL).init_from_teacher(VARStudent(TINY_VAR))  # type: ignore[arg-type]


@pytest.mark.parametrize("from_teacher", [False, True])
def test_every_weight_has_a_gradient(from_teacher: bool) -> None:
    torch.manual_seed(0)
    student = LlamaGenStudent(SMALL)
    if from_teacher:
        student.init_from_teacher(LlamaGenTeacher(SMALL))
    x_BLC, labels_B = small_inputs()
    logits_BLV, embeddings_BLC = student(x_BLC, labels_B, torch.tensor([0, 5, 0]))
    target_BL = torch.zeros(logits_BLV.shape[:2], dtype=torch.int64)
    (F.cross_entropy(logits_BLV.mT, target_BL) + F.mse_loss(embeddings_BLC, x_BLC)).backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_checkpoint_errors_name_the_key() -> None:
    reference = with_prefix(data(), "sd.")
    lacking = {key: value for key, value in reference.items() if key != "n_d_embed.weight"}
    with pytest.raises(CheckpointError, match=r"n_d_embed\.weight"):
        llamagen_student_state(lacking, TINY)
    with pytest.raises(CheckpointError, match="surprise"):
        llamagen_student_state(reference | {"surprise": torch.zeros(1)}, TINY)
    with pytest.raises(CheckpointError, match=r"tok_embeddings\.weight"):
        llamagen_student_state(reference, replace(TINY, code_dim=4))
