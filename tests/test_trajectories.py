"""The trajectory data set: what it holds, the same bytes after a kill as without one, and that damage is seen."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from ddops.files import sha256_file
from ddops.flow.solvers import flow_map
from ddops.models.registry import build_teacher
from ddops.models.weights import TOKENIZER, TRANSFORMER, save_weights
from ddops.sampling.noise import NOISE_VERSION
from ddops.stages import paths
from ddops.stages.trajectories import trajectories as trajectories_stage
from ddops.trajectories import dataset as dataset_module
from ddops.trajectories.dataset import TrajectoryDataset
from ddops.trajectories.generate import generate, trajectory_labels, trajectory_noise
from ddops.trajectories.shards import DatasetError
from tiny import contents, kill_stage_in, tiny, untrained, write_tiny_params

FAMILIES = ["llamagen", "var"]
SEED = 11
COUNTS = ["trajectories.count=44", "trajectories.shard_size=12", "trajectories.batch_size=5"]
OVERRIDES = (*COUNTS, "trajectories.tolerance=0.01", f"seed={SEED}")
NAMES = [*(f"shard-{number:05d}.safetensors" for number in range(4)), "manifest.json"]
CODE_DIM = 8


def make(directory, family="llamagen", *, teacher_sha256="teacher", seed=SEED, **changes):
    config = tiny(family, *OVERRIDES)
    teacher, _ = untrained(family)
    generate(
        teacher,
        replace(config.trajectories, **changes),
        config.sampling,
        seed=seed,
        teacher_sha256=teacher_sha256,
        directory=directory,
    )
    return directory


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """The data set of an uninterrupted run; not to be changed."""
    return make(tmp_path_factory.mktemp("complete"))


@pytest.fixture
def copy(tmp_path, complete):
    for name, content in contents(complete).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def times(directory):
    return {file.name: file.stat().st_mtime_ns for file in directory.iterdir() if file.name != "manifest.json"}


def change_manifest(directory, change):
    manifest = json.loads((directory / "manifest.json").read_text())
    change(manifest)
    (directory / "manifest.json").write_text(json.dumps(manifest))


def flip_last_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


# what it holds


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_ids_are_where_the_flow_takes_the_noise(family, tmp_path):
    """The map is solved again here, level after level, over the teacher's own distributions."""
    config = tiny(family, *OVERRIDES)
    teacher, _ = untrained(family)
    dataset = TrajectoryDataset(make(tmp_path, family), CODE_DIM)
    batch = dataset.batch(torch.arange(5))
    session = teacher.open(batch.labels_B, config.sampling)
    for level in range(teacher.layout.num_levels):
        positions = teacher.layout.positions(level)
        noise_NC, log_p_NV = batch.noise_BLC[:, positions].flatten(0, 1), session.next_log_probs().flatten(0, 1)
        ids_N = flow_map(noise_NC, log_p_NV, teacher.codebook_VC, tolerance=0.01)
        assert torch.equal(ids_N, batch.ids_BL[:, positions].flatten())
        session.append(batch.ids_BL[:, positions])


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_ids_agree_with_the_teachers_parallel_pass(family, tmp_path):
    """Guidance by hand and one teacher-forced pass instead of the cached sampler: the same up to rounding."""
    config = tiny(family, *OVERRIDES)
    teacher, _ = untrained(family)
    dataset = TrajectoryDataset(make(tmp_path, family), CODE_DIM)
    batch = dataset.batch(torch.arange(len(dataset)))
    cond_BLV = teacher.logits(batch.labels_B, batch.ids_BL)
    uncond_BLV = teacher.logits(torch.full_like(batch.labels_B, 10), batch.ids_BL)
    layout, guidance = teacher.layout, config.sampling.guidance
    scale_L = torch.tensor([teacher.guidance_scale(guidance, int(level)) for level in layout.level_of_position()])
    log_p_BLV = (uncond_BLV + scale_L[:, None] * (cond_BLV - uncond_BLV)).log_softmax(-1)
    ids_N = flow_map(batch.noise_BLC.flatten(0, 1), log_p_BLV.flatten(0, 1), teacher.codebook_VC, tolerance=0.01)
    assert (ids_N == batch.ids_BL.flatten()).double().mean() > 0.995


