"""LlamaGen's caption-conditioned model: against the golden file of the released code, and against itself."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddops.config.dd2 import HeadConfig
from ddops.config.models import CaptionShape, LlamaGenConfig, SamplingConfig
from ddops.models.ar_diffusion import ARDiffusionGenerator, new_ar_diffusion
from ddops.models.checkpoints_llamagen import llamagen_teacher_state
from ddops.models.conditions import Captions, attach_captions
from ddops.models.errors import CheckpointError
from ddops.models.llamagen import LlamaGenTeacher, seen_with_captions
from ddops.models.llamagen_student import LlamaGenStudent
from ddops.models.weights import TRANSFORMER, load_metadata, load_weights, save_weights
from ddops.sampling.few_step import sample_student
from ddops.sampling.teacher import conditional_log_probs
from helpers.llamagen_helpers import (
    FILTERED,
    GUIDED,
    LENGTH,
    PLAIN,
    SMALL,
    SMALL_CAPTIONS,
    TINY,
    force,
    multinomial,
    randomised,
    sample,
)
from helpers.var_helpers import TOLERANCE, golden, with_prefix

CONFIG = replace(TINY, num_classes=0, captions=CaptionShape(length=8, width=32))
NUMBERS = torch.arange(3)
SEED = 21


class Table:
    """Captions in memory."""

    def __init__(self, features_NTW: Tensor, mask_NT: Tensor) -> None:
        self.length, self.width = features_NTW.shape[1:]
        self.features_NTW, self.mask_NT = features_NTW, mask_NT

    def __len__(self) -> int:
        return len(self.mask_NT)

    def captions(self, numbers_B: Tensor) -> Captions:
        return Captions(self.features_NTW[numbers_B], self.mask_NT[numbers_B])


def left_padded(config: LlamaGenConfig, lengths: list[int]) -> Table:
    """Random captions of these lengths."""
    assert config.captions is not None
    generator = torch.Generator().manual_seed(2)
    shape = (len(lengths), config.captions.length, config.captions.width)
    mask_NT = torch.arange(shape[1])[None] >= shape[1] - torch.tensor(lengths)[:, None]
    return Table(torch.randn(shape, generator=generator) * mask_NT[..., None], mask_NT)


@cache
def data() -> dict[str, Tensor]:
    return golden("llamagen_t2i_teacher")


@cache
def golden_table() -> Table:
    return Table(data()["in.caption_emb"], data()["in.emb_masks"].bool())


@cache
def teacher() -> LlamaGenTeacher:
    loaded = LlamaGenTeacher(CONFIG)
    reference = with_prefix(data(), "sd.")
    loaded.transformer.load_state_dict(llamagen_teacher_state(reference, CONFIG))
    return attach_captions(loaded.eval(), golden_table())


def unmasked_teacher() -> LlamaGenTeacher:
    """The same, its captions' padding seen as if it were part of them."""
    table = golden_table()
    return attach_captions(copy.deepcopy(teacher()), Table(table.features_NTW, torch.ones_like(table.mask_NT)))


@cache
def small_teacher() -> LlamaGenTeacher:
    return attach_captions(randomised(LlamaGenTeacher(SMALL_CAPTIONS)), left_padded(SMALL_CAPTIONS, [5, 1, 3, 2]))


@torch.no_grad()
def all_rows(model: LlamaGenTeacher, numbers_B: Tensor, ids_BL: Tensor) -> Tensor:
    """Logits of every position, those of the caption too."""
    tokens_BTD, mask_BT = model.transformer.class_embedding.tokens(numbers_B)
    h_BTD = model.transformer.trunk(torch.cat([tokens_BTD, model.embed_prefix(ids_BL)], dim=1), mask_BT)
    return model.transformer.classify(model.transformer.norm(h_BTD))


def test_the_mask() -> None:
    mask_BT = golden_table().mask_NT
    seen_B1TT = seen_with_captions(mask_BT, 0, mask_BT.shape[1] + LENGTH)
    assert torch.equal(seen_B1TT[:, 0], data()["in.attn_mask"].bool())
    assert torch.equal(seen_with_captions(mask_BT, 10, 13), seen_B1TT[:, :, 10:13, :13])


def test_logits_of_a_full_pass() -> None:
    ids_BL = data()["in.tokens"]
    torch.testing.assert_close(all_rows(teacher(), NUMBERS, ids_BL), data()["out.logits_full_eval"], **TOLERANCE)
    unmasked = all_rows(unmasked_teacher(), NUMBERS, ids_BL)
    torch.testing.assert_close(unmasked, data()["out.logits_full_eval_nomask"], **TOLERANCE)
    unconditional = all_rows(teacher(), teacher().unconditional(NUMBERS), ids_BL)
    torch.testing.assert_close(unconditional, data()["out.logits_full_eval_uncond"], **TOLERANCE)


