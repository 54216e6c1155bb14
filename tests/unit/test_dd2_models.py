"""DD2's models: what they condition on, their samplers against the teacher's distribution, and their files."""

from functools import cache

import pytest
import torch
from torch.nn import functional as F

from ddops.config.models import HeadConfig, SamplingConfig
from ddops.flow.solvers import flow_map
from ddops.models.ar_diffusion import ARDiffusion, ARDiffusionGenerator, new_ar_diffusion
from ddops.models.errors import CheckpointError
from ddops.models.weights import STUDENT, TOKENIZER, save_weights
from ddops.models.weights_dd2 import (
    AR_DIFFUSION,
    as_backbone,
    load_ar_diffusion,
    load_generator,
    save_ar_diffusion,
    save_generator,
)
from ddops.sampling.ar_diffusion import UNGUIDED, refine, sample_ar_diffusion
from ddops.sampling.few_step import sample_student
from ddops.sampling.teacher import conditional_log_probs, sample_teacher
from helpers.tiny import tiny, untrained

FAMILIES = ["llamagen", "var"]
HEAD = HeadConfig(width=16, blocks=1, predicts="embedding")
CODES = HeadConfig(width=16, blocks=1, predicts="codes")
GUIDED = SamplingConfig(guidance=1.5, top_k=20, top_p=0.9, temperature=1.2)
B = 3


@cache
def models(family, head=HEAD):
    """The untrained teacher and an AR-diffusion model whose every weight matters."""
    teacher = as_backbone(untrained(family)[0])
    model = new_ar_diffusion(teacher, head)
    torch.manual_seed(1)
    for parameter in [] if model.head is None else model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return teacher, model.eval()


