"""The VAR teacher against the golden file of the released code, and against itself."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from ddops.config.models import SamplingConfig, VARConfig
from ddops.models.checkpoints_tokenizers import var_tokenizer_state
from ddops.models.checkpoints_var import var_teacher_state
from ddops.models.errors import CheckpointError
from ddops.models.var import Attention, VARTeacher
from helpers.var_helpers import NUM_LEVELS, TINY, TOLERANCE, codebook, golden, levels, with_prefix

PLAIN = SamplingConfig(guidance=0.0, top_k=0, top_p=1.0, temperature=1.0)
GUIDED = replace(PLAIN, guidance=1.5)
FILTERED = replace(GUIDED, top_k=20, top_p=0.9)
SMALL = replace(TINY, width=32, depth=2, heads=2, patch_sizes=(1, 2, 4))


@cache
def data() -> dict[str, Tensor]:
    return golden("var_teacher")


@cache
def golden_teacher() -> VARTeacher:
    teacher = VARTeacher(TINY)
    teacher.transformer.load_state_dict(var_teacher_state(with_prefix(data(), "sd."), TINY))
    teacher.tokenizer.load_state_dict(var_tokenizer_state(with_prefix(golden("var_tokenizer"), "sd."), TINY))
    return teacher.eval()


def random_teacher(config: VARConfig, std: float = 0.2) -> VARTeacher:
    """A teacher whose every transformer weight matters: fresh weights have almost no effect in the blocks."""
    torch.manual_seed(0)
    teacher = VARTeacher(config)
    for parameter in teacher.transformer.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return teacher.eval()


def random_tokens(config: VARConfig, batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels_B = torch.randint(config.num_classes, (batch,), generator=generator)
    return labels_B, torch.randint(config.codebook_size, (batch, sum(config.level_sizes)), generator=generator)


def run_session(teacher: VARTeacher, labels_B: Tensor, ids: list[Tensor], sampling: SamplingConfig) -> list[Tensor]:
    """Each level's log-probabilities when the given ids are appended."""
    session, log_probs = teacher.open(labels_B, sampling), []
    for ids_Bl in ids:
        log_probs.append(session.next_log_probs())
        session.append(ids_Bl)
    return log_probs


def test_codebook_of_the_two_golden_files_agree() -> None:
    torch.testing.assert_close(golden_teacher().codebook_VC, codebook(data()), rtol=0, atol=0)


@torch.no_grad()
def test_full_pass_logits() -> None:
    logits_BLV = golden_teacher().logits(data()["in.label_B"], torch.cat(levels(data(), "in.idx_"), dim=1))
    torch.testing.assert_close(logits_BLV, data()["out.logits"], **TOLERANCE)


def test_session_without_guidance_is_each_half_of_the_reference_batch() -> None:
    labels_B, ids = data()["in.ar_label_B"], levels(data(), "out.ar.idx_")
    conditional = run_session(golden_teacher(), labels_B, ids, PLAIN)
    unconditional = run_session(golden_teacher(), torch.full_like(labels_B, TINY.num_classes), ids, PLAIN)
    for cond_BlV, uncond_BlV, raw_BlV in zip(
        conditional, unconditional, levels(data(), "out.ar.raw_logits_"), strict=True
    ):
        torch.testing.assert_close(torch.cat([cond_BlV, uncond_BlV]), raw_BlV.log_softmax(-1), **TOLERANCE)


@pytest.mark.parametrize(("sampling", "name"), [(GUIDED, "cfg_logits_"), (FILTERED, "filtered_logits_")])
def test_session_with_guidance_and_filters(sampling: SamplingConfig, name: str) -> None:
    ids = levels(data(), "out.ar.idx_")
    actual = run_session(golden_teacher(), data()["in.ar_label_B"], ids, sampling)
    for actual_BlV, expected_BlV in zip(actual, levels(data(), f"out.ar.{name}"), strict=True):
        torch.testing.assert_close(actual_BlV, expected_BlV.log_softmax(-1), **TOLERANCE)


