"""The trajectory data set: what it holds, the same bytes after a kill as without one, and that damage is seen."""

import errno
import json
import logging
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ddops.files import sha256_file, sha256_json
from ddops.flow.solvers import flow_map
from ddops.models.registry import build_teacher
from ddops.models.weights import TOKENIZER, TRANSFORMER, save_weights
from ddops.sampling.noise import NOISE_VERSION
from ddops.stages import paths
from ddops.stages.trajectories import trajectories as trajectories_stage
from ddops.trajectories import dataset as dataset_module
from ddops.trajectories import mappers, memory
from ddops.trajectories.dataset import TrajectoryDataset
from ddops.trajectories.errors import DatasetError, SettingsDiffer
from ddops.trajectories.generate import (
    SavedTeacher,
    generate,
    generate_some,
    missing_shards,
    trajectory_labels,
    trajectory_noise,
)
from ddops.trajectories.mappers import in_this_process
from ddops.trajectories.shards import read_shard
from ddops.trajectories.verify import problems
from helpers.tiny import contents, kill_stage_in, tiny, untrained, write_tiny_params
from helpers.tiny_trajectories import CODE_DIM, FAMILIES, NAMES, OVERRIDES, SEED, job, make, teacher_files


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """The data set of an uninterrupted run; not to be changed."""
    return make(tmp_path_factory.mktemp("complete"))


