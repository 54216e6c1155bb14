"""The DD1 student of VAR and few-step sampling against the golden file of the released code, and against themselves."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from ddops.models.checkpoints_tokenizers import var_tokenizer_state
from ddops.models.checkpoints_var import var_student_state
from ddops.models.errors import CheckpointError
from ddops.models.layout import LevelLayout
from ddops.models.var import VARTeacher
from ddops.models.var_student import VARStudent
from ddops.models.var_tokenizer import VARTokenizer
from ddops.sampling.few_step import renoise, sample_student
from ddops.sampling.plain import final_sequence, plain_sample
from helpers.var_helpers import (
    NUM_LEVELS,
    SMALL,
    TINY,
    TOLERANCE,
    Sample,
    codebook,
    golden,
    golden_student,
    with_prefix,
)


@cache
def data() -> dict[str, Tensor]:
    return golden("dd1_var")


@cache
def golden_tokenizer() -> VARTokenizer:
    tokenizer = VARTokenizer(TINY)
    tokenizer.load_state_dict(var_tokenizer_state(with_prefix(golden("var_tokenizer"), "sd."), TINY))
    return tokenizer.eval()


def random_student() -> VARStudent:
    """A student whose every weight matters."""
    torch.manual_seed(0)
    student = VARStudent(SMALL)
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return student.eval()


def starts() -> Tensor:
    return data()["in.t"].long()


@torch.no_grad()
def test_both_heads_at_each_start() -> None:
    logits_BLV, embeddings_BLC = golden_student()(data()["in.x"], data()["in.label_B"], starts())
    torch.testing.assert_close(logits_BLV, data()["out.x_BLV"], **TOLERANCE)
    torch.testing.assert_close(embeddings_BLC, data()["out.x_BLCv"], **TOLERANCE)


def test_renoise() -> None:
    x_BLC, layout = codebook(data())[data()["in.data_idx"]], LevelLayout(TINY.level_sizes)
    perturbed_BLC = renoise(x_BLC, data()["in.noise_fp"], data()["out.perturb_t"].long(), layout)
    torch.testing.assert_close(perturbed_BLC, data()["out.perturbed"], rtol=0, atol=0)
    input_BLC = renoise(x_BLC, data()["in.noise_fp"], starts(), layout)
    torch.testing.assert_close(input_BLC, data()["out.fp_input"], rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("logit_prefix", [0, 2, 3])
def test_both_heads_and_final_sequence(logit_prefix: int) -> None:
    layout, x_BLC = golden_student().layout, data()["out.fp_input"]
    output = golden_student()(x_BLC, data()["in.label_B"], starts())
    predicted_BL = ~layout.given_mask(starts())
    for ours, key in zip(output, ("out.fp_logits", "out.fp_conti"), strict=True):
        torch.testing.assert_close(ours[predicted_BL], data()[key][predicted_BL], **TOLERANCE)
    sequence_BLC = final_sequence(x_BLC, output, codebook(data()), starts(), logit_prefix, layout)
    torch.testing.assert_close(sequence_BLC, data()[f"out.final_seq_split{logit_prefix}"], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("logit_prefix", [0, 2, 3])
def test_a_session_s_pass_from_each_start(logit_prefix: int) -> None:
    """The lean pass, against what the released code gives at the positions that it is asked for."""
    layout = golden_student().layout
    for row, start in enumerate(starts().tolist()[:-1]):
        one, given = slice(row, row + 1), layout.offsets[start]
        coded = max(given, layout.offsets[logit_prefix])
        session = golden_student().open(data()["in.label_B"][one])
        output = session.predict(data()["out.fp_input"][one], given, coded)
        expected_1LC, expected_1LV = data()["out.fp_conti"][one], data()["out.fp_logits"][one]
        torch.testing.assert_close(output.embeddings_BLC, expected_1LC[:, coded:], **TOLERANCE)
        torch.testing.assert_close(output.logits_BLV, expected_1LV[:, given:coded], **TOLERANCE)


@pytest.mark.parametrize("sample", [sample_student, plain_sample])
@pytest.mark.parametrize(("start_positions", "name"), [((0,), "step1"), ((0, 2), "step2")])
@torch.no_grad()
def test_few_step_sequences_and_images(start_positions: tuple[int, ...], name: str, sample: Sample) -> None:
    noise_BLC, labels_B = data()["in.sample_noise"], data()["in.sample_label_B"]
    q_BLC = sample(golden_student(), codebook(data()), noise_BLC, labels_B, start_positions, 2)
    torch.testing.assert_close(q_BLC, data()[f"out.{name}.seq_{len(start_positions) - 1}"], **TOLERANCE)
    images_BIHW = golden_tokenizer().decode(q_BLC)
    torch.testing.assert_close((images_BIHW.clamp(-1, 1) + 1) / 2, data()[f"out.{name}.image"], **TOLERANCE)


@torch.no_grad()
def test_second_step_input() -> None:
    first_BLC, noise_BLC = data()["out.step2.seq_0"], data()["in.sample_noise"]
    input_BLC = renoise(first_BLC, noise_BLC, torch.tensor([2, 2]), golden_student().layout)
    torch.testing.assert_close(input_BLC, data()["out.step2.x_in_1"], **TOLERANCE)


def test_given_positions_keep_values_that_are_no_codes() -> None:
    layout = LevelLayout(SMALL.level_sizes)
    x_BLC, codes_VC, labels_B = torch.randn(3, layout.length, 8), torch.randn(64, 8), torch.tensor([1, 2, 3])
    for start in range(layout.num_levels + 1):
        given, start_B = layout.offsets[start], torch.full_like(labels_B, start)
        output = random_student()(x_BLC, labels_B, start_B)
        sequence_BLC = final_sequence(x_BLC, output, codes_VC, start_B, 3, layout)
        assert torch.equal(sequence_BLC[:, :given], x_BLC[:, :given])
        assert torch.equal(sequence_BLC[:, given:], codes_VC[output.logits_BLV[:, given:].argmax(-1)])


@pytest.mark.parametrize(
    ("start_positions", "logit_prefix"), [((), 0), ((1,), 0), ((0, 2, 1), 0), ((0, 0), 0), ((0, 3), 0), ((0,), 4)]
)
def test_impossible_schedules_are_refused(start_positions: tuple[int, ...], logit_prefix: int) -> None:
    noise_BLC = torch.zeros(1, sum(SMALL.level_sizes), 8)
    with pytest.raises(ValueError, match=r"start_positions|logit_prefix"):
        sample_student(
            random_student(), torch.zeros(64, 8), noise_BLC, torch.zeros(1).long(), start_positions, logit_prefix
        )


@pytest.mark.parametrize("position", [0, 2, 7])
@torch.no_grad()
def test_a_position_moves_only_itself_and_later_levels(position: int) -> None:
    student = random_student()
    layout, start_B, labels_B = student.layout, torch.tensor([1]), torch.tensor([4])
    x_BLC = torch.randn(1, layout.length, SMALL.code_dim)
    moved_x_BLC = x_BLC.clone()
    moved_x_BLC[:, position] += 1
    level_L = layout.level_of_position()
    expected_L = (level_L > level_L[position]) | (torch.arange(layout.length) == position)
    for before, after in zip(student(x_BLC, labels_B, start_B), student(moved_x_BLC, labels_B, start_B), strict=True):
        assert torch.equal((after - before).abs().amax(dim=(0, 2)) > 1e-6, expected_L)


@torch.no_grad()
def test_rows_of_a_batch_do_not_depend_on_each_other() -> None:
    student = golden_student()
    together = student(data()["in.x"], data()["in.label_B"], starts())
    for row in range(len(starts())):
        alone = student(data()["in.x"][row : row + 1], data()["in.label_B"][row : row + 1], starts()[row : row + 1])
        torch.testing.assert_close(alone.logits_BLV, together.logits_BLV[row : row + 1], **TOLERANCE)


def teacher_and_student() -> tuple[VARTeacher, VARStudent]:
    torch.manual_seed(0)
    teacher, student = VARTeacher(SMALL), VARStudent(SMALL)
    for parameter in teacher.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    student.init_from_teacher(teacher)
    return teacher, student


def test_init_from_teacher_copies_and_aligns_the_rows() -> None:
    teacher, student = teacher_and_student()
    theirs, ours = teacher.transformer.state_dict(), student.transformer.state_dict()
    for name in ("position_1LD", "level_embedding.weight"):
        rows, expected = (state[name].view(-1, SMALL.width) for state in (ours, theirs))
        assert torch.equal(rows[1:], expected)
        assert torch.equal(rows[0], expected[0])
    for name in theirs.keys() - {"position_1LD", "level_embedding.weight"}:
        assert torch.equal(ours[name], theirs[name]), name
    assert student.transformer.head.weight.data_ptr() != teacher.transformer.head.weight.data_ptr()


@torch.no_grad()
def test_init_from_teacher_keeps_the_class_position() -> None:
    """Alone and without the noise/data embedding, the class position predicts what the teacher's first one does."""
    teacher, student = teacher_and_student()
    labels_B = torch.tensor([3])
    expected_BV = teacher.logits(labels_B, torch.zeros(1, teacher.layout.length).long())[:, 0]
    cond_BD = student.transformer.class_embedding(labels_B)
    vectors = student.transformer.modulation_vectors(cond_BD)
    x_BlD = student.transformer.place(student.transformer.embed_class(cond_BD), slice(0, 1))
    for block, vectors_B16D in zip(student.transformer.blocks, vectors.blocks, strict=True):
        x_BlD = block(x_BlD, vectors_B16D)
    torch.testing.assert_close(student.transformer.predict(x_BlD, vectors)[:, 0], expected_BV, **TOLERANCE)