@torch.no_grad()
def test_sampled_ids_and_image() -> None:
    session = golden_teacher().open(data()["in.ar_label_B"], FILTERED)
    generator, sampled = torch.Generator().manual_seed(123), []
    for expected_Bl in levels(data(), "out.ar.idx_"):
        probs_BlV = session.next_log_probs().exp()
        ids_Bl = torch.multinomial(probs_BlV.flatten(0, 1), 1, replacement=True, generator=generator)
        sampled.append(ids_Bl.view_as(expected_Bl))
        assert torch.equal(sampled[-1], expected_Bl)
        session.append(sampled[-1])
    images_BIHW = golden_teacher().decode(golden_teacher().codebook_VC[torch.cat(sampled, dim=1)])
    torch.testing.assert_close((images_BIHW.clamp(-1, 1) + 1) / 2, data()["out.ar.image"], **TOLERANCE)


@pytest.mark.parametrize("shared_ada_ln", [False, True])
@pytest.mark.parametrize("attention_l2_norm", [False, True])
@torch.no_grad()
def test_cached_equals_full_pass(shared_ada_ln: bool, attention_l2_norm: bool) -> None:
    config = replace(SMALL, shared_ada_ln=shared_ada_ln, attention_l2_norm=attention_l2_norm)
    teacher = random_teacher(config)
    labels_B, ids_BL = random_tokens(config)
    ids = list(ids_BL.split(teacher.layout.sizes, dim=1))
    full_BLV = teacher.logits(labels_B, ids_BL)
    uncond_BLV = teacher.logits(torch.full_like(labels_B, config.num_classes), ids_BL)
    assert (full_BLV - uncond_BLV).abs().max() > 0.1
    for level, actual_BlV in enumerate(run_session(teacher, labels_B, ids, GUIDED)):
        positions, scale = teacher.layout.positions(level), teacher.guidance_scale(1.5, level)
        mixed_BlV = torch.lerp(uncond_BLV[:, positions], full_BLV[:, positions], scale)
        torch.testing.assert_close(actual_BlV, mixed_BlV.log_softmax(-1), **TOLERANCE)


@torch.no_grad()
def test_logits_see_only_earlier_levels() -> None:
    teacher = random_teacher(SMALL)
    labels_B, ids_BL = random_tokens(SMALL, batch=1)
    before_BLV = teacher.logits(labels_B, ids_BL)
    changed_BL = ids_BL.clone()
    changed_BL[:, 2] = (ids_BL[:, 2] + 1) % SMALL.codebook_size
    moved_L = (teacher.logits(labels_B, changed_BL) - before_BLV).abs().amax(dim=(0, 2)) > 1e-6
    assert torch.equal(moved_L, teacher.layout.level_of_position() > 1)


@torch.no_grad()
def test_shared_adaptive_norm_is_the_per_block_one_with_offset_biases() -> None:
    """Under published names, so that the d36 flavour's name map is tested too."""
    own_state = with_prefix(data(), "sd.")
    weight, bias = (own_state[f"blocks.0.ada_lin.1.{kind}"] for kind in ("weight", "bias"))
    shared_state = {key: value for key, value in own_state.items() if not key.startswith("blocks") or "ada" not in key}
    shared_state |= {"shared_ada_lin.1.weight": weight, "shared_ada_lin.1.bias": bias}
    for block in range(TINY.depth):
        offset_116D = shared_state[f"blocks.{block}.ada_gss"] = torch.randn(1, 1, 6, TINY.width)
        own_state[f"blocks.{block}.ada_lin.1.weight"] = weight
        own_state[f"blocks.{block}.ada_lin.1.bias"] = bias + offset_116D.flatten()
    own, shared = VARTeacher(TINY), VARTeacher(replace(TINY, shared_ada_ln=True))
    own.transformer.load_state_dict(var_teacher_state(own_state, own.config))
    shared.transformer.load_state_dict(var_teacher_state(shared_state, shared.config))
    shared.tokenizer.load_state_dict(own.tokenizer.state_dict())
    labels_B, ids_BL = random_tokens(TINY)
    torch.testing.assert_close(own.logits(labels_B, ids_BL), shared.logits(labels_B, ids_BL), **TOLERANCE)