def test_labels_and_noise_are_those_of_seed_and_index(complete):
    dataset = TrajectoryDataset(complete, CODE_DIM)
    assert len(dataset) == 44
    chosen = torch.tensor([43, 0, 17])
    batch = dataset.batch(chosen)
    assert torch.equal(batch.labels_B, torch.from_numpy(trajectory_labels(SEED, chosen.numpy(), 10)))
    assert torch.equal(batch.noise_BLC, trajectory_noise(SEED, chosen.numpy(), (16, CODE_DIM)))
    assert len(np.unique(dataset.labels_N)) == 10


@pytest.mark.parametrize("changes", [{"shard_size": 7}, {"batch_size": 44}, {"count": 20}], ids=str)
def test_a_sample_does_not_depend_on_how_the_data_set_is_cut(complete, tmp_path, changes):
    whole = TrajectoryDataset(complete, CODE_DIM)
    other = TrajectoryDataset(make(tmp_path, **changes), CODE_DIM)
    count = len(other)
    assert torch.equal(other.labels_N, whole.labels_N[:count])
    assert torch.equal(other.batch(torch.arange(count)).noise_BLC, whole.batch(torch.arange(count)).noise_BLC)
    # Rounding may depend on the batch and can move a token that lies on a border; no more than that.
    assert (other.ids_NL == whole.ids_NL[:count]).double().mean() > 0.99


def test_another_seed_is_another_data_set(complete, tmp_path):
    whole, other = TrajectoryDataset(complete, CODE_DIM), TrajectoryDataset(make(tmp_path, seed=12), CODE_DIM)
    assert not torch.equal(other.labels_N, whole.labels_N)
    assert (other.ids_NL == whole.ids_NL).double().mean() < 0.5


def test_noise_kept_and_noise_computed_are_the_same(complete, monkeypatch):
    chosen = torch.tensor([5, 41, 5, 0])
    kept = TrajectoryDataset(complete, CODE_DIM)
    monkeypatch.setattr(dataset_module, "NOISE_CACHE_BYTES", 0)
    computed = TrajectoryDataset(complete, CODE_DIM)
    assert kept._noise_NLC is not None
    assert computed._noise_NLC is None
    for a, b in zip(kept.batch(chosen), computed.batch(chosen), strict=True):
        assert torch.equal(a, b)


def test_the_same_settings_give_the_same_bytes(complete, tmp_path):
    assert sorted(contents(complete)) == sorted(NAMES)
    assert contents(make(tmp_path)) == contents(complete)


def test_the_manifest_names_every_shard_and_what_it_was_made_with(complete):
    manifest = json.loads((complete / "manifest.json").read_text())
    assert manifest["count"] == 44
    assert [(shard["first"], shard["count"]) for shard in manifest["shards"]] == [(0, 12), (12, 12), (24, 12), (36, 8)]
    assert all(sha256_file(complete / shard["name"]) == shard["sha256"] for shard in manifest["shards"])
    settings = manifest["settings"]
    assert (settings["seed"], settings["teacher_sha256"], settings["noise_version"]) == (SEED, "teacher", NOISE_VERSION)


# killed, damaged, foreign


def test_generation_killed_with_sigkill_ends_with_the_same_bytes(tmp_path, monkeypatch):
    """`python -m ddops.stages.trajectories`, dead as its third shard was to take its place, then run again."""
    config = tiny("llamagen", *OVERRIDES)
    torch.manual_seed(0)
    teacher = build_teacher(config.teacher.model)
    for name in ("whole", "killed"):
        workspace = tmp_path / name
        write_tiny_params(workspace, *OVERRIDES)
        parts = {paths.TOKENIZER: (teacher.tokenizer, TOKENIZER), paths.TRANSFORMER: (teacher.transformer, TRANSFORMER)}
        for path, (module, kind) in parts.items():
            save_weights(workspace / path, module.state_dict(), config.teacher.model, kind)
    kill_stage_in(tmp_path / "killed", "trajectories", suffix=".safetensors", number=3)
    directory = tmp_path / "killed" / paths.TRAJECTORIES
    left = contents(directory)
    assert {name for name in left if not name.startswith(".")} == {NAMES[0], NAMES[1]}
    with pytest.raises(DatasetError, match="the data set is incomplete; run the trajectories stage"):
        TrajectoryDataset(directory, CODE_DIM)
    before = times(directory)

    for name in ("whole", "killed"):
        monkeypatch.chdir(tmp_path / name)
        trajectories_stage(SEED, config.sampling, config.trajectories)
    assert contents(directory) == contents(tmp_path / "whole" / paths.TRAJECTORIES)
    assert all(times(directory)[name] == before[name] for name in NAMES[:2])


