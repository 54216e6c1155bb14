"""The LlamaGen teacher against the golden file of the released code, and against itself.

The golden output with guidance on a part of the positions only (``cfg_interval``) has no counterpart here.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddops.config.models import SamplingConfig
from ddops.models.checkpoints_llamagen import llamagen_teacher_state
from ddops.models.errors import CheckpointError
from ddops.models.llamagen import LlamaGenTeacher
from helpers.llamagen_helpers import (
    FILTERED,
    GUIDED,
    LENGTH,
    PLAIN,
    SMALL,
    TINY,
    force,
    golden_teacher,
    multinomial,
    random_tokens,
    randomised,
    sample,
)
from helpers.var_helpers import TOLERANCE, golden, with_prefix

SEED = 11


@cache
def data() -> dict[str, Tensor]:
    return golden("llamagen_c2i_teacher")


@cache
def small_teacher() -> LlamaGenTeacher:
    return randomised(LlamaGenTeacher(SMALL))


def likeliest(log_probs_BV: Tensor) -> Tensor:
    return log_probs_BV.argmax(-1, keepdim=True)


@torch.no_grad()
def test_full_pass_logits_with_and_without_label() -> None:
    labels_B, ids_BL = data()["in.labels"], data()["in.tokens"]
    torch.testing.assert_close(golden_teacher().logits(labels_B, ids_BL), data()["out.logits"], **TOLERANCE)
    unlabelled_B = torch.full_like(labels_B, TINY.num_classes)
    torch.testing.assert_close(golden_teacher().logits(unlabelled_B, ids_BL), data()["out.logits_uncond"], **TOLERANCE)


def test_training_loss_and_logits() -> None:
    teacher = LlamaGenTeacher(TINY).train()
    teacher.load_state_dict(golden_teacher().state_dict())
    logits_BLV = teacher.logits(data()["in.labels"], data()["in.tokens"])
    torch.testing.assert_close(logits_BLV, data()["out.train_logits"], **TOLERANCE)
    loss = F.cross_entropy(logits_BLV.flatten(0, 1), data()["in.tokens"].flatten())
    torch.testing.assert_close(loss[None], data()["out.train_loss"], **TOLERANCE)


def test_rotary_table_is_zero_for_the_class_token() -> None:
    trunk = golden_teacher().transformer.trunk
    cos_TK, sin_TK = trunk.cos[:, 0, 0], trunk.signed_sin[:, 0, 0]
    table = torch.stack([cos_TK[:, 0::2], sin_TK[:, 1::2]], dim=-1)
    torch.testing.assert_close(table, data()["out.freqs_cis"], **TOLERANCE)
    assert torch.equal(cos_TK[:, 0::2], cos_TK[:, 1::2])
    assert torch.equal(sin_TK[:, 0::2], -sin_TK[:, 1::2])


def test_session_logits_with_and_without_guidance() -> None:
    labels_B, ids_BL = data()["in.labels"], data()["in.tokens"]
    guided_BLV = data()["out.forced_cfg_logits"].log_softmax(-1)
    torch.testing.assert_close(force(golden_teacher(), labels_B, ids_BL, GUIDED), guided_BLV, **TOLERANCE)
    for half_B, raw_BLV in zip(
        (labels_B, torch.full_like(labels_B, TINY.num_classes)), data()["out.forced_raw_logits"].chunk(2), strict=True
    ):
        log_probs_BLV = force(golden_teacher(), half_B, ids_BL, PLAIN)
        torch.testing.assert_close(log_probs_BLV, raw_BLV.log_softmax(-1), **TOLERANCE)


@pytest.mark.parametrize(
    ("sampling", "ids", "logits"),
    [
        (FILTERED, "out.sampled_tokens", "out.sampled_cfg_logits"),
        (replace(FILTERED, guidance=1.0), "out.sampled_tokens_nocfg", "out.sampled_logits_nocfg"),
    ],
)
def test_sampled_tokens(sampling: SamplingConfig, ids: str, logits: str) -> None:
    labels_B = data()["in.sample_labels"]
    torch.manual_seed(SEED)
    assert torch.equal(sample(golden_teacher(), labels_B, sampling, multinomial), data()[ids])
    unfiltered = replace(sampling, top_k=0, top_p=1.0)
    log_probs_BLV = force(golden_teacher(), labels_B, data()[ids], unfiltered)
    torch.testing.assert_close(log_probs_BLV, data()[logits].log_softmax(-1), **TOLERANCE)


def test_greedy_tokens() -> None:
    ids_BL = sample(golden_teacher(), data()["in.sample_labels"], GUIDED, likeliest)
    assert torch.equal(ids_BL, data()["out.greedy_tokens"])


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0])
def test_guidance_of_at_most_one_is_no_guidance(guidance: float) -> None:
    labels_B, ids_BL = random_tokens(SMALL)
    unguided = force(small_teacher(), labels_B, ids_BL, replace(PLAIN, guidance=guidance))
    assert torch.equal(unguided, force(small_teacher(), labels_B, ids_BL, PLAIN))
    assert small_teacher().guidance_scale(guidance, 3) == 1


def test_guidance_scale_is_the_same_at_every_level() -> None:
    assert {small_teacher().guidance_scale(2.5, level) for level in range(LENGTH)} == {2.5}


@torch.no_grad()
def test_session_equals_full_pass() -> None:
    labels_B, ids_BL = random_tokens(SMALL)
    cond_BLV = small_teacher().logits(labels_B, ids_BL)
    uncond_BLV = small_teacher().logits(torch.full_like(labels_B, SMALL.num_classes), ids_BL)
    guided_BLV = uncond_BLV + 2 * (cond_BLV - uncond_BLV)
    torch.testing.assert_close(
        force(small_teacher(), labels_B, ids_BL, GUIDED), guided_BLV.log_softmax(-1), **TOLERANCE
    )
    torch.testing.assert_close(force(small_teacher(), labels_B, ids_BL, PLAIN), cond_BLV.log_softmax(-1), **TOLERANCE)


@pytest.mark.parametrize("asked", [(0, 6), (6,), (1, 2, 9), (15,)])
def test_tokens_appended_without_asking_are_prefilled(asked: tuple[int, ...]) -> None:
    labels_B, ids_BL = random_tokens(SMALL)
    expected_BLV = force(small_teacher(), labels_B, ids_BL, GUIDED)
    session = small_teacher().open(labels_B, GUIDED)
    for position, ids_B1 in enumerate(ids_BL.split(1, dim=1)):
        if position in asked:
            torch.testing.assert_close(session.next_log_probs()[:, 0], expected_BLV[:, position], **TOLERANCE)
        session.append(ids_B1)


def test_asking_twice_changes_nothing() -> None:
    labels_B, ids_BL = random_tokens(SMALL)
    session = small_teacher().open(labels_B, GUIDED)
    first_BlV = session.next_log_probs()
    assert torch.equal(session.next_log_probs(), first_BlV)
    session.append(ids_BL[:, :1])
    expected_BLV = force(small_teacher(), labels_B, ids_BL, GUIDED)
    assert torch.equal(session.next_log_probs()[:, 0], expected_BLV[:, 1])


def test_a_finished_session_refuses_more() -> None:
    labels_B, ids_BL = random_tokens(SMALL)
    session = small_teacher().open(labels_B, PLAIN)
    for ids_B1 in ids_BL.split(1, dim=1):
        session.append(ids_B1)
    with pytest.raises(RuntimeError, match="all 16 tokens"):
        session.next_log_probs()
    with pytest.raises(RuntimeError, match="all 16 tokens"):
        session.append(ids_BL[:, :1])


@pytest.mark.parametrize("shape", [(3, 2), (2, 1), (3,)])
def test_a_session_refuses_tokens_of_another_shape(shape: tuple[int, ...]) -> None:
    session = small_teacher().open(random_tokens(SMALL)[0], GUIDED)
    with pytest.raises(ValueError, match=r"\(3, 1\)"):
        session.append(torch.zeros(shape, dtype=torch.int64))


@torch.no_grad()
@pytest.mark.parametrize("position", [0, 5, LENGTH - 1])
def test_a_token_changes_only_later_predictions(position: int) -> None:
    labels_B, ids_BL = random_tokens(SMALL)
    before_BLV = small_teacher().logits(labels_B, ids_BL)
    ids_BL[:, position] = (ids_BL[:, position] + 1) % SMALL.codebook_size
    changed_L = (small_teacher().logits(labels_B, ids_BL) != before_BLV).any(dim=(0, 2))
    assert changed_L.tolist() == [row > position for row in range(LENGTH)]


@torch.no_grad()
def test_the_label_changes_every_prediction() -> None:
    labels_B, ids_BL = random_tokens(SMALL)
    change_BLV = small_teacher().logits((labels_B + 1) % SMALL.num_classes, ids_BL) != small_teacher().logits(
        labels_B, ids_BL
    )
    assert change_BLV.any(dim=(0, 2)).all()


def test_every_weight_of_a_new_transformer_has_a_gradient() -> None:
    torch.manual_seed(0)
    teacher = LlamaGenTeacher(SMALL)
    labels_B, ids_BL = random_tokens(SMALL)
    F.cross_entropy(teacher.logits(labels_B, ids_BL).flatten(0, 1), ids_BL.flatten()).backward()
    for name, parameter in teacher.transformer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in teacher.tokenizer.parameters())


def test_a_new_teacher_predicts_almost_uniformly_and_learns() -> None:
    torch.manual_seed(0)
    teacher = LlamaGenTeacher(SMALL)
    labels_B, ids_BL = random_tokens(SMALL, batch=8)
    optimizer = torch.optim.AdamW(teacher.transformer.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(teacher.logits(labels_B, ids_BL).flatten(0, 1), ids_BL.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.tensor(SMALL.codebook_size).log().item(), abs=0.1)
    assert losses[-1] < 0.5


def test_rotary_tables_are_not_in_the_state() -> None:
    assert not any("cos" in key or "sin" in key for key in golden_teacher().transformer.state_dict())


def reference() -> dict[str, Tensor]:
    return with_prefix(data(), "sd.")


def test_checkpoint_may_hold_the_rotary_table() -> None:
    state = llamagen_teacher_state(reference() | {"freqs_cis": torch.zeros(17, 8, 2)}, TINY)
    assert state.keys() == golden_teacher().transformer.state_dict().keys()


def test_checkpoint_errors_name_the_key() -> None:
    lacking = reference()
    del lacking["layers.1.feed_forward.w3.weight"]
    with pytest.raises(CheckpointError, match=r"layers\.1\.feed_forward\.w3\.weight"):
        llamagen_teacher_state(lacking, TINY)
    with pytest.raises(CheckpointError, match=r"layers\.2\.attention\.wo\.weight"):
        llamagen_teacher_state(reference() | {"layers.2.attention.wo.weight": torch.zeros(64, 64)}, TINY)
    with pytest.raises(CheckpointError, match=r"output\.weight"):
        llamagen_teacher_state(reference(), replace(TINY, codebook_size=65))
