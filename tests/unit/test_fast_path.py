"""The lean passes against the plain ones: equal sequences and images, and what they leave out is left out."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddops.evaluation.drawing import sample_noise
from ddops.export.graph import OneStepGraph
from ddops.models import level_attention
from ddops.models.autoencoder import upsample
from ddops.models.interface import FullPasses, Student
from ddops.models.layout import LevelLayout, noise_data_rows
from ddops.models.lean import Doubled, make_lean
from ddops.models.level_attention import LevelAttention, student_mask
from ddops.models.precision import WholeLinear
from ddops.models.reduced import to_bfloat16
from ddops.models.var import attend_masked
from ddops.models.var_student import VARStudent
from ddops.sampling.few_step import sample_student
from ddops.sampling.mixed import nearest_codes, sample_teacher_involved
from ddops.sampling.plain import plain_sample, plain_step
from ddops.sampling.teacher import sample_teacher
from helpers.llamagen_helpers import golden_student as golden_llamagen
from helpers.llamagen_helpers import randomised
from helpers.tiny import tiny, untrained
from helpers.var_helpers import SMALL, codebook, golden, golden_student

FAMILIES = pytest.mark.parametrize("family", ["llamagen", "var"])
LABELS = torch.tensor([3, 1, 4])
VAR_221 = (1, 1, 4, 9, 49, 64, 100)
"""Levels that need both ways through :class:`LevelAttention`."""


def noise_for(family: str) -> Tensor:
    teacher, _ = untrained(family)
    return sample_noise(7, torch.arange(3).numpy(), teacher, teacher.codebook_VC.shape[1])


def likeliest(level: int, log_p_BlV: Tensor) -> Tensor:
    return log_p_BlV.argmax(-1)


@FAMILIES
@pytest.mark.parametrize("starts", [(0,), (0, 2), (0, 1, 3)])
@pytest.mark.parametrize("share_of_logits", [0, 0.5, 1])
@torch.inference_mode()
def test_lean_images_are_the_plain_ones(family: str, starts: tuple[int, ...], share_of_logits: float) -> None:
    teacher, student = untrained(family)
    arguments = (teacher.codebook_VC, noise_for(family), LABELS, starts)
    prefix = round(share_of_logits * student.layout.num_levels)
    lean_BLC, plain_BLC = (sample(student, *arguments, prefix) for sample in (sample_student, plain_sample))
    torch.testing.assert_close(lean_BLC, plain_BLC, atol=1e-5, rtol=1e-5)
    images_BIHW = make_lean(copy.deepcopy(teacher.tokenizer)).decode(lean_BLC)
    torch.testing.assert_close(images_BIHW, teacher.decode(plain_BLC), atol=1e-4, rtol=0)


@pytest.mark.parametrize("sides", [(1, 1), (5, 7)])
def test_a_doubling_and_its_convolution_are_one_on_the_small_map(sides: tuple[int, int]) -> None:
    """To rounding in float64, at the border too."""
    torch.manual_seed(0)
    plain = upsample(6).double()
    x_BKhw = torch.randn(2, 6, *sides, dtype=torch.float64)
    torch.testing.assert_close(Doubled(plain[1])(x_BKhw), plain(x_BKhw), atol=1e-14, rtol=0)


@FAMILIES
def test_a_lean_decoder_doubles_no_map(family: str) -> None:
    teacher, _ = untrained(family)
    lean = make_lean(copy.deepcopy(teacher.tokenizer)).decoder
    doublings = sum(isinstance(part, nn.Upsample) for part in teacher.tokenizer.decoder.modules())
    assert sum(isinstance(part, Doubled) for part in lean.modules()) == doublings > 0
    assert not any(isinstance(part, nn.Upsample) for part in lean.modules())


@FAMILIES
@pytest.mark.parametrize("levels", [(0, 2), (1, 2), (1, 3)])
@torch.inference_mode()
def test_lean_teacher_involved_sequences_are_the_plain_ones(family: str, levels: tuple[int, int]) -> None:
    """The plain way: a whole first step of which the prefix is taken, the teacher from there, a whole last step."""
    teacher, student = untrained(family)
    (first, last), prefix, noise_BLC = levels, 3, noise_for(family)
    codebook_VC, layout, sampling = teacher.codebook_VC, teacher.layout, tiny(family).sampling
    lean_BLC = sample_teacher_involved(student, teacher, noise_BLC, LABELS, levels, prefix, sampling, likeliest)

    own_BL = nearest_codes(plain_step(student, codebook_VC, noise_BLC, noise_BLC, LABELS, 0, prefix), codebook_VC)

    def given_then_likeliest(level: int, log_p_BlV: Tensor) -> Tensor:
        return own_BL[:, layout.positions(level)] if level < first else log_p_BlV.argmax(-1)

    x_BLC = F.embedding(sample_teacher(teacher, LABELS, sampling, given_then_likeliest), codebook_VC)
    plain_BLC = plain_step(student, codebook_VC, x_BLC, noise_BLC, LABELS, last, prefix)
    torch.testing.assert_close(lean_BLC, plain_BLC, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("together", [0, 5, 128])
@torch.inference_mode()
def test_golden_images_come_out_of_every_grouping_of_levels(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    """The released VAR student's two steps, its levels run one by one, partly together, all together."""
    monkeypatch.setattr(level_attention, "TOGETHER", together)
    noise_BLC, labels_B = golden("dd1_var")["in.sample_noise"], golden("dd1_var")["in.sample_label_B"]
    q_BLC = sample_student(golden_student(), codebook(golden("dd1_var")), noise_BLC, labels_B, (0, 2), 2)
    torch.testing.assert_close(q_BLC, golden("dd1_var")["out.step2.seq_1"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("levels", [VAR_221, (200, 30, 40), (3,)])
@pytest.mark.parametrize("score", [1.0, 10.0, 100.0])
def test_attention_by_levels_is_the_masked_one(levels: tuple[int, ...], score: float) -> None:
    """In float64, up to the largest scores that VAR's heads can make; and of a cut sequence."""
    torch.manual_seed(0)
    layout = LevelLayout(levels)
    q, k, v = (torch.randn(2, 3, layout.length, 8, dtype=torch.float64) for _ in range(3))
    q, k = score * F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    expected = attend_masked(q, k, v, 0.9, mask_lK=student_mask(layout, q.device))
    for stop in layout.offsets[1:]:
        cut = LevelAttention(layout, stop, q)(q[:, :, :stop], k[:, :, :stop], v[:, :, :stop], 0.9)
        torch.testing.assert_close(cut, expected[:, :, :stop], atol=1e-6 * score, rtol=0)


def test_attention_by_levels_in_half_precision_errs_as_the_masked_one() -> None:
    """The score with itself goes through two channels: in one, bfloat16 would be wrong by up to 0.2 of 100."""
    torch.manual_seed(0)
    layout = LevelLayout(VAR_221)
    q, k, v = (torch.randn(2, 3, layout.length, 64, dtype=torch.float64) for _ in range(3))
    k = F.normalize(k, dim=-1)
    q = 100 * F.normalize(k + 0.05 * q, dim=-1)  # to itself each position scores nearly 100, and others far less
    q[:, :, -1] = 100 * k[:, :, 0]
    q, k, v = (x.bfloat16() for x in (q, k, v))
    mask_PP = student_mask(layout, q.device)
    exact = attend_masked(q.double(), k.double(), v.double(), 0.2, mask_lK=mask_PP)
    masked = attend_masked(q, k, v, 0.2, mask_lK=mask_PP).double()
    by_levels = LevelAttention(layout, layout.length, q)(q, k, v, 0.2).double()
    assert (by_levels - exact).square().mean() < 2 * (masked - exact).square().mean()


@pytest.mark.parametrize(
    "change", [{}, {"shared_ada_ln": True}, {"attention_l2_norm": False}], ids=["plain", "shared", "no_l2_norm"]
)
@torch.inference_mode()
def test_var_s_session_at_more_positions_than_one_group(change: dict[str, bool]) -> None:
    config = replace(SMALL, image_size=192, patch_sizes=(1, 4, 8, 12), **change)
    student = randomised(VARStudent(config))
    torch.manual_seed(1)
    noise_BLC, labels_B = torch.randn(2, student.layout.length, config.code_dim), torch.tensor([0, 5])
    codes_VC = torch.randn(config.codebook_size, config.code_dim)
    for starts in ((0,), (0, 3)):
        lean_BLC = sample_student(student, codes_VC, noise_BLC, labels_B, starts, 2)
        plain_BLC = plain_sample(student, codes_VC, noise_BLC, labels_B, starts, 2)
        torch.testing.assert_close(lean_BLC, plain_BLC, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("student", [golden_student(), golden_llamagen()], ids=["var", "llamagen"])
@torch.inference_mode()
def test_a_session_without_a_family_s_own_passes_agrees(student: Student) -> None:
    """The pass that a new family starts with, against the lean one, wherever a step may start and end."""
    torch.manual_seed(2)
    offsets, labels_B = student.layout.offsets, torch.tensor([1, 2])
    x_BLC = torch.randn(2, student.layout.length, 8)
    lean, full = student.open(labels_B), FullPasses(student, labels_B)
    for start in range(0, student.layout.num_levels, 2):
        for stop in range(start + 1, student.layout.num_levels + 1, 3):
            given, length = offsets[start], offsets[stop]
            ours, theirs = (session.predict(x_BLC[:, :length], given, length - 1) for session in (lean, full))
            assert ours.logits_BLV.shape[1] == length - 1 - given
            assert ours.embeddings_BLC.shape[1] == 1
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@FAMILIES
@torch.inference_mode()
def test_a_first_step_runs_up_to_the_second_start_and_norms_once(family: str) -> None:
    """Of two steps, the first is as short as it can be, and what depends on the class alone is computed once."""
    teacher, student = untrained(family)
    layers = {
        "positions": student.get_submodule("input_proj" if family == "llamagen" else "transformer.word_embedding"),
        "classes": student.get_submodule("class_embedding" if family == "llamagen" else "transformer.class_embedding"),
        "logits": student.get_submodule("head" if family == "llamagen" else "transformer.head"),
    }
    seen: dict[str, list[int]] = {name: [] for name in layers}
    hooks = [
        layer.register_forward_hook(lambda _, __, output, name=name: seen[name].append(output.shape[1]))
        for name, layer in layers.items()
    ]
    sample_student(student, teacher.codebook_VC, noise_for(family), LABELS, (0, 2), 3)
    for hook in hooks:
        hook.remove()
    offsets = student.layout.offsets
    assert seen["positions"] == [offsets[2], offsets[-1]]
    assert seen["logits"] == [offsets[2], offsets[3] - offsets[2]]
    assert len(seen["classes"]) == 1


def test_data_rows_come_first() -> None:
    table_2D = torch.tensor([[0.0, 10.0], [1.0, 11.0]])
    assert noise_data_rows(table_2D, 1, 3).tolist() == [[1, 11], [0, 10], [0, 10]]
    assert noise_data_rows(table_2D, 0, 1).tolist() == [[0, 10]]


@FAMILIES
@torch.inference_mode()
def test_in_bfloat16_products_are_rounded_and_heads_are_not(family: str) -> None:
    """Read off what each layer takes and gives; and most tokens fall as they did."""
    teacher, student = copy.deepcopy(untrained(family))
    graph = OneStepGraph(student, teacher.tokenizer, (0,), student.layout.num_levels // 2).eval()
    expected_ids = graph.draw(noise_for(family), LABELS)[1]
    rounded = to_bfloat16(copy.deepcopy(graph), graph.whole_modules)
    kinds: dict[str, torch.dtype] = {}
    for name, module in rounded.named_modules():
        if type(module) in (
            nn.Linear,
            WholeLinear,
            nn.Conv2d,
        ):  # and not VAR's phi, which mixes a convolution with its input
            module.register_forward_hook(lambda _, __, output, name=name: kinds.__setitem__(name, output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        images_BIHW, ids_Bn = rounded.draw(noise_for(family), LABELS)
    assert images_BIHW.dtype == torch.float32
    for name, kind in kinds.items():
        whole = any(name.startswith(f"{module}.module") for module in graph.whole_modules)
        assert kind == (torch.float32 if whole else torch.bfloat16), name
    assert sum(kind == torch.bfloat16 for kind in kinds.values()) > 10
    assert sum(kind == torch.float32 for kind in kinds.values()) == 3  # two heads, the decoder's last convolution
    assert (ids_Bn == expected_ids).double().mean() > 0.9
