"""JSON that a disk, an editor or a merge damaged: whoever reads it says which file it is, or is not misled by it.

Bounded and seeded; every damage is one that was met: a bit flipped, the end cut off, another document in its place, a
key gone or misspelt, a value of another type.
"""

import argparse
import json
import random
import shutil

import numpy as np
import pytest
import torch

from ddops.captions.store import CaptionSet, write_manifest, write_shard
from ddops.commands import override
from ddops.commands.arguments import CommandError
from ddops.config.load import load_config
from ddops.evaluation.samples import write_samples
from ddops.files import sha256_json, write_json
from ddops.hub.records import HubRecords
from ddops.production import Registry, metrics_in_production
from ddops.sampling.noise import NOISE_VERSION
from ddops.stages import evaluate, gate, paths
from ddops.stages.common import EXPECTED_ERRORS, StageError, drawing_of
from ddops.stages.report import report
from ddops.trajectories import shards
from ddops.trajectories.dataset import TrajectoryDataset
from ddops.trajectories.verify import problems
from helpers.tiny import write_tiny_params

SHA = "5" * 64
OTHERS = [None, True, -1, 10**30, 0.5, "", "text", [], {}, [1, [2]], {"a": {"b": None}}]


def places(value, path=()):
    """The path of everything in a document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def edited(document, path, change):
    """The document with something else at a path: ``change`` gets what holds it, and its key."""
    if not path:
        return random.Random(0).choice(OTHERS)
    copy = json.loads(json.dumps(document))
    holder = copy
    for key in path[:-1]:
        holder = holder[key]
    change(holder, path[-1])
    return copy


def misspell(holder, key):
    if isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    else:
        holder.append(holder[key])


def damages(content, seed, count):
    """Damaged versions of a file's bytes, ``count`` of each kind, the same for the same seed."""
    chance, document = random.Random(seed), json.loads(content)
    inside = list(places(document))
    for _ in range(count):
        where = chance.randrange(len(content))
        yield content[:where] + bytes([content[where] ^ 1 << chance.randrange(8)]) + content[where + 1 :]
        yield content[: chance.randrange(len(content))]
        yield chance.choice([b"", b"\0" * 100, b"<html>", b"[" * 10_000, b"{}", b"[]", b"null", b"7", b'"\xff"'])
        path, other = chance.choice(inside), chance.choice(OTHERS)
        yield json.dumps(edited(document, path, lambda holder, key: holder.pop(key))).encode()
        yield json.dumps(edited(document, path, misspell)).encode()
        yield json.dumps(edited(document, path, lambda holder, key, v=other: holder.__setitem__(key, v))).encode()


def survives(path, read, seed, count, also=()):
    """Read a file in all its damaged versions: an explained error that names a file, or what was there before."""
    content = path.read_bytes()
    read()
    messages = []
    for damaged in damages(content, seed, count):
        path.write_bytes(damaged)
        try:
            read()
        except (*EXPECTED_ERRORS, *also) as error:
            messages.append(str(error))
    path.write_bytes(content)
    read()
    assert also or all(path.name in message or ".safetensors" in message for message in messages)
    assert len(messages) > count, "files cut off and replaced are noticed at the least"