@pytest.fixture
def copy(tmp_path, complete):
    for name, content in contents(complete).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A whole shard of another data set, in the third place."""
    return make(tmp_path_factory.mktemp("foreign"), seed=99) / NAMES[2]


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
    assert (settings["seed"], settings["noise_version"]) == (SEED, NOISE_VERSION)
    assert settings["teacher_sha256"] == sha256_json([sha256_file(file) for file in teacher_files()])


# killed, damaged, foreign


@pytest.mark.slow
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
    with pytest.raises(DatasetError, match=r"incomplete.* trajectories stage"):
        TrajectoryDataset(directory, CODE_DIM)
    before = times(directory)

    for name in ("whole", "killed"):
        monkeypatch.chdir(tmp_path / name)
        trajectories_stage(SEED, config.sampling, config.trajectories)
    assert contents(directory) == contents(tmp_path / "whole" / paths.TRAJECTORIES)
    assert all(times(directory)[name] == before[name] for name in NAMES[:2])


def test_a_full_disk_names_the_file_and_leaves_whole_shards(tmp_path, complete, monkeypatch):
    write, written = Path.write_bytes, []

    def full_after_two(path, content):
        written.append(path)
        if len(written) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full_after_two)
        with pytest.raises(OSError, match=rf"No space left on device: '.*{NAMES[2]}'"):
            make(tmp_path)
    assert sorted(contents(tmp_path)) == NAMES[:2]
    make(tmp_path)
    assert contents(tmp_path) == contents(complete)


def test_there_is_no_manifest_while_shards_change(copy, monkeypatch):
    """It would vouch for a mixture of old and new."""
    teacher, _ = untrained()
    seen = []
    monkeypatch.setattr(type(teacher), "open", lambda *_: seen.append((copy / "manifest.json").exists()) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(copy, seed=12, anew=True)
    assert seen == [False]
    with pytest.raises(DatasetError, match="incomplete"):
        TrajectoryDataset(copy, CODE_DIM)


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def empty(path):
    path.write_bytes(b"")


def nonsense(path):
    path.write_bytes(b"not a shard" * 100)


def too_short(path):
    """A shard that this data set did hold once, when it ended there."""
    other = make(path.parent / "elsewhere", count=20)
    path.write_bytes((other / path.name).read_bytes())


def missing(path):
    path.unlink()


def from_another_place(path):
    path.write_bytes((path.parent / NAMES[0]).read_bytes())


DAMAGES = [cut, empty, nonsense, flip_last_bit, too_short, from_another_place, missing]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_spoilt_shard_is_made_again_and_no_other(copy, complete, damage):
    damage(copy / NAMES[1])
    before = times(copy)
    make(copy)
    after = times(copy)
    assert {name: content for name, content in contents(copy).items() if "/" not in name} == contents(complete)
    assert [name for name in NAMES[:-1] if after[name] != before.get(name)] == [NAMES[1]]


OTHER_SETTINGS = [
    ({"seed": 12}, "seed 11, now 12"),
    ({"batch_size": 6}, "batch_size 5, now 6"),
    ({"tolerance": 0.02}, "tolerance 0.01, now 0.02"),
    ({"evaluations": 13}, "evaluations 100, now 13"),
    ({"solver": "heun"}, "solver adaptive, now heun"),
]


@pytest.mark.parametrize(
    ("changes", "said"), [*OTHER_SETTINGS, ({"compiled": True}, "compiled None, now True")], ids=str
)
def test_other_settings_refuse_to_mix_and_say_what_differs(copy, complete, changes, said):
    with pytest.raises(SettingsDiffer, match=rf"{NAMES[0]}: .*: {said}\."):
        make(copy, **changes)
    assert contents(copy) == contents(complete)


def test_another_teacher_or_guidance_refuses_to_mix(copy, complete):
    other = replace(job(copy), teacher_sha256="0" * 64)
    with pytest.raises(SettingsDiffer, match=r"teacher_sha256 \w{64}, now 0{64}\."):
        generate(other)
    other = replace(job(copy), sampling=replace(job(copy).sampling, guidance=3.5))
    with pytest.raises(SettingsDiffer, match=r"sampling\.guidance 1\.5, now 3\.5\."):
        generate(other)
    assert contents(copy) == contents(complete)


def test_a_foreign_shard_in_a_complete_data_set_is_named_and_made_again_alone(copy, complete, foreign, caplog):
    """The manifest says what belongs here."""
    caplog.set_level(logging.INFO)
    (copy / NAMES[2]).write_bytes(foreign.read_bytes())
    before = times(copy)
    make(copy)
    after = times(copy)
    assert f"making {NAMES[2]} again" in caplog.text
    assert "made with other settings: seed 99, now 11" in caplog.text
    assert contents(copy) == contents(complete)
    assert [name for name in NAMES[:-1] if after[name] != before[name]] == [NAMES[2]]


def test_a_foreign_shard_in_an_unfinished_data_set_is_refused_by_name(copy, complete, foreign):
    """Without a manifest nobody knows which of the two data sets was meant: neither is touched."""
    (copy / "manifest.json").unlink()
    (copy / NAMES[2]).write_bytes(foreign.read_bytes())
    before = times(copy)
    with pytest.raises(SettingsDiffer, match=rf"{NAMES[2]}: .* seed 99, now 11"):
        make(copy)
    assert times(copy) == before
    make(copy, anew=True)
    assert contents(copy) == contents(complete)
    assert [name for name in NAMES[:-1] if times(copy)[name] != before[name]] == [NAMES[2]]


@pytest.mark.parametrize("changes", [changes for changes, _ in OTHER_SETTINGS], ids=str)
def test_other_settings_make_every_shard_again_where_that_is_asked_for(copy, changes):
    before = times(copy)
    make(copy, anew=True, **changes)
    after = times(copy)
    assert all(after[name] != before[name] for name in NAMES[:-1])


def test_fewer_samples_than_there_are_drop_none_unasked(copy, complete):
    with pytest.raises(SettingsDiffer, match=rf"{NAMES[2]}: .* 24 samples .*2 such shards"):
        make(copy, count=24)
    assert contents(copy) == contents(complete)
    make(copy, count=24, anew=True)
    assert len(TrajectoryDataset(copy, CODE_DIM)) == 24


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
    """What a killed write left."""
    (copy / ".shard-00001.safetensors.123.tmp").write_bytes(b"left over")
    make(copy)
    assert sorted(contents(copy)) == sorted(NAMES)


# several processes


@pytest.mark.parametrize(
    "mapper",
    [
        pytest.param(mappers.processes(2), id="processes"),
        pytest.param(mappers.dask(workers=2), id="dask", marks=pytest.mark.rare),
    ],
)
def test_several_processes_make_the_same_bytes(mapper, tmp_path, complete):
    make(tmp_path, mapper=mapper)
    assert contents(tmp_path) == contents(complete)


class DiesOnce:
    """Makes shards, but the first process that is given the marked one dies in the middle of the data set."""

    def __init__(self, make_shard, marker, number):
        self.make_shard, self.marker, self.number = make_shard, marker, number

    def __call__(self, plan):
        if plan.number == self.number and not self.marker.exists():
            self.marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return self.make_shard(plan)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "in_this_process"),
        ({"DDOPS_WORKERS": "3"}, ("processes", 3)),
        ({"DDOPS_DASK": "local", "DDOPS_WORKERS": "4"}, ("dask", None, 4)),
        ({"DDOPS_DASK": "tcp://127.0.0.1:8786"}, ("dask", "tcp://127.0.0.1:8786", 2)),
    ],
)
def test_the_environment_says_where_the_stage_makes_its_shards(monkeypatch, settings, expected):
    for name, value in {"DDOPS_WORKERS": None, "DDOPS_DASK": None, **settings}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    monkeypatch.setattr(mappers, "processes", lambda count: ("processes", count))
    monkeypatch.setattr(mappers, "dask", lambda address, workers: ("dask", address, workers))
    chosen = mappers.from_environment()
    assert chosen == (in_this_process if expected == "in_this_process" else expected)


def test_a_number_of_workers_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("DDOPS_WORKERS", "many")
    with pytest.raises(DatasetError, match="DDOPS_WORKERS=many"):
        mappers.from_environment()


@pytest.mark.slow
def test_a_dask_worker_killed_half_way_loses_and_repeats_nothing(tmp_path, complete):
    """A real worker process, dead by SIGKILL as it makes the third shard: the cluster goes on to the same bytes."""
    cluster, marker = mappers.dask(workers=2), tmp_path / "marker"
    make(tmp_path / "data", mapper=lambda make_shard, plans: cluster(DiesOnce(make_shard, marker, 2), plans))
    assert int(marker.read_text()) != os.getpid()
    assert contents(tmp_path / "data") == contents(complete)


# verifying


def test_a_complete_data_set_has_no_problems(complete):
    assert list(problems(complete, 10, 64)) == []


@pytest.mark.parametrize("damage", [cut, flip_last_bit, from_another_place, missing], ids=lambda value: value.__name__)
def test_verify_names_the_spoilt_shard_and_no_other(copy, damage):
    damage(copy / NAMES[1])
    (problem,) = problems(copy, 10, 64)
    assert problem.startswith(
        f"{copy / NAMES[1]}: {'missing' if damage is missing else 'altered, damaged or truncated'}"
    )


def test_verify_sees_through_a_forged_manifest(copy, tmp_path_factory):
    """A shard of another seed whose hash was put into the manifest: its own header and labels give it away."""
    other = make(tmp_path_factory.mktemp("other"), seed=99)
    (copy / NAMES[1]).write_bytes((other / NAMES[1]).read_bytes())
    change_manifest(copy, lambda manifest: manifest["shards"][1].update(sha256=sha256_file(copy / NAMES[1])))
    found = list(problems(copy, 10, 64))
    assert any("made with other settings than the manifest says: seed 99, now 11" in problem for problem in found)
    assert any("the labels are not those of seed 11" in problem for problem in found)


def test_verify_counts(copy):
    change_manifest(copy, lambda manifest: manifest["shards"].pop(1))
    found = list(problems(copy, 10, 64))
    assert any("begins with sample 24, not 12" in problem for problem in found)
    assert any("not in the manifest" in problem for problem in found)


# reading


@pytest.mark.parametrize("damage", [cut, flip_last_bit, missing], ids=lambda damage: damage.__name__)
def test_an_altered_shard_is_refused_by_name(copy, damage):
    damage(copy / NAMES[2])
    with pytest.raises(DatasetError, match=rf"{NAMES[2]}: .* generate it again"):
        TrajectoryDataset(copy, CODE_DIM)


def test_noise_of_another_version_is_refused(copy):
    """The ids would not be those of the noise that this version computes, and training would learn nonsense."""

    def change(manifest):
        manifest["settings"]["noise_version"] = "philox/0"
        manifest["fingerprint"] = sha256_json(manifest["settings"])

    change_manifest(copy, change)
    with pytest.raises(DatasetError, match=rf"philox/0, .* {NOISE_VERSION}"):
        TrajectoryDataset(copy, CODE_DIM)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ("{}", "damaged"),
        ('{"format_version": 9}', "format 9, this version reads 2"),
    ],
)
def test_a_damaged_manifest_is_named(copy, content, message):
    (copy / "manifest.json").write_text(content)
    with pytest.raises(DatasetError, match=rf"manifest\.json: {message}"):
        TrajectoryDataset(copy, CODE_DIM)


# the batch size from the memory at hand


@pytest.mark.parametrize("family", FAMILIES)
def test_the_batch_that_fits_fills_the_memory_and_no_more(family):
    model = tiny(family).teacher.model
    free = 3_000_000
    for weights in (0, 1_000_000):
        size = memory.fitting_batch(model, weights, free, "float32")
        assert weights + size * memory.sample_bytes(model, "float32") <= memory.SHARE * free
        assert weights + 2 * size * memory.sample_bytes(model, "float32") > memory.SHARE * free
    assert memory.fitting_batch(model, 0, 10**15, "float32") == memory.LARGEST
    assert memory.fitting_batch(model, free, free, "float32") == 1


def test_a_container_s_limit_counts_and_workers_share(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:  8000 kB\n")
    assert memory.free_bytes(1) == 8_192_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes(2) == 4_096_000
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert memory.free_bytes(2) == 2_000_000
    (tmp_path / "meminfo").unlink()
    with pytest.raises(DatasetError, match="batch_size: auto"):
        memory.free_bytes(1)


def test_an_automatic_batch_size_is_recorded_and_kept(tmp_path, complete, monkeypatch):
    """A later run with more memory goes on with the size of the shards that are there; one with less refuses to mix."""
    sizes = iter([6, 100])
    monkeypatch.setattr(SavedTeacher, "fitting_batch", lambda self, workers, precision: next(sizes))
    assert job(tmp_path, batch_size="auto", count=12).settings["batch_size"] == 6
    make(tmp_path, batch_size=6, count=12)
    grown = job(tmp_path, batch_size="auto")
    assert grown.settings["batch_size"] == 6
    generate(grown)
    # A stranger in the first place is not asked.
    (tmp_path / NAMES[0]).write_bytes((complete / NAMES[0]).read_bytes())
    monkeypatch.setattr(SavedTeacher, "fitting_batch", lambda self, workers, precision: 100)
    generate(job(tmp_path, batch_size="auto"))
    assert read_shard(tmp_path / NAMES[0]).settings["batch_size"] == 6
    monkeypatch.setattr(SavedTeacher, "fitting_batch", lambda self, workers, precision: 4)
    with pytest.raises(SettingsDiffer, match="batch_size 6, now 4"):
        generate(job(tmp_path, batch_size="auto"))


# machines that share the work


def test_shards_made_apart_and_then_ended_are_the_same_bytes(tmp_path, complete):
    """What a scheduler of its own does: each shard in any order, by anyone, and one run that finds all of them."""
    assert [plan.number for plan in missing_shards(job(tmp_path))] == [0, 1, 2, 3]
    assert generate_some(job(tmp_path), {3, 1})["samples"] == 8 + 12
    assert not (tmp_path / "manifest.json").exists()
    assert [plan.number for plan in missing_shards(job(tmp_path))] == [0, 2]
    assert generate_some(job(tmp_path), {0, 1, 2})["samples"] == 24
    assert generate(job(tmp_path))["samples"] == 0
    assert contents(tmp_path) == contents(complete)


def test_a_shard_past_the_last_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="no shard 4: 44 samples are shards 0 to 3"):
        generate_some(job(tmp_path), {4})