def test_there_is_no_manifest_while_shards_change(copy, monkeypatch):
    """It would vouch for a mixture of old and new."""
    teacher, _ = untrained()
    seen = []
    monkeypatch.setattr(type(teacher), "open", lambda *_: seen.append((copy / "manifest.json").exists()) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(copy, seed=12)
    assert seen == [False]
    with pytest.raises(DatasetError, match="incomplete"):
        TrajectoryDataset(copy, CODE_DIM)


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def empty(path):
    path.write_bytes(b"")


def nonsense(path):
    path.write_bytes(b"not a shard" * 100)


def from_another_seed(path):
    other = make(path.parent / "elsewhere", seed=99)
    path.write_bytes((other / path.name).read_bytes())


def too_short(path):
    """A shard that this data set did hold once, when it ended there."""
    other = make(path.parent / "elsewhere", count=20)
    path.write_bytes((other / path.name).read_bytes())


def missing(path):
    path.unlink()


DAMAGES = [cut, empty, nonsense, flip_last_bit, from_another_seed, too_short, missing]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_spoilt_shard_is_made_again_and_no_other(copy, complete, damage):
    damage(copy / NAMES[1])
    before = times(copy)
    make(copy)
    after = times(copy)
    assert {name: content for name, content in contents(copy).items() if "/" not in name} == contents(complete)
    assert [name for name in NAMES[:-1] if after[name] != before.get(name)] == [NAMES[1]]


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher_sha256": "another"},
        {"seed": 12},
        {"tolerance": 0.02},
        {"evaluations": 13},
        {"solver": "heun"},
        {"batch_size": 6},
    ],
    ids=str,
)
def test_other_settings_make_every_shard_again(copy, changes):
    before = times(copy)
    make(copy, **changes)
    after = times(copy)
    assert all(after[name] != before[name] for name in NAMES[:-1])


def test_a_complete_data_set_is_left_alone(copy, complete, monkeypatch):
    monkeypatch.setattr(type(untrained()[0]), "open", lambda *_: pytest.fail("nothing is missing"))
    before = times(copy)
    make(copy)
    assert times(copy) == before
    assert contents(copy) == contents(complete)


def test_more_of_the_same_keeps_the_full_shards(copy):
    before = times(copy)
    make(copy, count=50)
    after = times(copy)
    assert sorted(name for name in after if after[name] != before.get(name)) == [NAMES[3], "shard-00004.safetensors"]
    assert len(TrajectoryDataset(copy, CODE_DIM)) == 50


def test_what_does_not_belong_is_removed(copy):
    """Shards of a longer data set, and what a killed write left."""
    for name in ("shard-00009.safetensors", ".shard-00001.safetensors.123.tmp"):
        (copy / name).write_bytes(b"left over")
    make(copy)
    assert sorted(contents(copy)) == sorted(NAMES)


# reading


@pytest.mark.parametrize("damage", [cut, flip_last_bit, missing], ids=lambda damage: damage.__name__)
def test_an_altered_shard_is_refused_by_name(copy, damage):
    damage(copy / NAMES[2])
    with pytest.raises(DatasetError, match=rf"{NAMES[2]}: missing or altered .*; generate it again"):
        TrajectoryDataset(copy, CODE_DIM)


def test_noise_of_another_version_is_refused(copy):
    """The ids would not be those of the noise that this version computes, and training would learn nonsense."""
    change_manifest(copy, lambda manifest: manifest["settings"].update(noise_version="philox/0"))
    with pytest.raises(DatasetError, match=rf"made with noise philox/0, this version computes {NOISE_VERSION}"):
        TrajectoryDataset(copy, CODE_DIM)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ("{}", "damaged"),
        ('{"format_version": 9}', "format 9, this version reads 1"),
    ],
)
def test_a_damaged_manifest_is_named(copy, content, message):
    (copy / "manifest.json").write_text(content)
    with pytest.raises(DatasetError, match=rf"manifest\.json: {message}"):
        TrajectoryDataset(copy, CODE_DIM)