def sequences(teacher, count=B, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids_BL = torch.randint(len(teacher.codebook_VC), (count, teacher.layout.length), generator=generator)
    noise_BLC = torch.randn(count, teacher.layout.length, teacher.codebook_VC.shape[1], generator=generator)
    return torch.arange(count) % teacher.num_conditions, ids_BL, noise_BLC


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampling", [GUIDED, UNGUIDED], ids=["guided", "unguided"])
def test_the_conditionals_in_one_pass_are_those_that_sampling_meets(family, sampling):
    """With guidance that grows over VAR's levels, top-k, top-p and temperature."""
    teacher = untrained(family)[0]
    labels_B, ids_BL, _ = sequences(teacher)
    seen = []

    def pick(level, log_p_BlV):
        seen.append(log_p_BlV)
        return ids_BL[:, teacher.layout.positions(level)]

    sample_teacher(teacher, labels_B, sampling, pick)
    log_p_BLV = conditional_log_probs(teacher, labels_B, ids_BL, sampling)
    torch.testing.assert_close(log_p_BLV, torch.cat(seen, dim=1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", [HEAD, CODES, None], ids=["embedding", "codes", "classifier"])
def test_a_token_is_denoised_given_its_own_noise_and_strictly_earlier_levels(family, head):
    teacher, model = models(family, head)
    labels_B, ids_BL, x_BLC = sequences(teacher)
    t_BL, level_L = torch.full(ids_BL.shape, 0.5), teacher.layout.level_of_position()
    mean_BLC = model.mean(x_BLC, t_BL, model.hidden(labels_B, ids_BL))
    assert mean_BLC.shape == x_BLC.shape
    changed = teacher.layout.length // 2
    other_BL = ids_BL.clone()
    other_BL[:, changed] = (other_BL[:, changed] + 1) % len(teacher.codebook_VC)
    moved_L = (model.mean(x_BLC, t_BL, model.hidden(labels_B, other_BL)) - mean_BLC).abs().amax((0, 2)) > 1e-6
    assert torch.equal(moved_L, level_L > level_L[changed]), "a token's own level does not see it"
    noisier_BLC = x_BLC.clone()
    noisier_BLC[:, changed] += 1
    moved_L = (model.mean(noisier_BLC, t_BL, model.hidden(labels_B, ids_BL)) - mean_BLC).abs().amax((0, 2)) > 1e-6
    assert torch.equal(moved_L.nonzero()[:, 0], torch.tensor([changed]))


@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_classifier_its_sampler_is_the_teachers_flow_map(family):
    """Two solvers written apart, one with and one without a KV cache and the network in it."""
    teacher, model = models(family, None)
    labels_B, _, noise_BLC = sequences(teacher, count=40)

    def pick(level, log_p_BlV):
        noise_BlC = noise_BLC[:, teacher.layout.positions(level)]
        ids_N = flow_map(noise_BlC.flatten(0, 1), log_p_BlV.flatten(0, 1), teacher.codebook_VC)
        return ids_N.view(noise_BlC.shape[:2])

    expected_BL = sample_teacher(teacher, labels_B, UNGUIDED, pick)
    ids_BL = sample_ar_diffusion(model, labels_B, noise_BLC, evaluations=32)
    assert (ids_BL == expected_BL).double().mean() > 0.98


@pytest.mark.parametrize("family", FAMILIES)
def test_refining_from_all_noise_redraws_every_token_given_the_others(family):
    """In parallel, from the conditionals at the sequence as it was; from no noise at all it changes nothing."""
    teacher, model = models(family, None)
    labels_B, ids_BL, noise_BLC = sequences(teacher, count=20)
    q_BLC = F.embedding(ids_BL, teacher.codebook_VC)
    log_p_BLV = conditional_log_probs(teacher, labels_B, ids_BL, UNGUIDED)
    redrawn_N = flow_map(noise_BLC.flatten(0, 1), log_p_BLV.flatten(0, 1), teacher.codebook_VC)
    refined_BLC = refine(model, q_BLC, noise_BLC, labels_B, start=0.0, evaluations=32)
    expected_BLC = F.embedding(redrawn_N, teacher.codebook_VC).view(q_BLC.shape)
    assert (refined_BLC == expected_BLC).all(-1).double().mean() > 0.98
    assert torch.equal(refine(model, q_BLC, noise_BLC, labels_B, start=0.999, evaluations=8), q_BLC)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_generator_is_one_pass_over_noise_and_its_codes_are_the_nearest(family):
    teacher, model = models(family)
    generator = ARDiffusionGenerator(model).eval()
    labels_B, _, noise_BLC = sequences(teacher)
    level_L = teacher.layout.level_of_position()
    continuous_BLC, codes_BLC = (
        sample_student(generator, teacher.codebook_VC, noise_BLC, labels_B, (0,), prefix)
        for prefix in (0, teacher.layout.num_levels)
    )
    distance_BLV = (continuous_BLC.double()[:, :, None] - teacher.codebook_VC.double()).square().sum(-1)
    chosen_BLC = F.embedding(distance_BLV.argmin(-1), teacher.codebook_VC)
    assert (codes_BLC == chosen_BLC).all(-1).double().mean() > 0.98, "up to rounding, where two are as near"
    other_BLC = noise_BLC.clone()
    changed = teacher.layout.length // 2
    other_BLC[:, changed] += 1
    moved = sample_student(generator, teacher.codebook_VC, other_BLC, labels_B, (0,), 0) - continuous_BLC
    expected_L = level_L > level_L[changed]
    expected_L[changed] = True
    assert torch.equal(moved.abs().amax((0, 2)) > 1e-7, expected_L), "own noise and that of strictly earlier levels"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_of_codes_corrects_the_classifier_and_the_noise_does_the_rest(family):
    """The mean against the definition in float64; as a generator, at t = 0, its logits and their expectation."""
    teacher, model = models(family, CODES)
    labels_B, ids_BL, noise_BLC = sequences(teacher)
    codes_VC = teacher.codebook_VC.double()
    with torch.no_grad():
        hidden_BLD = model.hidden(labels_B, ids_BL)
        t_BL = torch.rand(ids_BL.shape, generator=torch.Generator().manual_seed(2)) * 0.95
        x_BLC = torch.lerp(noise_BLC, F.embedding(ids_BL, teacher.codebook_VC), t_BL[..., None])
        logits_BLV = (model.backbone.classify(hidden_BLD) + model.head(x_BLC, t_BL, hidden_BLD)).double()
        t = t_BL.double()[..., None]
        squares_BLV = (x_BLC.double()[:, :, None] - t[..., None] * codes_VC).square().sum(-1)
        expected_BLC = (logits_BLV - squares_BLV / (2 * (1 - t) ** 2)).softmax(-1) @ codes_VC
        torch.testing.assert_close(model.mean(x_BLC, t_BL, hidden_BLD).double(), expected_BLC, atol=1e-4, rtol=1e-4)

        out = ARDiffusionGenerator(model)(noise_BLC, labels_B, torch.zeros_like(labels_B), slice(1, 3))
        assert out.logits_BLV.shape == (B, 2, len(codes_VC))
        torch.testing.assert_close(out.logits_BLV.softmax(-1) @ teacher.codebook_VC, out.embeddings_BLC[:, 1:3])


def test_a_generator_needs_a_head():
    with pytest.raises(ValueError, match="conditional head"):
        ARDiffusionGenerator(ARDiffusion(untrained("llamagen")[0], None))


@pytest.mark.parametrize("head", [HEAD, CODES], ids=["embedding", "codes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_files_hold_all_but_the_tokenizer_and_come_back_whole(family, head, tmp_path):
    teacher, model = models(family, head)
    labels_B, ids_BL, x_BLC = sequences(teacher)
    tokenizer, file = tmp_path / "tokenizer.safetensors", tmp_path / "model.safetensors"
    save_weights(tokenizer, teacher.tokenizer.state_dict(), teacher.config, TOKENIZER)
    save_ar_diffusion(file, model.state_dict(), teacher.config, head)
    loaded = load_ar_diffusion(tokenizer, file)
    t_BL = torch.full(ids_BL.shape, 0.3)
    means = [each.mean(x_BLC, t_BL, each.hidden(labels_B, ids_BL)) for each in (model, loaded)]
    assert torch.equal(*means)
    assert b"tokenizer" not in file.read_bytes()[:20_000].split(b"__metadata__")[0]

    generator = ARDiffusionGenerator(model)
    save_generator(file, generator.state_dict(), teacher.config, head)
    start_B = torch.zeros_like(labels_B)
    assert torch.equal(
        load_generator(tokenizer, file)(x_BLC, labels_B, start_B).embeddings_BLC,
        generator(x_BLC, labels_B, start_B).embeddings_BLC,
    )
    student = untrained(family)[1]
    save_generator(file, student.state_dict(), tiny(family).teacher.model, None)
    assert torch.equal(
        load_generator(tokenizer, file)(x_BLC, labels_B, start_B).logits_BLV,
        student(x_BLC, labels_B, start_B).logits_BLV,
    )


def test_a_file_without_its_heads_configuration_is_refused(tmp_path):
    teacher, model = models("llamagen")
    file = tmp_path / "model.safetensors"
    save_weights(file, model.state_dict(), teacher.config, AR_DIFFUSION)
    with pytest.raises(CheckpointError, match="configuration of its head"):
        load_ar_diffusion(tmp_path / "none", file)
    save_weights(file, model.state_dict(), teacher.config, STUDENT)
    with pytest.raises(CheckpointError, match="holds a student"):
        load_ar_diffusion(tmp_path / "none", file)
