"""Between teacher and student: DD1's teacher-involved sampling (Table 2), and the teacher with steps skipped."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ddops.config.models import SamplingConfig
from ddops.models.interface import Student, Teacher
from ddops.models.sampling_filters import guided_log_probs
from ddops.sampling.few_step import Prefix, extend
from ddops.sampling.teacher import Picker


@torch.inference_mode()
def sample_teacher_involved(
    student: Student,
    teacher: Teacher,
    noise_BLC: Tensor,
    labels_B: Tensor,
    levels: tuple[int, int],
    logit_prefix: int,
    sampling: SamplingConfig,
    pick: Picker,
) -> Tensor:
    """Embeddings (B, L, C): the student's first step, then the teacher re-samples levels ``first..last - 1`` (counted
    from 0) given the student's prefix, then the student finishes from ``last`` with the same noise.

    The prefix goes to the teacher as codes and is attended to causally, as in training (the released code lets early
    levels of it see later ones). With ``first`` 0 the student's first step is not needed and not taken.

    Raises:
        ValueError: unless ``0 <= first < last < S``.
    """
    first, last = levels
    layout = student.layout
    if not 0 <= first < last < layout.num_levels:
        raise ValueError(f"the teacher can draw levels 0 <= first < last < {layout.num_levels}, got {levels}")
    codebook_VC, session, coded = teacher.codebook_VC, student.open(labels_B), layout.offsets[logit_prefix]
    prefix_BL = none_BL = labels_B.new_zeros(len(labels_B), 0)
    if first > 0:
        nothing = Prefix(noise_BLC[:, :0], none_BL)
        drawn = extend(session, codebook_VC, nothing, noise_BLC[:, : layout.offsets[first]], coded)
        # Positions past the logit prefix are regressed and have no code yet.
        regressed_BmC = drawn.q_BlC[:, drawn.ids_Bn.shape[1] :]
        prefix_BL = torch.cat([drawn.ids_Bn, nearest_codes(regressed_BmC, codebook_VC)], dim=1)
    ids_BL = _continue(teacher, labels_B, prefix_BL, last, sampling, pick)
    given = Prefix(F.embedding(ids_BL, codebook_VC), none_BL)
    return extend(session, codebook_VC, given, noise_BLC, coded).q_BlC


@torch.inference_mode()
def sample_skipping(teacher: Teacher, labels_B: Tensor, skipped: int, sampling: SamplingConfig, pick: Picker) -> Tensor:
    """Token ids (B, L): ``skip-n``. The teacher level by level, but the last ``skipped + 1`` levels in one step.

    In that parallel step the teacher's inputs from levels not yet drawn are unknown; they take the code nearest to
    the codebook's mean *(ours: the paper does not say)*.

    Raises:
        ValueError: unless ``1 <= skipped < S``.
    """
    layout = teacher.layout
    if not 1 <= skipped < layout.num_levels:
        raise ValueError(f"skip-n takes 1 <= n < {layout.num_levels}, got {skipped}")
    parallel = layout.num_levels - skipped - 1
    drawn_BL = _continue(teacher, labels_B, labels_B.new_zeros(len(labels_B), 0), parallel, sampling, pick)
    filler = nearest_codes(teacher.codebook_VC.mean(0).view(1, 1, -1), teacher.codebook_VC).item()
    unknown_BL = drawn_BL.new_full((len(drawn_BL), layout.length - drawn_BL.shape[1]), int(filler))
    inputs_BL = torch.cat([drawn_BL, unknown_BL], dim=1)
    cond_BLV = teacher.logits(labels_B, inputs_BL)
    uncond_BLV = teacher.logits(teacher.unconditional(labels_B), inputs_BL)
    levels = [drawn_BL]
    for level in range(parallel, layout.num_levels):
        here, scale = layout.positions(level), teacher.guidance_scale(sampling.guidance, level)
        levels.append(pick(level, guided_log_probs(cond_BLV[:, here], uncond_BLV[:, here], scale, sampling)))
    return torch.cat(levels, dim=1)


def nearest_codes(q_BLC: Tensor, codebook_VC: Tensor) -> Tensor:
    """Ids (B, L) of the codes nearest to embeddings, by Euclidean distance."""
    return torch.cdist(q_BLC.flatten(0, 1), codebook_VC).argmin(-1).view(q_BLC.shape[:2])


def _continue(
    teacher: Teacher, labels_B: Tensor, prefix_BL: Tensor, until: int, sampling: SamplingConfig, pick: Picker
) -> Tensor:
    """Ids of the first ``until`` levels: the prefix as it is, the rest drawn after it."""
    session, layout = teacher.open(labels_B, sampling), teacher.layout
    levels: list[Tensor] = []
    for level in range(until):
        given = layout.offsets[level + 1] <= prefix_BL.shape[1]
        ids_Bl = prefix_BL[:, layout.positions(level)] if given else pick(level, session.next_log_probs())
        session.append(ids_Bl)
        levels.append(ids_Bl)
    return torch.cat(levels, dim=1) if levels else prefix_BL
