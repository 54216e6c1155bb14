"""From published files to images: fetched, converted strictly, sampled, and equal to the golden outputs."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddops.cli import main
from ddops.commands.fetch import CONVERTED_BY
from ddops.config.load import compose, load_config, validate, write_params
from ddops.hub.acquire import acquire_teacher
from ddops.models.errors import CheckpointError
from ddops.models.published import convert_published
from ddops.models.published_files import read_published
from ddops.models.weights import (
    STUDENT,
    TOKENIZER,
    TRANSFORMER,
    load_metadata,
    load_student,
    load_teacher,
    save_weights,
)
from ddops.sampling.few_step import sample_student
from ddops.stages import distill_dd1, paths, teacher, trajectories
from ddops.trajectories.dataset import TrajectoryDataset
from ddops.trajectories.errors import DatasetError
from ddops.trajectories.shards import read_manifest
from helpers.hub_server import serve
from helpers.published_world import ARGUMENTS, MODELS, SCHEDULES, World, build, published_files, reference, saved
from helpers.tiny import FAMILIES as FAMILY_OVERRIDES
from helpers.tiny import PARAMS, untrained
from helpers.var_helpers import TOLERANCE, golden

FAMILIES = pytest.mark.parametrize("family", ["var", "llamagen"])
GOLDEN_LABELS = {"var": "in.sample_label_B", "llamagen": "in.sample_cond_idx"}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    hub, server = serve()
    yield build(tmp_path, hub, monkeypatch)
    server.shutdown()
    server.server_close()


def fetched(family: str) -> Path:
    assert main(["fetch", f"tiny_{family}"]) == 0
    return Path(".ddops/fetched") / f"tiny_{family}"


@FAMILIES
@pytest.mark.parametrize("steps", [1, 2])
@torch.no_grad()
def test_a_fetched_student_makes_the_golden_images(world: World, family: str, steps: int) -> None:
    root, data = fetched(family), golden(f"dd1_{family}")
    student, model = (
        load_student(root / paths.DD1_STUDENT),
        load_teacher(root / paths.TOKENIZER, root / paths.TRANSFORMER),
    )
    dd1 = load_config(root / paths.PARAMS).dd1
    noise_BLC, labels_B = data["in.sample_noise"], data[GOLDEN_LABELS[family]]
    starts = dd1.start_positions[:steps]
    q_BLC = sample_student(student, model.codebook_VC, noise_BLC, labels_B, starts, dd1.logit_prefix)
    torch.testing.assert_close(q_BLC, data[f"out.step{steps}.seq_{steps - 1}"], **TOLERANCE)
    images_BIHW = (model.decode(q_BLC) + 1) / 2
    if family == "var":
        images_BIHW = images_BIHW.clamp(0, 1)
    torch.testing.assert_close(images_BIHW, data[f"out.step{steps}.image"], **TOLERANCE)


@torch.no_grad()
def test_fetched_teachers_have_the_golden_logits(world: World) -> None:
    for family, name, labels, ids in (
        ("var", "var_teacher", "in.label_B", [f"in.idx_{level}" for level in range(4)]),
        ("llamagen", "llamagen_c2i_teacher", "in.labels", ["in.tokens"]),
    ):
        root, data = fetched(family), golden(name)
        model = load_teacher(root / paths.TOKENIZER, root / paths.TRANSFORMER)
        logits_BLV = model.logits(data[labels], torch.cat([data[key] for key in ids], dim=1))
        torch.testing.assert_close(logits_BLV, data["out.logits"], **TOLERANCE)


def test_what_was_fetched_is_ours_alone_and_says_where_it_is_from(world: World) -> None:
    root = fetched("var")
    files = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    weights = [paths.DD1_STUDENT, paths.TOKENIZER, paths.TRANSFORMER]
    assert files == [*map(str, weights), CONVERTED_BY, str(paths.PARAMS)]
    config, extra = load_metadata(root / paths.TRANSFORMER, TRANSFORMER)
    assert config == MODELS["var"]
    assert extra["source"].endswith("/var_d16.pth")
    assert Path("hub.lock.json").exists()


def test_fetching_again_asks_nobody_and_changes_nothing(world: World) -> None:
    root = fetched("var")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")}
    requests = len(world.hub.requests)
    fetched("var")
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")} == before
    assert len(world.hub.requests) == requests


def test_files_that_are_here_already_are_taken_instead(world: World) -> None:
    for path, content in published_files().items():
        place = world.root / "mine" / Path(path).name
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(content)
    overrides = ["teacher.download.path=mine", "dd1.download.path=mine/var-d16.pth"]
    assert main(["fetch", "tiny_var", *overrides]) == 0
    assert world.hub.requests == []


def test_a_preset_that_trains_has_nothing_to_fetch(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "digits"]) == 1
    assert "nothing to fetch" in capsys.readouterr().err


# The stages


@FAMILIES
def test_the_stages_fetch_what_is_not_trained(world: World, family: str) -> None:
    """From there on: tests/stages/test_published_evaluation.py."""
    assert main(["compose", f"preset=tiny_{family}"]) == 0
    config = load_config()
    teacher.teacher(config.seed, config.teacher)
    trajectories.trajectories(config.seed, config.teacher, config.trajectories)
    distill_dd1.distill_dd1(config.seed, config.features, config.dd1)
    assert load_student(paths.DD1_STUDENT).num_conditions == 10
    for curves in ("tokenizer", "teacher", "dd1"):
        assert (paths.CURVES / curves / "origin.json").exists(), "DVC wants every output"
    manifest = read_manifest(paths.TRAJECTORIES)
    assert manifest["count"] == 0
    assert "trajectories.count is 0" in manifest["settings"]["empty"]
    with pytest.raises(DatasetError, match="holds no trajectories"):
        TrajectoryDataset(paths.TRAJECTORIES, 8)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("dd1.source", "train", "dd1.download: unknown key"),
        ("teacher.source", "train", "teacher.label_dropout: missing"),
        ("teacher.source", "downlaod", "no source named 'downlaod'; did you mean 'download'?"),
        ("teacher.download.repo", "nowhere", "teacher.download.repo: "),
        ("teacher.download.transformer.layout", "model.", "teacher.download.transformer.layout: "),
        ("dd1.start_positions", [0, 9], "dd1.start_positions: 9 is past the end, the teacher has 4 levels"),
        ("features", {"name": "inceptoin"}, "features.name: no name named 'inceptoin'; did you mean 'inception'?"),
    ],
)
def test_each_source_has_its_own_keys(world: World, path: str, value: Any, message: str) -> None:
    values = compose("params", ["preset=tiny_var"])
    *parents, key = path.split(".")
    section = values
    for parent in parents:
        section = section[parent]
    section[key] = value
    with pytest.raises(ValueError, match="here") as error:
        validate(values, "here")
    assert message in str(error.value)


def test_training_needs_trajectories_and_features_their_protocol(world: World) -> None:
    with pytest.raises(ValueError, match=r"trajectories\.count: 0, but dd1\.source is train"):
        compose("params", ["preset=digits", "trajectories.count=0"])
    with pytest.raises(ValueError, match=r"features\.name: inception.* digits"):
        compose("params", ["preset=digits", "features=inception"])


# ddops sample


@pytest.mark.parametrize(("row", "steps"), [("teacher", "all"), ("dd1", "1"), ("dd1", "2")])
def test_sample_fetches_draws_and_repeats_itself(world: World, row: str, steps: str) -> None:
    arguments = ["--classes", "3,7", "--count", "2", "--row", row, "--steps", steps, "--seed", "4", "--grid"]
    assert main(["sample", "tiny_var", *arguments, "a.png"]) == 0
    requests = len(world.hub.requests)
    assert main(["sample", ".ddops/fetched/tiny_var", *arguments, "b.png", "--batch-size", "4"]) == 0
    assert len(world.hub.requests) == requests
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert Image.open("a.png").size == (2 * 65 + 1, 2 * 65 + 1)


def test_sample_is_the_students_own_computation(world: World) -> None:
    """One step is the default where there is a student, and the classes are the ones asked for."""
    assert main(["sample", "tiny_llamagen", "--classes", "1", "--grid", "a.png"]) == 0
    assert main(["sample", "tiny_llamagen", "--classes", "1", "--row", "dd1", "--steps", "1", "--grid", "b.png"]) == 0
    assert main(["sample", "tiny_llamagen", "--classes", "2", "--grid", "c.png"]) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes() != Path("c.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny_var", "--classes", "10"], "no class 10; there are 10, 0 to 9"),
        (["tiny_var", "--classes", "otter"], "these classes have no names"),
        (["tiny_var", "--classes", "1", "--steps", "3"], "allow 2"),
        (["tiny_var", "--classes", "1", "--steps", "3", "--row", "teacher"], "all of its 4 steps: --steps all"),
        (["tiny_var", "--classes", "1", "--seed", "-1"], "--seed"),
        (["tinyvar", "--classes", "1"], "did you mean 'tiny_var'?"),
        (["params", "--classes", "1"], "holds no params.yaml"),
        (["digits", "--classes", "1"], "not trained here yet: ddops compose preset=digits && dvc repro"),
    ],
)
def test_sample_says_what_to_ask_instead(
    world: World, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", *arguments, "--grid", "a.png"]) == 1
    assert message in capsys.readouterr().err
    assert not Path("a.png").exists()


def test_a_trained_preset_is_sampled_from_its_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the preset's name where it was trained, and by the workspace's path from anywhere."""
    write_params(compose(PARAMS, FAMILY_OVERRIDES["llamagen"]), tmp_path / paths.PARAMS)
    config, (model, student) = load_config(tmp_path / paths.PARAMS).teacher.model, untrained("llamagen")
    save_weights(tmp_path / paths.TOKENIZER, model.tokenizer.state_dict(), config, TOKENIZER)
    save_weights(tmp_path / paths.TRANSFORMER, model.get_submodule("transformer").state_dict(), config, TRANSFORMER)
    assert main(["sample", str(tmp_path), "--classes", "0,9", "--grid", str(tmp_path / "teacher.png")]) == 0
    assert main(["sample", str(tmp_path), "--row", "dd1", "--classes", "0", "--grid", str(tmp_path / "x.png")]) == 1
    save_weights(tmp_path / paths.DD1_STUDENT, student.state_dict(), config, STUDENT)
    monkeypatch.chdir(tmp_path)
    arguments = ["--params", str(PARAMS), "--row", "dd1", "--classes", "0,9", "--steps", "2", "--grid", "student.png"]
    assert main(["sample", "digits", *arguments]) == 0
    pictures = [Image.open(name) for name in ("teacher.png", "student.png")]
    assert pictures[0].size == pictures[1].size
    assert pictures[0].tobytes() != pictures[1].tobytes()