@torch.no_grad()
def test_attention_without_l2_norm_divides_by_four_times_the_usual_scale() -> None:
    torch.manual_seed(0)
    attention, x_BlD = Attention(replace(TINY, attention_l2_norm=False)), torch.randn(2, 5, TINY.width)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    q_BlD, k_BlD, v_BlD = attention.qkv(x_BlD).chunk(3, dim=-1)
    heads = [slice(16 * head, 16 * (head + 1)) for head in range(4)]
    q_BlD, v_BlD = q_BlD + attention.q_bias_D, v_BlD + attention.v_bias_D
    weights = [(q_BlD[..., head] @ k_BlD[..., head].mT / (4 * 16**0.5)).softmax(-1) for head in heads]
    mixed_BlD = torch.cat([w @ v_BlD[..., head] for w, head in zip(weights, heads, strict=True)], dim=-1)
    torch.testing.assert_close(attention(x_BlD), attention.out(mixed_BlD), **TOLERANCE)


def test_guidance_scale_grows_linearly_from_one() -> None:
    scales = [golden_teacher().guidance_scale(1.5, level) for level in range(NUM_LEVELS)]
    assert scales == pytest.approx([1.0, 1.5, 2.0, 2.5])


def test_session_refuses_what_is_out_of_order() -> None:
    teacher = random_teacher(SMALL)
    labels_B, ids_BL = random_tokens(SMALL)
    first, *later = ids_BL.split(teacher.layout.sizes, dim=1)
    session = teacher.open(labels_B, GUIDED)
    assert torch.equal(session.next_log_probs(), session.next_log_probs()), "asking again does not go on"
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(3, 1\)"):
        session.append(later[0])
    session.append(first)
    for ids_Bl in later:
        session.next_log_probs()
        session.append(ids_Bl)
    with pytest.raises(RuntimeError, match="all 3 levels"):
        session.next_log_probs()


def test_a_prefix_that_was_not_asked_for_is_attended_as_one_that_was() -> None:
    teacher = random_teacher(SMALL)
    labels_B, ids_BL = random_tokens(SMALL)
    asked, given = teacher.open(labels_B, GUIDED), teacher.open(labels_B, GUIDED)
    for ids_Bl in ids_BL.split(teacher.layout.sizes, dim=1)[:-1]:
        asked.next_log_probs()
        asked.append(ids_Bl)
        given.append(ids_Bl)
    assert torch.equal(given.next_log_probs(), asked.next_log_probs())


def test_fresh_teacher_predicts_nearly_uniformly_and_every_weight_learns() -> None:
    torch.manual_seed(0)
    teacher = VARTeacher(SMALL)
    labels_B, ids_BL = random_tokens(SMALL)
    logits_BLV = teacher.logits(labels_B, ids_BL)
    assert logits_BLV.abs().max() < 0.1
    torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), ids_BL.flatten()).backward()
    for name, parameter in teacher.transformer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in teacher.tokenizer.parameters())


def test_fresh_teacher_trains() -> None:
    teacher = VARTeacher(SMALL)
    labels_B, ids_BL = random_tokens(SMALL, batch=8)
    optimizer = torch.optim.AdamW(teacher.transformer.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(teacher.logits(labels_B, ids_BL).flatten(0, 1), ids_BL.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_checkpoint_errors_name_the_key() -> None:
    state = with_prefix(data(), "sd.")
    without = {key: value for key, value in state.items() if key != "blocks.1.attn.q_bias"}
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn\.q_bias"):
        var_teacher_state(without, TINY)
    with pytest.raises(CheckpointError, match=r"blocks\.2\.attn\.q_bias"):
        var_teacher_state(state | {"blocks.2.attn.q_bias": torch.zeros(64)}, TINY)
    with pytest.raises(CheckpointError, match=r"head\.weight"):
        var_teacher_state(state | {"head.weight": torch.zeros(65, 64)}, TINY)
