"""TensorRT engines of a bundle: built for real and without a GPU, recorded, and refused where they do not fit."""

import dataclasses
import shutil
import sys

import numpy as np
import pytest

from ddops import OneStepPipeline
from ddops.config.stages import EngineConfig, ProfileConfig
from ddops.export.bundle import Sources, write_bundle
from ddops.export.copying import all_digests
from ddops.export.engines import build_engines
from ddops.export.errors import BundleError, ExportError
from ddops.export.manifest import EngineFacts, read_manifest, verify_files
from ddops.export.onnx import export_onnx
from ddops.export.tensorrt import Machine, choose_engine, library_version, targets
from ddops.extras import MissingExtra
from ddops.models.weights import STUDENT, TOKENIZER, save_weights
from helpers.tiny import tiny, untrained
from helpers.tiny_bundle import FACTS, make_bundle, pixels


@pytest.fixture(scope="module")
def engines(bundle, tmp_path_factory):
    """The bundle with TensorRT-RTX engines, built for real and without a GPU."""
    directory = tmp_path_factory.mktemp("engines") / "bundle"
    phases = []
    profile = ProfileConfig(min=1, opt=4, max=8)
    config = EngineConfig(flavour="tensorrt_rtx", targets=("89", "portable"), profile=profile)
    reports = build_engines(bundle, directory, config, None, lambda *phase: phases.append(phase))
    return directory, reports, phases


def test_engines_are_built_without_a_gpu_and_recorded(engines, bundle):
    directory, reports, phases = engines
    manifest = read_manifest(directory)
    assert [engine.target for engine in manifest.engines] == ["89", "portable"]
    for engine, report in zip(manifest.engines, reports, strict=True):
        assert engine.onnx_sha256 == read_manifest(bundle).onnx.sha256
        assert engine.version == library_version("tensorrt_rtx")
        assert (directory / engine.file).stat().st_size == report.bytes > 100_000
        assert report.seconds > 0
    assert {done for _, done, _ in phases} > {0, 1}
    assert np.array_equal(
        pixels(OneStepPipeline.from_pretrained(directory), [4]), pixels(OneStepPipeline.from_pretrained(bundle), [4])
    )


@pytest.mark.slow
def test_an_engine_of_the_other_family_is_built(tmp_path):
    """Its mask and its scales make other operations, in half precision as full-size models are exported."""
    teacher, student = untrained("var")
    model = tiny("var").teacher.model
    save_weights(tmp_path / "student", student.state_dict(), model, STUDENT)
    save_weights(tmp_path / "tokenizer", teacher.tokenizer.state_dict(), model, TOKENIZER)
    export = dataclasses.replace(
        tiny("var").export, precision="float16", parity_count=2, tolerance=None, min_psnr=20.0, min_equal_tokens=0.5
    )
    sources = Sources(tmp_path / "student", tmp_path / "tokenizer", (0, 2), 2)
    bundle = tmp_path / "bundle"
    write_bundle(bundle, sources, export, FACTS)
    config = EngineConfig(flavour="tensorrt_rtx", targets=("89",), profile=ProfileConfig(min=1, opt=2, max=4))
    (report,) = build_engines(bundle, bundle, config, None, lambda *phase: None)
    assert report.bytes > 100_000


def test_building_again_keeps_the_other_engines(engines, tmp_path):
    directory = shutil.copytree(engines[0], tmp_path / "copy")
    config = EngineConfig(flavour="tensorrt_rtx", targets=("120",), profile=ProfileConfig(min=1, opt=2, max=2))
    build_engines(directory, directory, config, None, lambda *phase: None)
    assert [engine.target for engine in read_manifest(directory).engines] == ["89", "portable", "120"]


def test_a_target_that_the_library_does_not_know_lists_those_it_does(bundle, tmp_path):
    config = EngineConfig(flavour="tensorrt_rtx", targets=("90",), profile=ProfileConfig(min=1, opt=2, max=2))
    with pytest.raises(ExportError, match=r"builds for portable, current, .*89.*, not for '90'"):
        build_engines(bundle, tmp_path / "out", config, None, lambda *phase: None)
    assert "90" not in targets("tensorrt_rtx")


def test_what_was_built_before_a_failure_is_in_the_manifest(bundle, tmp_path):
    config = EngineConfig(flavour="tensorrt_rtx", targets=("89", "90"), profile=ProfileConfig(min=1, opt=2, max=2))
    with pytest.raises(ExportError, match="not for '90'"):
        build_engines(bundle, tmp_path / "out", config, None, lambda *phase: None)
    manifest = read_manifest(tmp_path / "out")
    assert [engine.target for engine in manifest.engines] == ["89"]
    verify_files(tmp_path / "out", all_digests(manifest))


