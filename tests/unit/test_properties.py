"""Properties that hold whatever the numbers: hypothesis looks for the ones that break them."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddops.config.evaluation import ROW_PATTERNS, parse_row
from ddops.evaluation.drawing import sample_noise
from ddops.flow.solvers import flow_map
from ddops.sampling.few_step import sample_student
from ddops.sampling.plain import plain_sample
from ddops.sampling.teacher import flow_picker, sample_teacher
from ddops.trajectories.generate import trajectory_labels, trajectory_noise
from ddops.trajectories.shards import plan_shards
from helpers.tiny import tiny, untrained

SEEDS = st.integers(0, 2**32)
FAMILIES = st.sampled_from(["llamagen", "var"])
TOKENS = 200


@st.composite
def codes(draw):
    """Noise (N, C), log-probabilities (N, V) and a codebook (V, C), in float64; and their random numbers."""
    size, width, sharpness = draw(st.integers(2, 24)), draw(st.integers(1, 6)), draw(st.floats(0.1, 8.0))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    options = {"generator": generator, "dtype": torch.float64}
    log_p_NV = (sharpness * torch.randn(TOKENS, size, **options)).log_softmax(-1)
    return torch.randn(TOKENS, width, **options), log_p_NV, torch.randn(size, width, **options), generator


def partitions(count):
    """Ways to cut ``count`` things into runs of at least one."""
    return st.sets(st.integers(1, count - 1)).map(lambda cuts: np.diff([0, *sorted(cuts), count]).tolist())


@given(codes(), st.floats(-30.0, 30.0))
def test_the_flow_map_commutes_with_a_shift_of_the_codebook(problem, shift):
    noise_NC, log_p_NV, codebook_VC, _ = problem
    at_home_N = flow_map(noise_NC, log_p_NV, codebook_VC)
    assert (flow_map(noise_NC, log_p_NV, codebook_VC + shift) == at_home_N).double().mean() >= 0.985


@given(codes())
def test_the_flow_map_does_not_mind_the_order_of_the_codes(problem):
    noise_NC, log_p_NV, codebook_VC, generator = problem
    order_V = torch.randperm(len(codebook_VC), generator=generator)
    ids_N = flow_map(noise_NC, log_p_NV[:, order_V], codebook_VC[order_V])
    assert (order_V[ids_N] == flow_map(noise_NC, log_p_NV, codebook_VC)).double().mean() >= 0.985


def drawn_trajectories(family, seed, indices_N):
    """Token ids (N, L) of trajectories, drawn together."""
    teacher, config = untrained(family)[0], tiny(family)
    noise_NLC = trajectory_noise(seed, indices_N, (teacher.layout.length, teacher.codebook_VC.shape[1]))
    labels_N = torch.from_numpy(trajectory_labels(seed, indices_N, teacher.num_conditions))
    pick = flow_picker(teacher.layout, teacher.codebook_VC, noise_NLC, config.trajectories)
    return sample_teacher(teacher, labels_N, config.sampling, pick)


@settings(max_examples=6)
@given(FAMILIES, SEEDS, partitions(12))
@torch.inference_mode()
def test_a_trajectory_does_not_depend_on_its_batch(family, seed, sizes):
    """Up to rounding, which seldom moves a token on a border, and what follows it."""
    indices_N = np.arange(12, dtype=np.int64)
    batches = np.split(indices_N, np.cumsum(sizes)[:-1])
    apart_NL = torch.cat([drawn_trajectories(family, seed, batch) for batch in batches])
    assert (apart_NL == drawn_trajectories(family, seed, indices_N)).all(1).double().mean() > 0.8


def drawn_images(family, seed, labels_N, indices_N):
    teacher, student = untrained(family)
    noise_NLC = sample_noise(seed, indices_N, teacher, teacher.codebook_VC.shape[1])
    starts, prefix = (0, student.layout.num_levels // 2), student.layout.num_levels // 2
    return teacher.decode(sample_student(student, teacher.codebook_VC, noise_NLC, labels_N, starts, prefix))


@given(FAMILIES, SEEDS, partitions(12))
@torch.inference_mode()
def test_an_image_does_not_depend_on_its_batch(family, seed, sizes):
    indices_N, labels_N = np.arange(12, dtype=np.int64), torch.arange(12) % 10
    cuts = np.cumsum(sizes)[:-1]
    batches = zip(labels_N.tensor_split(cuts.tolist()), np.split(indices_N, cuts), strict=True)
    apart_NIHW = torch.cat([drawn_images(family, seed, *batch) for batch in batches])
    moved_N = (apart_NIHW - drawn_images(family, seed, labels_N, indices_N)).abs().amax((1, 2, 3)) > 1e-3
    assert moved_N.double().mean() < 0.2


@given(st.integers(0, 5000), st.integers(1, 700))
def test_shards_cover_every_sample_once_in_order(count, size):
    plans = plan_shards(count, size)
    assert [index for plan in plans for index in range(plan.first, plan.first + plan.count)] == list(range(count))
    assert [plan.number for plan in plans] == list(range(len(plans)))
    assert all(plan.count == size for plan in plans[:-1])


@st.composite
def row_names(draw):
    """A row's name, its kind and its numbers."""
    kind, pattern = draw(st.sampled_from(sorted(ROW_PATTERNS.items())))
    numbers = tuple(draw(st.integers(1, 999)) for _ in range(pattern.count("(")))
    written = iter(numbers)
    return re.sub(r"\(.*?\)", lambda _: str(next(written)), pattern), kind, numbers


@given(row_names())
def test_a_rows_name_says_its_kind_and_numbers(row):
    name, kind, numbers = row
    assert parse_row(name) == (kind, numbers)


@given(st.text("abcdefghijklmnopqrstuvwxyz_0123456789", max_size=20))
def test_what_is_no_rows_name_is_refused_by_name(name):
    if not any(re.fullmatch(pattern, name) for pattern in ROW_PATTERNS.values()):
        with pytest.raises(ValueError, match=re.escape(repr(name))):
            parse_row(name)


@given(FAMILIES, st.data())
@torch.inference_mode()
def test_lean_sampling_is_the_plain_one(family, data):
    """Wherever the steps start, however many levels are drawn from logits, whatever the noise and labels."""
    teacher, student = untrained(family)
    levels = student.layout.num_levels
    starts = (0, *sorted(data.draw(st.sets(st.integers(1, levels - 1), max_size=3), "later starts")))
    prefix = data.draw(st.integers(0, levels), "levels drawn from logits")
    labels_B = torch.tensor(data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4), "labels"))
    noise_BLC = sample_noise(data.draw(SEEDS, "seed"), np.arange(len(labels_B)), teacher, teacher.codebook_VC.shape[1])
    arguments = (student, teacher.codebook_VC, noise_BLC, labels_B, starts, prefix)
    lean_BLC, plain_BLC = sample_student(*arguments), plain_sample(*arguments)
    # Rounding may decide between two codes that are all but equally likely.
    assert (lean_BLC - plain_BLC).abs().amax(-1).le(1e-4).double().mean() > 0.95