HARD = pytest.mark.parametrize("count", [8, pytest.param(150, marks=pytest.mark.rare)])


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A tiny configuration, and reports of a model that was let through."""
    monkeypatch.chdir(tmp_path)
    write_tiny_params(tmp_path)
    config = load_config(paths.PARAMS)
    row, student = config.export.row, config.export.student
    stated = ("name", "features", "features_sha256", "reference_sha256", "drawing_sha256", "quantisation", "labels")
    figures = {
        "fid": 1.5,
        "fid_spread": 0.1,
        "accuracy": 0.9,
        "accuracy_spread": 0.1,
        "samples": 10,
        "runs": 1,
        "passes": 1,
        "parameters": 3,
    }
    protocol = dict.fromkeys(stated, SHA) | {"name": "digits", "seeds": [1, 2], "reference_images": 9}
    rows = {row: figures, "teacher": {**figures, "runs": 2}}
    write_json(paths.METRICS, {"protocol": protocol, "models": {student: SHA}, **rows})
    rule = {"rule": "near", "quantity": "x.fid", "value": 1.5, "bound": "at most 2", "passed": True, "measured": True}
    decision = {"passed": True, "outcome": "accepted", "student_sha256": SHA, "override": None}
    checks = [{"name": "the figures are of this student", "passed": True, "detail": "5555"}]
    write_json(paths.GATE_DECISION, {**decision, "checks": checks, "rules": [rule]})
    write_json(paths.FEATURES_METRICS, {"name": "digits_classifier", "heldout_accuracy": 0.99, "heldout": 359})
    parity = {"images": 8, "largest": 1e-6, "mean": 1e-7, "psnr": 140.0, "equal_tokens": 1.0}
    compared = {"exported": {"fid": 1.6}, "pytorch": {"fid": 1.6}, "fid_loss": 0.0}
    exported = {"parity": parity, "precision": "float32", "bytes": 19, "steps": 1, "sha256": {"model.onnx": SHA}}
    write_json(paths.EXPORT_METRICS, {**exported, **compared})
    return config


REPORTS = [paths.METRICS, paths.GATE_DECISION, paths.FEATURES_METRICS, paths.EXPORT_METRICS]


@HARD
@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_the_report_of_damaged_figures(workspace, monkeypatch, path, count):
    config = workspace
    monkeypatch.setattr("ddops.stages.report.provenance", lambda metrics: {})
    survives(path, lambda: report(config.preset, config.seed, config.export), 1, count)


@HARD
def test_the_gate_of_damaged_figures(workspace, count):
    config = workspace
    for path in (paths.TOKENIZER, paths.TRANSFORMER, paths.DD1_STUDENT, paths.DD2_GENERATOR, paths.CLASSIFIER):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"weights")

    def decide():
        decision = gate.decide_now(config.gate, config.evaluate, config.export, drawing_of(config))
        assert not decision.passed, "the figures are of none of these files"

    survives(paths.METRICS, decide, 2, count)


@pytest.fixture
def samples(workspace, monkeypatch):
    """Two rows and the real images, and a judge that only counts."""
    monkeypatch.setattr("ddops.stages.evaluate.open_ruler", lambda *parts: Counting())
    paths.CLASSIFIER.parent.mkdir(parents=True)
    paths.CLASSIFIER.write_bytes(b"weights")
    for row in ("dd1_1step", "teacher", "reconstruction"):
        batch_BIHW = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
        write_samples(paths.SAMPLES / row / "seed1.npz", [batch_BIHW], torch.tensor([1, 2]))
    costs = {row: {"passes": 1, "parameters": 2} for row in ("dd1_1step", "teacher")}
    write_json(paths.SAMPLES_MANIFEST, {"models": {"dd1": SHA}, "drawing_sha256": SHA, "rows": costs})
    return workspace


class Counting:
    def figures(self, batches, labels_N):
        return {"fid": float(sum(len(batch_BIHW) for batch_BIHW in batches))}

    def facts(self):
        return {"name": "counting"}


@HARD
def test_the_figures_of_samples_whose_manifest_is_damaged(samples, count):
    survives(paths.SAMPLES_MANIFEST, lambda: evaluate.evaluate(samples.evaluate), 7, count)


def test_samples_that_the_manifest_does_not_know_are_not_judged(samples):
    shutil.copytree(paths.SAMPLES / "teacher", paths.SAMPLES / "dd2_1step")
    with pytest.raises(StageError, match=r"manifest\.json: says nothing of dd2_1step"):
        evaluate.evaluate(samples.evaluate)
    shutil.rmtree(paths.SAMPLES / "dd2_1step")
    (paths.SAMPLES / "teacher" / "seed1.npz").unlink()
    with pytest.raises(StageError, match="teacher holds no samples"):
        evaluate.evaluate(samples.evaluate)


@HARD
def test_an_override_of_a_damaged_decision(workspace, count):
    """It is refused, or written for the model that the gate refused."""
    refused = json.loads(paths.GATE_DECISION.read_text())
    refused["rules"][0]["passed"] = False
    write_json(paths.GATE_DECISION, {**refused, "passed": False, "outcome": "refused"})
    params = paths.PARAMS.read_bytes()

    def run():
        paths.PARAMS.write_bytes(params)
        override.run(argparse.Namespace(reason="demo", by="Ada"))
        assert load_config(paths.PARAMS).gate.override.student_sha256 is not None

    survives(paths.GATE_DECISION, run, 8, count, also=(CommandError,))


@HARD
def test_the_registry(workspace, count):
    metrics = json.loads(paths.METRICS.read_text())
    registry = Registry.load(paths.PRODUCTION)
    for number in (1, 2):
        facts = {"preset": "tiny", "bundle": f"production/v{number}", "files": {"a": f"{number}"}, "row": "teacher"}
        registry.promote(f"v{number}.0.0", {**facts, "metrics": metrics}, by="Ada", reason="better")

    def read():
        registry = Registry.load(paths.PRODUCTION)
        metrics_in_production(paths.PRODUCTION)
        registry.next_version()
        for version in registry.versions.values():
            assert all(version[key] for key in ("preset", "bundle", "files"))
        if len(registry.versions) > 1 and registry.current == "v2.0.0":
            registry.earlier(None)

    survives(paths.PRODUCTION, read, 3, count)


@HARD
def test_the_hubs_lock_file(tmp_path, count):
    lock = tmp_path / "hub.lock.json"
    files = {f"{name}.pth": {"size": 10, "sha256": SHA} for name in "abc"}
    write_json(lock, {f"owner/{repo}": {"commits": {"main": "1" * 40}, "files": files} for repo in "ab"})

    def read():
        records = HubRecords.load(lock)
        for repo in ("owner/a", "owner/b"):
            assert records.expected(repo, "a.pth").sha256 is None or len(records.expected(repo, "a.pth").sha256) == 64
            records.commit(repo, "main")

    survives(lock, read, 4, count)


@pytest.fixture
def trajectories(tmp_path):
    settings = {"seed": 3, "noise_version": NOISE_VERSION, "batch_size": 2, "teacher": {"a": SHA}}
    plans = shards.plan_shards(5, 2)
    for plan in plans:
        ids_NL = np.arange(plan.count * 4, dtype=np.uint16).reshape(plan.count, 4)
        labels_N = np.arange(plan.first, plan.first + plan.count, dtype=np.uint16)
        shards.write_shard(tmp_path / plan.name, labels_N, ids_NL, plan.first, settings)
    shards.write_manifest(tmp_path, settings, plans)
    return tmp_path


def as_values(directory):
    dataset = TrajectoryDataset(directory, 2)
    batch = dataset.batch(torch.arange(len(dataset)))
    return [dataset.seed, *(part.tolist() for part in batch)]


@HARD
def test_trajectories_are_the_same_or_refused(trajectories, count):
    """Nothing is trained on wrong noise, or on other samples."""
    right = as_values(trajectories)

    def read():
        list(problems(trajectories, 10, 100))
        assert as_values(trajectories) == right

    survives(trajectories / shards.MANIFEST, read, 5, count)


@pytest.mark.parametrize("forged", [False, True])
@pytest.mark.parametrize(("key", "value"), [("seed", 4), ("batch_size", 3), ("teacher", {"a": "other"})])
def test_a_manifest_of_other_settings_is_not_trained_on(trajectories, key, value, forged):
    """Its hash tells; and where someone computed that anew, the shards do."""
    path = trajectories / shards.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["settings"][key] = value
    if forged:
        manifest["fingerprint"] = sha256_json(manifest["settings"])
    write_json(path, manifest)
    with pytest.raises(shards.DatasetError, match="made with other settings" if forged else "damaged"):
        TrajectoryDataset(trajectories, 2)


@pytest.fixture
def captions(tmp_path):
    names = {"shard-00000.safetensors": 0, "shard-00001.safetensors": 2}
    for name, first in names.items():
        features = [torch.full((length, 3), float(first + length)) for length in (1, 2)]
        write_shard(tmp_path / name, features, torch.float32, "fingerprint", first)
    facts = {"classes": [0, 1, 2, 0], "of_images": [0, 1, 2, 3], "bad_rows": None}
    write_manifest(tmp_path, {"length": 4, "encoder": {"name": "seeded"}}, ["a", "b", "c", "d"], names, facts)
    return tmp_path


@HARD
def test_captions_are_the_same_or_refused(captions, count):
    def values():
        found = CaptionSet(captions)
        features_BTW, mask_BT = found.captions(torch.arange(len(found)))
        return features_BTW.tolist(), mask_BT.tolist(), found.prompts, found.classes, found.of_images

    right = values()

    def read():
        assert values() == right

    survives(captions / "manifest.json", read, 6, count)