@pytest.mark.slow
def test_weights_beside_the_graph_go_wherever_it_goes(tmp_path, monkeypatch):
    """Into engines, Triton's repository and copies; and they are watched as it is."""
    monkeypatch.setitem(export_onnx.__kwdefaults__, "external_data_above", 1000)
    bundle = make_bundle(tmp_path / "bundle")
    monkeypatch.undo()
    assert read_manifest(bundle).onnx.external_sha256 is not None
    wanted = pixels(OneStepPipeline.from_pretrained(bundle, backend="torch"), [3, 7])
    config = EngineConfig(flavour="tensorrt_rtx", targets=("89",), profile=ProfileConfig(min=1, opt=2, max=2))
    (report,) = build_engines(bundle, tmp_path / "built", config, None, lambda *phase: None)
    assert report.bytes > (bundle / "model.onnx.data").stat().st_size
    for variant in ("onestep_onnx", "onestep_python"):
        assert (tmp_path / "built/triton" / variant / "1/model.onnx.data").samefile(tmp_path / "built/model.onnx.data")
    pipe = OneStepPipeline.from_pretrained(tmp_path / "built")
    assert np.abs(pixels(pipe, [3, 7]) - wanted).max() <= 1
    pipe.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved/model.onnx.data").unlink()
    with pytest.raises(BundleError, match=r"model\.onnx\.data: missing"):
        OneStepPipeline.from_pretrained(tmp_path / "saved")


def test_a_missing_library_names_its_extra(bundle, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    config = EngineConfig(flavour="tensorrt", targets=("current",), profile=ProfileConfig(min=1, opt=2, max=2))
    with pytest.raises(MissingExtra, match=r"engine\.flavour tensorrt needs .*pip install 'ddops\[gpu\]'"):
        build_engines(bundle, tmp_path / "out", config, None, lambda *phase: None)


def machine(capability="89", version=None):
    return Machine("tensorrt_rtx", version or library_version("tensorrt_rtx"), capability)


def test_the_engine_for_just_this_gpu_comes_before_the_portable_one(engines):
    manifest = read_manifest(engines[0])
    assert choose_engine(manifest, machine("89")).target == "89"
    assert choose_engine(manifest, machine("86")).target == "portable"


@pytest.mark.parametrize(
    ("here", "change", "reason"),
    [
        (machine("120"), {}, "built for compute capability 89, this GPU has 120"),
        (machine("89", "9.9.9"), {}, "built by tensorrt_rtx .*, here is 9.9.9"),
        (machine("89"), {"onnx_sha256": "0" * 64}, r"built from another graph \(ONNX sha256 000000000000"),
    ],
    ids=["GPU", "version", "graph"],
)
def test_an_engine_that_does_not_fit_is_refused_by_name_with_the_cure(engines, here, change, reason):
    manifest = read_manifest(engines[0])
    (engine,) = (engine for engine in manifest.engines if engine.target == "89")
    manifest = dataclasses.replace(manifest, engines=(dataclasses.replace(engine, **change),))
    with pytest.raises(
        BundleError, match=rf"engines/tensorrt_rtx-sm89\.engine: {reason}.*ddops engine BUNDLE"
    ) as error:
        choose_engine(manifest, here)
    assert f"--target {here.compute_capability}" in str(error.value)


def test_a_portable_engine_is_refused_on_a_gpu_older_than_all_it_was_built_for(engines):
    manifest = read_manifest(engines[0])
    with pytest.raises(BundleError, match=r"portable .* 80 .* 75"):
        choose_engine(manifest, machine("75"))


@pytest.mark.parametrize(
    ("here", "cure"),
    [
        (machine("90"), "--flavour tensorrt_rtx --target portable"),  # which the library has no target for
        (Machine("tensorrt", "11.0", "90"), "--flavour tensorrt --target current"),  # which builds for nothing else
    ],
    ids=["RTX", "classic"],
)
def test_the_cure_is_a_command_that_the_library_takes(engines, here, cure):
    manifest = dataclasses.replace(read_manifest(engines[0]), engines=())
    with pytest.raises(BundleError, match=f"build one: ddops engine BUNDLE {cure}$"):
        choose_engine(manifest, here)
    assert cure.rpartition(" ")[2] in targets(here.flavour)


def test_without_a_gpu_the_engine_backend_says_so(engines):
    with pytest.raises(BundleError, match=r"no GPU .* backend onnx"):
        OneStepPipeline.from_pretrained(engines[0], backend="tensorrt")
    with pytest.raises(BundleError, match=r"tensorrt_rtx; .* ddops engine BUNDLE"):
        choose_engine(dataclasses.replace(read_manifest(engines[0]), engines=()), machine())


def test_an_engines_entry_is_checked_when_it_is_read(engines):
    entry = read_manifest(engines[0]).engines[0]
    assert isinstance(entry, EngineFacts)
    with pytest.raises(ValueError, match="must not decrease"):
        ProfileConfig(min=4, opt=2, max=8)
