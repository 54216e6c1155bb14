"""Trajectories of a teacher in bfloat16: what is rounded, what must not be, and that the two precisions never mix."""

import copy
from functools import cache

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from ddops.commands.arguments import load_preset
from ddops.costs import passes
from ddops.costs.devices import DEVICES
from ddops.costs.ledger import shapes_only
from ddops.files import sha256_json
from ddops.models.reduced import sampled_in_bfloat16
from ddops.sampling.noise import NOISE_VERSION
from ddops.sampling.teacher import flow_picker, sample_teacher
from ddops.trajectories import memory
from ddops.trajectories.dataset import TrajectoryDataset
from ddops.trajectories.errors import SettingsDiffer
from ddops.trajectories.generate import generate, trajectory_labels, trajectory_noise
from ddops.trajectories.mappers import processes
from ddops.trajectories.shards import read_manifest
from ddops.workspace.recipes import recipe
from helpers.tiny import PARAMS, contents, tiny, untrained
from helpers.tiny_trajectories import CODE_DIM, FAMILIES, NAMES, SEED, job, make

HALF = {"precision": "bfloat16"}
SAMPLES = 200


@cache
def half_teacher(family):
    return sampled_in_bfloat16(copy.deepcopy(untrained(family)[0]))


def in_half():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.fixture(scope="module", params=FAMILIES)
def complete(request, tmp_path_factory):
    """The family, and its data set in bfloat16; not to be changed."""
    return request.param, make(tmp_path_factory.mktemp("half"), request.param, **HALF)


# settings


def test_in_float32_the_settings_are_those_of_data_sets_made_before_there_was_a_choice(tmp_path):
    """Else every data set would have to be made again."""
    made = job(tmp_path)
    assert made.settings == {
        "recipe": recipe("trajectories"),
        "teacher_sha256": made.teacher_sha256,
        "sampling": {"guidance": 1.5, "top_k": 0, "top_p": 1.0, "temperature": 1.0},
        "solver": "adaptive",
        "evaluations": 100,
        "tolerance": 0.01,
        "precision": "float32",
        "shard_size": 12,
        "batch_size": 5,
        "seed": SEED,
        "noise_version": NOISE_VERSION,
    }
    generate(made)
    assert read_manifest(tmp_path)["fingerprint"] == sha256_json(made.settings)