@torch.no_grad()
def test_training_logits_and_loss() -> None:
    ids_BL = data()["in.tokens"]
    logits_BLV = teacher().logits(NUMBERS, ids_BL)
    torch.testing.assert_close(logits_BLV, data()["out.train_logits"], **TOLERANCE)
    errors_BL = F.cross_entropy(logits_BLV.transpose(1, 2), ids_BL, reduction="none")
    valid_B = data()["in.valid"]
    loss = (errors_BL * valid_B[:, None]).sum() / (valid_B.sum() * LENGTH).clamp_min(1)
    torch.testing.assert_close(loss[None], data()["out.train_loss"], **TOLERANCE)


def test_sampling_sessions() -> None:
    ids_BL = data()["in.tokens"]
    for model, sampling, name in [
        (teacher(), GUIDED, "out.forced_cfg_logits"),
        (teacher(), PLAIN, "out.forced_logits_nocfg"),
        (unmasked_teacher(), GUIDED, "out.forced_cfg_logits_noembmask"),
    ]:
        expected_BLV = data()[name].log_softmax(-1)
        torch.testing.assert_close(force(model, NUMBERS, ids_BL, sampling), expected_BLV, **TOLERANCE)
    halves = zip((NUMBERS, teacher().unconditional(NUMBERS)), data()["out.forced_raw_logits"].chunk(2), strict=True)
    for numbers_B, raw_BLV in halves:
        log_probs_BLV = force(teacher(), numbers_B, ids_BL, PLAIN)
        torch.testing.assert_close(log_probs_BLV, raw_BLV.log_softmax(-1), **TOLERANCE)


def test_sampled_tokens() -> None:
    torch.manual_seed(SEED)
    ids_BL = sample(teacher(), NUMBERS, FILTERED, multinomial)
    assert torch.equal(ids_BL, data()["out.sampled_tokens"])
    unfiltered = force(teacher(), NUMBERS, ids_BL, replace(FILTERED, top_k=0, top_p=1.0))
    torch.testing.assert_close(unfiltered, data()["out.sampled_cfg_logits"].log_softmax(-1), **TOLERANCE)


def test_rotary_table_is_zero_for_the_caption() -> None:
    trunk = teacher().transformer.trunk
    table = torch.stack([trunk.cos[:, 0, 0, 0::2], trunk.signed_sin[:, 0, 0, 1::2]], dim=-1)
    torch.testing.assert_close(table, data()["out.freqs_cis"], **TOLERANCE)


@pytest.mark.parametrize(("what", "change"), [("lacks", "drop"), ("misshapen", "shorten"), ("unexpected", "add")])
def test_a_published_file_that_does_not_fit_is_refused(what: str, change: str) -> None:
    reference, key = with_prefix(data(), "sd."), "cls_embedding.uncond_embedding"
    value = reference.pop(key)
    if change != "drop":
        reference[key] = value[:4] if change == "shorten" else value
    if change == "add":
        reference["cls_embedding.embedding_table.weight"] = value
    with pytest.raises(CheckpointError, match=what):
        llamagen_teacher_state(reference, CONFIG)


# The rest of ddops asks for captions by their numbers.