def test_init_from_teacher_refuses_another_architecture() -> None:
    with pytest.raises(ValueError, match="configuration"):
        VARStudent(SMALL).init_from_teacher(VARTeacher(replace(SMALL, depth=1)))
    with pytest.raises(TypeError, match="VARTeacher"):
        VARStudent(SMALL).init_from_teacher(torch.nn.Identity())  # type: ignore[arg-type]


def test_student_trains_from_the_teacher_and_no_weight_is_dead() -> None:
    student = VARStudent(SMALL)
    student.init_from_teacher(VARTeacher(SMALL))
    generator = torch.Generator().manual_seed(0)
    labels_B = torch.randint(SMALL.num_classes, (8,), generator=generator)
    ids_BL = torch.randint(SMALL.codebook_size, (8, student.layout.length), generator=generator)
    codes_VC = torch.randn(SMALL.codebook_size, SMALL.code_dim, generator=generator)
    noise_BLC = torch.randn(8, student.layout.length, SMALL.code_dim, generator=generator)
    start_B = torch.tensor([0, 1] * 4)
    x_BLC = renoise(codes_VC[ids_BL], noise_BLC, start_B, student.layout)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        logits_BLV, embeddings_BLC = student(x_BLC, labels_B, start_B)
        cross_entropy = torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), ids_BL.flatten())
        loss = cross_entropy + torch.nn.functional.mse_loss(embeddings_BLC, codes_VC[ids_BL])
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            dead = [name for name, p in student.named_parameters() if p.grad is None or not p.grad.any()]
            assert dead == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_checkpoint_errors_name_the_key() -> None:
    state = with_prefix(data(), "sd.")
    with pytest.raises(CheckpointError, match=r"layerwise_n_d_embed\.2\.bias"):
        var_student_state({key: value for key, value in state.items() if key != "layerwise_n_d_embed.2.bias"}, TINY)
    with pytest.raises(CheckpointError, match="surprise"):
        var_student_state(state | {"surprise": torch.zeros(1)}, TINY)
    with pytest.raises(CheckpointError, match="pos_1LC"):
        var_student_state(state | {"pos_1LC": torch.zeros(1, 30, 64)}, TINY)


def test_golden_levels_are_the_configuration_s() -> None:
    assert starts().tolist() == list(range(NUM_LEVELS + 1))
