"""Both flavours of TensorRT up to where a GPU is needed: the data-centre library's builder with the RTX library in its
place (the same API), and the session that runs an engine with a library in its place that reads and writes memory as
the real one does, by address."""

import ctypes
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import tensorrt_rtx
import torch

from ddops import OneStepPipeline
from ddops.cli import main
from ddops.config.stages import EngineConfig, ProfileConfig
from ddops.export.copying import all_digests
from ddops.export.engines import build_engines
from ddops.export.errors import BundleError
from ddops.export.manifest import read_manifest, verify_files
from ddops.export.session import open_session, run_session

PROFILE = ProfileConfig(min=1, opt=2, max=4)


# building: the flavour `tensorrt`


@pytest.fixture
def classic(monkeypatch):
    """The flavour `tensorrt`, played by the RTX library; its timing caches are kept, in order."""
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_rtx)
    caches = SimpleNamespace(made=[], accepts=lambda content: True)
    attach = tensorrt_rtx.IBuilderConfig.set_timing_cache

    def create(config, content):
        caches.made.append(bytes(content))
        return make(config, b"")

    def set_(config, cache, ignore_mismatch):
        assert not ignore_mismatch
        return attach(config, cache, ignore_mismatch) and caches.accepts(caches.made[-1])

    make = tensorrt_rtx.IBuilderConfig.create_timing_cache
    monkeypatch.setattr(tensorrt_rtx.IBuilderConfig, "create_timing_cache", create)
    monkeypatch.setattr(tensorrt_rtx.IBuilderConfig, "set_timing_cache", set_)
    return caches


def build(bundle, target, cache):
    config = EngineConfig(flavour="tensorrt", targets=("current",), profile=PROFILE)
    return build_engines(bundle, target, config, cache, lambda *phase: None)


def test_the_classic_flavour_goes_through_the_same_life(bundle, tmp_path, classic):
    """Its engine is recorded, vouched for, and Triton's to serve."""
    (report,) = build(bundle, tmp_path / "out", tmp_path / "timing")
    manifest = read_manifest(tmp_path / "out")
    verify_files(tmp_path / "out", all_digests(manifest))
    (engine,) = manifest.engines
    assert (engine.file, engine.flavour, engine.profile) == ("engines/tensorrt-current.engine", "tensorrt", PROFILE)
    plan = tmp_path / "out/triton/onestep_tensorrt/1/model.plan"
    assert plan.stat().st_size == report.bytes > 100_000
    assert 'platform: "tensorrt_plan"' in (plan.parents[1] / "config.pbtxt").read_text()


def test_timings_are_kept_for_the_next_build(bundle, tmp_path, classic):
    cache = tmp_path / "state" / "timing"
    build(bundle, tmp_path / "out", cache)
    assert classic.made == [b""]
    kept = cache.read_bytes()
    assert kept
    build(bundle, tmp_path / "out", cache)
    assert classic.made == [b"", kept]


def test_timings_of_another_gpu_are_left_and_replaced(bundle, tmp_path, classic):
    """The library refuses them: the build goes on with an empty cache, and what it measures takes their place."""
    cache = tmp_path / "timing"
    cache.write_bytes(b"of another GPU")
    classic.accepts = lambda content: content == b""
    build(bundle, tmp_path / "out", cache)
    assert classic.made == [b"of another GPU", b""]
    assert cache.read_bytes() != b"of another GPU"


# running


class Context:
    """An execution context: what it is told, and the graph in ONNX Runtime for what a GPU would do with it."""

    fails = False

    def __init__(self, session):
        self.session, self.shapes, self.addresses = session, {}, {}

    def set_input_shape(self, name, shape):
        self.shapes[name] = tuple(shape)

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        if self.fails:
            return False
        inputs = {"noise": np.float32, "class_label": np.int64}
        images = run_session(
            self.session, *(self.memory(name, self.shapes[name], kind) for name, kind in inputs.items())
        )
        self.memory("images", images.shape, np.float32)[...] = images
        return True

    def memory(self, name, shape, kind):
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        buffer = (ctypes.c_byte * size).from_address(self.addresses[name])
        return np.frombuffer(buffer, dtype=kind).reshape(shape)