def test_a_caption_by_number_is_the_caption_itself() -> None:
    """What the pipeline does, and what an exported graph does."""
    student = attach_captions(
        randomised(LlamaGenStudent(SMALL_CAPTIONS)), small_teacher().transformer.class_embedding.table
    )
    x_BLC, starts_B = torch.randn(2, LENGTH, SMALL.code_dim), torch.tensor([0, 3])
    numbers_B = torch.tensor([2, 0])
    by_number = student(x_BLC, numbers_B, starts_B)
    handed_over = student(x_BLC, student.class_embedding.table.captions(numbers_B), starts_B)
    for one, other in zip(by_number, handed_over, strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
@pytest.mark.parametrize("sampling", [GUIDED, PLAIN])
def test_one_pass_equals_level_after_level(sampling: SamplingConfig) -> None:
    numbers_B = torch.tensor([1, 3, 0])
    ids_BL = torch.randint(SMALL.codebook_size, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    one_pass = conditional_log_probs(small_teacher(), numbers_B, ids_BL, sampling)
    torch.testing.assert_close(force(small_teacher(), numbers_B, ids_BL, sampling), one_pass, **TOLERANCE)


@torch.no_grad()
def test_padding_is_not_seen() -> None:
    """Neither its features nor how much of it there is: the same caption in more slots gives the same logits."""
    numbers_B, ids_BL = torch.tensor([3]), torch.zeros(1, LENGTH, dtype=torch.long)
    longer = LlamaGenTeacher(replace(SMALL_CAPTIONS, captions=CaptionShape(length=9, width=6)))
    state = small_teacher().state_dict()
    state["transformer.class_embedding.uncond_TW"] = torch.zeros(9, 6)
    longer.load_state_dict(state)
    table = left_padded(SMALL_CAPTIONS, [5, 1, 3, 2])
    padded = Table(F.pad(table.features_NTW, (0, 0, 4, 0)), F.pad(table.mask_NT, (4, 0)))
    attach_captions(longer.eval(), padded)
    expected_BLV = small_teacher().logits(numbers_B, ids_BL)
    torch.testing.assert_close(longer.logits(numbers_B, ids_BL), expected_BLV, **TOLERANCE)
    padded.features_NTW[:, 0] = 7.0
    torch.testing.assert_close(longer.logits(numbers_B, ids_BL), expected_BLV, **TOLERANCE)


def test_the_student_starts_as_the_teacher_and_sees_the_caption() -> None:
    student = LlamaGenStudent(SMALL_CAPTIONS)
    student.init_from_teacher(small_teacher())
    table = small_teacher().transformer.class_embedding.table
    assert student.num_conditions == 0
    attach_captions(student, table)
    assert student.num_conditions == small_teacher().num_conditions == 4
    for ours, theirs in zip(
        student.class_embedding.state_dict().values(),
        small_teacher().transformer.class_embedding.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    noise_BLC = torch.randn(2, LENGTH, SMALL.code_dim, generator=torch.Generator().manual_seed(0))
    codebook_VC = small_teacher().codebook_VC
    draws = [
        sample_student(student.eval(), codebook_VC, noise_BLC, torch.tensor(numbers), (0, 4), 8)
        for numbers in ([0, 1], [0, 2])
    ]
    assert torch.equal(draws[0][0], draws[1][0])
    assert not torch.equal(draws[0][1], draws[1][1])


def test_dd2s_models_take_captions() -> None:
    """Its copies of the teacher keep the attached prompt set, which they share."""
    model = new_ar_diffusion(small_teacher(), HeadConfig(width=8, blocks=1, predicts="codes"))
    generator = ARDiffusionGenerator(model)
    assert generator.num_conditions == 4
    noise_BLC = torch.randn(2, LENGTH, SMALL.code_dim)
    numbers_B = torch.tensor([3, 1])
    output = generator(noise_BLC, numbers_B, torch.zeros_like(numbers_B))
    table = small_teacher().transformer.class_embedding.table
    captions = table.captions(numbers_B)
    same = generator(noise_BLC, captions, torch.zeros_like(numbers_B))
    assert torch.equal(output.embeddings_BLC, same.embeddings_BLC)
    assert torch.isfinite(output.embeddings_BLC).all()


def test_what_is_not_attached_or_does_not_fit_is_refused() -> None:
    ids_BL = torch.zeros(1, LENGTH, dtype=torch.long)
    with pytest.raises(ValueError, match="attach a prompt set"):
        LlamaGenTeacher(SMALL_CAPTIONS).logits(torch.tensor([0]), ids_BL)
    with pytest.raises(ValueError, match=r"5 tokens of width 6.*takes 8 of 32"):
        attach_captions(LlamaGenTeacher(CONFIG), left_padded(SMALL_CAPTIONS, [1]))
    with pytest.raises(ValueError, match="conditioned on classes"):
        attach_captions(LlamaGenTeacher(SMALL), left_padded(SMALL_CAPTIONS, [1]))
    with pytest.raises(TypeError, match="on classes, not on captions"):
        LlamaGenStudent(SMALL)(
            torch.zeros(1, LENGTH, SMALL.code_dim),
            left_padded(SMALL_CAPTIONS, [1]).captions(torch.tensor([0])),
            ids_BL[:, 0],
        )


def test_a_configuration_has_classes_or_captions() -> None:
    with pytest.raises(ValueError, match="num_classes"):
        replace(CONFIG, num_classes=10)
    with pytest.raises(ValueError, match="num_classes"):
        replace(SMALL, num_classes=0)


def test_weight_files_keep_the_configuration(tmp_path: Path) -> None:
    """And a class model's file is byte for byte what it was before there were captions: it does not mention them."""
    save_weights(tmp_path / "t2i", small_teacher().transformer.state_dict(), SMALL_CAPTIONS, TRANSFORMER)
    state, config, _ = load_weights(tmp_path / "t2i", TRANSFORMER)
    assert config == SMALL_CAPTIONS
    assert "class_embedding.uncond_TW" in state
    save_weights(tmp_path / "c2i", {}, SMALL, TRANSFORMER)
    assert load_metadata(tmp_path / "c2i", TRANSFORMER)[0] == SMALL
    assert b"captions" not in (tmp_path / "c2i").read_bytes()