# Files that are not what they should be


class RunsCode:
    """Unpickling it creates a file: proof that code ran."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("the code ran",)


def written(content: bytes) -> Path:
    path = Path("file.pth")
    path.write_bytes(content)
    return path


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(world: World, legacy: bool) -> None:
    value = {"model": RunsCode()}
    torch.save(value, "file.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"file\.pth: refused: .*code"):
        read_published(Path("file.pth"), "model")
    assert not Path("the code ran").exists()
    with pytest.raises(CheckpointError, match=r"file\.pth"):
        read_published(written(pickle.dumps(value)), "model")
    assert not Path("the code ran").exists()


def test_a_whole_world_whose_file_runs_code_is_refused_too(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.hub.files["FoundationVision/var/var_d16.pth"] = saved({"x": RunsCode()})
    assert main(["fetch", "tiny_var"]) == 1
    assert "var_d16.pth: refused" in capsys.readouterr().err
    assert not Path("the code ran").exists()


def test_the_command_line_beside_the_weights_is_harmless(world: World) -> None:
    content = published_files()["FoundationVision/LlamaGen/c2i_B_256.pt"]
    assert read_published(written(content), "model").keys() == reference("llamagen_c2i_teacher").keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><title>Sign in</title>", "this is an HTML page, not a checkpoint"),
        (b"", "not a readable PyTorch file, or cut short"),
        (b"nonsense", "not a readable PyTorch file, or cut short"),
        (saved({"model": {"a": torch.ones(999)}})[:-300], "not a readable PyTorch file, or cut short"),
    ],
    ids=["html", "empty", "nonsense", "cut short"],
)
def test_what_is_no_checkpoint_is_named(world: World, content: bytes, message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        read_published(written(content), "model")
    assert str(error.value).startswith("file.pth: ")
    assert message in str(error.value)


def test_a_zip_of_something_else_is_named(world: World) -> None:
    with zipfile.ZipFile("file.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"file\.pth: not a readable PyTorch file"):
        read_published(Path("file.pth"), "flat")


@pytest.mark.parametrize(
    ("value", "layout", "message"),
    [
        ({"model": {}, "ema": {"a": torch.ones(1)}}, "module", "no entry 'module' .* found model, ema.* are at ema"),
        ({"model": {}}, "model", "leads to no state dict"),
        ({"trainer": {"ema_parameters": [1]}}, "trainer.ema_parameters", "leads to no state dict but to a list"),
        ({"model": {"a": torch.ones(1)}}, "flat", "no tensors at model; is the layout flat the right one"),
        ([1, 2], "model", "found list"),
    ],
)
def test_another_layout_is_named(world: World, value: Any, layout: str, message: str) -> None:
    torch.save(value, "file.pth")
    with pytest.raises(CheckpointError, match=message):
        read_published(Path("file.pth"), layout)


NAMES = {
    ("var", TOKENIZER): ("var_tokenizer", "quantize.embedding.weight"),
    ("var", TRANSFORMER): ("var_teacher", "blocks.1.attn.proj.bias"),
    ("var", STUDENT): ("dd1_var", "n_d_embed.weight"),
    ("llamagen", TOKENIZER): ("llamagen_tokenizer", "quantize.embedding.weight"),
    ("llamagen", TRANSFORMER): ("llamagen_c2i_teacher", "layers.1.attention.wo.weight"),
    ("llamagen", STUDENT): ("dd1_llamagen", "tok_embeddings.bias"),
}


@pytest.mark.parametrize(("family", "kind"), NAMES)
@pytest.mark.parametrize("fault", ["missing", "extra", "misshapen"])
def test_every_tensor_is_accounted_for(world: World, family: str, kind: str, fault: str) -> None:
    name, key = NAMES[family, kind]
    state = reference(name)
    if fault == "missing":
        del state[key]
    elif fault == "extra":
        key = "surprise.weight"
        state[key] = torch.ones(2, 3)
    else:
        state[key] = torch.ones(2, 3, 5)
    path, target = written(saved(state)), Path("ours.safetensors")
    with pytest.raises(CheckpointError) as error:
        convert_published(path, "flat", MODELS[family], kind, target, {})
    assert str(error.value).startswith("file.pth: the checkpoint ")
    assert key in str(error.value)
    assert not target.exists()


WRAPPINGS = {
    "data parallel": lambda key: f"module.{key}",
    "compiled": lambda key: f"_orig_mod.{key}",
    "both": lambda key: f"module._orig_mod.{key}",
    "a compiled part": lambda key: key.replace("1.", "1._orig_mod.", 1),
    "sharded": lambda key: f"_fsdp_wrapped_module.{key}",
    "inside another model": lambda key: f"var_wo_ddp.net.{key}",
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize(("family", "kind"), NAMES)
def test_a_wrapped_modules_keys_are_recognised(world: World, family: str, kind: str, wrapping: str) -> None:
    state = reference(NAMES[family, kind][0])
    convert_published(written(saved(state)), "flat", MODELS[family], kind, Path("plain.safetensors"), {})
    wrapped = {WRAPPINGS[wrapping](key): value for key, value in state.items()}
    assert wrapped.keys() != state.keys()
    if wrapping == "data parallel":
        wrapped["n_averaged"] = torch.tensor(7)  # as AveragedModel has it
    convert_published(written(saved(wrapped)), "flat", MODELS[family], kind, Path("wrapped.safetensors"), {})
    assert Path("wrapped.safetensors").read_bytes() == Path("plain.safetensors").read_bytes()


def test_keys_that_would_fall_together_are_not_guessed_at(world: World) -> None:
    state = reference("llamagen_c2i_teacher")
    twice = {**{f"module.{key}": value for key, value in state.items()}, **{f"m.{key}": state[key] for key in state}}
    with pytest.raises(CheckpointError, match=r"unexpected m\."):
        convert_published(written(saved(twice)), "flat", MODELS["llamagen"], TRANSFORMER, Path("ours"), {})


def test_a_training_runs_checkpoint_is_read_where_its_weights_are(world: World) -> None:
    """As VAR's trainer writes it: DDP's inner module, the optimiser, figures that are NumPy's scalars, a Namespace."""
    trainer = {"var_wo_ddp": reference("var_teacher"), "config": {"best": np.float64(2.5), "step": np.int32(3)}}
    path = written(
        saved({"epoch": 3, "iter": np.int64(7), "args": ARGUMENTS, "name": np.str_("a"), "trainer": trainer})
    )
    assert read_published(path, "trainer.var_wo_ddp").keys() == reference("var_teacher").keys()
    for layout in ("flat", "model", "trainer"):
        with pytest.raises(CheckpointError, match=r"State dicts are at trainer\.var_wo_ddp"):
            read_published(path, layout)
    values = compose("params", ["preset=tiny_var", "teacher.download.transformer.layout=trainer.var_wo_ddp"])
    assert validate(values, "tiny").teacher.download.transformer.layout == "trainer.var_wo_ddp"