@pytest.fixture(scope="module")
def built(bundle, tmp_path_factory):
    """A bundle with an engine. Not to be changed."""
    directory = tmp_path_factory.mktemp("built") / "bundle"
    config = EngineConfig(flavour="tensorrt_rtx", targets=("89",), profile=PROFILE)
    build_engines(bundle, directory, config, None, lambda *phase: None)
    return directory


@pytest.fixture
def on_a_gpu(built, monkeypatch):
    """A bundle with an engine and a machine whose GPU is the CPU's memory: the bundle's directory, and the context."""
    directory = built
    content = (directory / read_manifest(directory).engines[0].file).read_bytes()
    context = Context(open_session(directory / "model.onnx", threads=1))

    class Runtime:
        def __init__(self, logger): ...

        def deserialize_cuda_engine(self, given):
            return SimpleNamespace(create_execution_context=lambda: context) if given == content else None

    library = SimpleNamespace(
        __version__=tensorrt_rtx.__version__,
        __spec__=tensorrt_rtx.__spec__,
        Logger=type("Logger", (), {"WARNING": 1, "__init__": lambda self, level: None}),
        Runtime=Runtime,
        ComputeCapability=tensorrt_rtx.ComputeCapability,
    )
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    empty = torch.empty

    def in_memory(*size, device=None, **options):
        """What is asked of the GPU is ours, and full of ones where nothing was written."""
        return empty(*size, **options).fill_(1) if device == "cuda" else empty(*size, device=device, **options)

    monkeypatch.setattr(torch, "empty", in_memory)
    return directory, context


def pixels(pipe, labels, **options):
    return np.stack([np.asarray(image) for image in pipe(labels, **options).images]).astype(int)


def test_an_engines_images_are_those_of_the_other_backends(on_a_gpu, bundle, capsys):
    """Eleven images in batches of four, the last one smaller than those before it."""
    directory, _ = on_a_gpu
    pipe = OneStepPipeline.from_pretrained(directory, backend="tensorrt")
    labels = [3, 7, 0, 1, 9, 2, 2, 8, 4, 5, 6]
    wanted = pixels(OneStepPipeline.from_pretrained(bundle), labels, seed=3)
    assert np.abs(pixels(pipe, labels, seed=3) - wanted).max() <= 1
    assert main(["engine", str(directory), "--verify"]) == 0
    assert "the engine against PyTorch, 16 images" in capsys.readouterr().out


def test_what_an_engine_cannot_do_is_an_error(on_a_gpu):
    directory, context = on_a_gpu
    pipe = OneStepPipeline.from_pretrained(directory, backend="tensorrt")
    (backend,) = pipe._loaded.values()
    with pytest.raises(ValueError, match=r"5: engines/tensorrt_rtx-sm89\.engine .* 1 to 4"):
        backend.draw(np.zeros((5, 16, 8), np.float32), np.zeros(5, np.int64))
    context.fails = True
    with pytest.raises(BundleError, match=r"engines/tensorrt_rtx-sm89\.engine: "):
        pipe([1])
    with pytest.raises(BundleError, match="backend tensorrt runs on cuda, not on 'cpu'"):
        pipe.to("cpu")


def test_an_engine_that_the_library_does_not_load_is_refused(on_a_gpu, monkeypatch):
    directory, _ = on_a_gpu
    monkeypatch.setattr(sys.modules["tensorrt_rtx"].Runtime, "deserialize_cuda_engine", lambda self, content: None)
    with pytest.raises(BundleError, match=r"tensorrt_rtx .* build it again"):
        OneStepPipeline.from_pretrained(directory, backend="tensorrt")