@pytest.mark.parametrize(("first", "then"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_the_two_precisions_do_not_mix(first, then, tmp_path):
    make(tmp_path, precision=first, count=20)
    before = contents(tmp_path)
    with pytest.raises(SettingsDiffer, match=rf"{NAMES[0]}: .* precision {first}, now {then}\."):
        make(tmp_path, precision=then, count=20)
    assert contents(tmp_path) == before
    make(tmp_path, precision=then, count=20, anew=True)
    assert read_manifest(tmp_path)["settings"]["precision"] == then
    assert all(contents(tmp_path)[name] != before[name] for name in NAMES[:2])


def test_there_are_two(tmp_path):
    with pytest.raises(ValueError, match=r"trajectories\.precision"):
        tiny("llamagen", "trajectories.precision=float16")


# the same bytes


def test_the_same_settings_give_the_same_bytes_in_one_process_and_in_two(complete, tmp_path):
    family, directory = complete
    assert contents(make(tmp_path / "one", family, **HALF)) == contents(directory)
    if family == "llamagen":
        assert contents(make(tmp_path / "two", family, mapper=processes(2), **HALF)) == contents(directory)


def test_another_batch_moves_few_tokens(complete, tmp_path):
    """Rounding may depend on the batch, as in float32; a token on a border moves, and what follows it."""
    family, directory = complete
    whole = TrajectoryDataset(directory, CODE_DIM)
    other = TrajectoryDataset(make(tmp_path, family, batch_size=44, **HALF), CODE_DIM)
    assert torch.equal(other.labels_N, whole.labels_N)
    assert (other.ids_NL == whole.ids_NL).double().mean() > 0.9


# what is rounded


@pytest.mark.parametrize("family", FAMILIES)
def test_products_and_cache_are_half_as_wide_and_logits_guidance_and_filters_are_not(family):
    teacher, sampling = half_teacher(family), tiny(family, "sampling.top_k=20").sampling
    seen = {}
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: seen.__setitem__(name, output.dtype))
        for name, module in teacher.transformer.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with in_half(), torch.no_grad():
        session = teacher.open(torch.arange(4), sampling)
        for size in teacher.layout.sizes[:2]:
            log_p_BlV = session.next_log_probs()
            session.append(torch.zeros(4, size, dtype=torch.long))
        session.next_log_probs()
    for hook in hooks:
        hook.remove()
    assert log_p_BlV.dtype == torch.float32
    assert {name for name, dtype in seen.items() if dtype == torch.float32} == {"head.module"}
    assert len(seen) > 4
    for cache_ in session._caches:
        kept = [cache_._kv_2BhTK] if family == "llamagen" else cache_._keys_and_values
        assert {tensor.dtype for tensor in kept} == {torch.bfloat16}
    # In bfloat16 ties with the twentieth would be kept too.
    assert (log_p_BlV.isfinite().sum(-1) == 20).all()


def test_the_flow_map_and_the_tokenizers_sums_are_in_float32():
    """Within the autocast they give what they give outside, bit for bit."""
    teacher, config = untrained("var")[0], tiny("var").trajectories
    torch.manual_seed(0)
    noise_BLC = torch.randn(16, teacher.layout.length, CODE_DIM)
    log_p_BlV = (3 * torch.randn(16, 1, 64)).log_softmax(-1)
    pick = flow_picker(teacher.layout, teacher.codebook_VC, noise_BLC, config)
    sessions = [teacher.open(torch.arange(4), tiny("var").sampling) for _ in range(2)]
    ids_Bl = torch.arange(4)[:, None]
    sessions[0].append(ids_Bl)
    with in_half():
        ids_inside = pick(0, log_p_BlV)
        sessions[1].append(ids_Bl)
    assert torch.equal(ids_inside, pick(0, log_p_BlV))
    assert sessions[1]._f_hat_BCgg.dtype == torch.float32
    assert torch.equal(sessions[0]._f_hat_BCgg, sessions[1]._f_hat_BCgg)


# what that does to the tokens


def given_the_same_levels_before(family):
    """Both precisions' tokens and probabilities (N, L, V), each level given float32's levels before it."""
    teacher, config = untrained(family)[0], tiny(family)
    indices_N = np.arange(SAMPLES, dtype=np.int64)
    labels_N = torch.from_numpy(trajectory_labels(SEED, indices_N, 10))
    noise_NLC = trajectory_noise(SEED, indices_N, (teacher.layout.length, CODE_DIM))
    pick = flow_picker(teacher.layout, teacher.codebook_VC, noise_NLC, config.trajectories)
    ids_NL = sample_teacher(teacher, labels_N, config.sampling, pick)
    found = []
    for network, half in ((teacher, False), (half_teacher(family), True)):
        levels = []

        def follow(level, log_p_NlV, levels=levels):
            levels.append((pick(level, log_p_NlV), log_p_NlV.exp()))
            return ids_NL[:, teacher.layout.positions(level)]

        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            sample_teacher(network, labels_N, config.sampling, follow)
        found.append([torch.cat(parts, dim=1) for parts in zip(*levels, strict=True)])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_moves_only_where_its_noise_lies_near_a_border_between_codes(family):
    """Borders move with the distribution, so that few tokens move where it does not move far. A token of two
    distributions differs at least as often as their total variation is large; the flow's, a few times as often."""
    (ids_NL, p_NLV), (half_ids_NL, half_p_NLV) = given_the_same_levels_before(family)
    moved = (ids_NL != half_ids_NL).double().mean()
    distance = 0.5 * (p_NLV - half_p_NLV).abs().sum(-1).double().mean()
    assert 0 < distance < 0.05, "bfloat16 is coarse, and the same teacher"
    assert moved < 10 * distance


def test_frequencies_are_those_of_the_teacher():
    """The first token of one class, drawn 20,000 times in bfloat16, against float32's probabilities: chi-square, at a
    significance of 1 in 1,000 (the seed is fixed)."""
    teacher, config, draws = untrained("llamagen")[0], tiny("llamagen"), 20_000
    class_B = torch.tensor([3])
    p_V = teacher.open(class_B, config.sampling).next_log_probs()[0, 0].double().exp()
    with in_half():
        log_p_V = half_teacher("llamagen").open(class_B, config.sampling).next_log_probs()[0, 0]
        torch.manual_seed(0)
        noise_BLC = torch.randn(draws, 1, CODE_DIM)
        pick = flow_picker(teacher.layout, teacher.codebook_VC, noise_BLC, config.trajectories)
        counts_V = pick(0, log_p_V.expand(draws, 1, -1)).flatten().bincount(minlength=len(p_V))
    expected_V = draws * p_V / p_V.sum()
    rare_V = expected_V < 5
    pooled = [torch.cat([x_V[~rare_V].double(), x_V[rare_V].sum()[None].double()]) for x_V in (counts_V, expected_V)]
    keep = pooled[1] > 0
    assert chisquare(pooled[0][keep].numpy(), pooled[1][keep].numpy()).pvalue > 0.001


# memory and time


@pytest.mark.parametrize("family", FAMILIES)
def test_the_batch_that_fits_knows_how_wide_keys_and_values_are(family):
    model, teacher = tiny(family).teacher.model, half_teacher(family)
    saved = memory.sample_bytes(model, "float32") - memory.sample_bytes(model, "bfloat16")
    kept = {}
    for precision, network in (("float32", untrained(family)[0]), ("bfloat16", teacher)):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"), torch.no_grad():
            session = network.open(torch.zeros(1, dtype=torch.long), tiny(family).sampling)
            for size in teacher.layout.sizes:
                session.next_log_probs()
                session.append(torch.zeros(1, size, dtype=torch.long))
        tensors = (
            [cache_._kv_2BhTK for cache_ in session._caches]
            if family == "llamagen"
            else [tensor for cache_ in session._caches for tensor in cache_._keys_and_values]
        )
        kept[precision] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert kept["bfloat16"] * 2 == kept["float32"]
    assert saved == kept["bfloat16"]


def test_the_batch_size_is_found_for_the_precision_that_is_asked_for(tmp_path, monkeypatch):
    config = load_preset("llamagen_l", PARAMS).config.teacher.model
    free = int(512 * memory.sample_bytes(config, "bfloat16") / memory.SHARE) + 1
    assert memory.fitting_batch(config, 0, free, "bfloat16") == 512
    assert memory.fitting_batch(config, 0, free, "float32") == 256
    asked = []
    monkeypatch.setattr(
        "ddops.trajectories.generate.fitting_batch",
        lambda model, weights, free, precision: asked.append(precision) or 4,
    )
    for precision in ("float32", "bfloat16"):
        assert job(tmp_path, batch_size="auto", precision=precision).config.batch_size == 4
    assert asked == ["float32", "bfloat16"]


def test_the_plan_knows_the_precision():
    """The same arithmetic, faster; the head, guidance and filters at float32's rate."""
    config, device = load_preset("llamagen_l", PARAMS).config, DEVICES["h200"]
    assert config.trajectories.precision == "bfloat16"
    with shapes_only():
        teacher, _ = passes.teacher_and_student(config.teacher.model)
        (full,), (half,) = (work(teacher, config, 512) for work in (passes.teacher_work, passes.trajectory_work))
    assert half.flops == pytest.approx(full.flops, rel=1e-6)
    head = 2.0 * 2 * 512 * config.teacher.model.width * config.teacher.model.codebook_size
    at_full_rate = sum(operator.flops for operator in half.operators if not operator.half)
    assert at_full_rate == pytest.approx(head, rel=1e-6)
    assert device.seconds(half.operators) < 0.5 * device.seconds(full.operators)
    assert not any(operator.half for operator in full.operators)