def test_tensors_that_share_a_storage_are_written(world: World) -> None:
    flat, state = torch.arange(1e5), reference("llamagen_c2i_teacher")
    shape = state["norm.weight"].shape
    state["norm.weight"], state["layers.0.ffn_norm.weight"] = flat[: shape[0]], flat[5 : 5 + shape[0]]
    convert_published(written(saved(state)), "flat", MODELS["llamagen"], TRANSFORMER, Path("ours"), {})
    assert (
        Path("ours").stat().st_size
        < 4 * sum(tensor.numel() for tensor in reference("llamagen_c2i_teacher").values()) * 1.2
    )


def test_a_changed_configuration_converts_again(world: World) -> None:
    config = validate(compose("params", ["preset=tiny_var"]), "tiny").teacher
    files = [Path("tokenizer"), Path("transformer")]
    acquire_teacher(config, *files)
    config = validate(compose("params", ["preset=tiny_var", "teacher.model.norm_eps=1.0e-05"]), "tiny").teacher
    acquire_teacher(config, *files)
    assert load_metadata(files[1], TRANSFORMER)[0].norm_eps == 1e-5


def test_the_schedules_of_the_tiny_presets_are_the_golden_files() -> None:
    assert SCHEDULES["var"]["start_positions"] == [0, 2]
    assert SCHEDULES["llamagen"]["start_positions"] == [0, 5]
