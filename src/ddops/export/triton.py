"""A Triton model repository in a bundle: the graph in ONNX Runtime, an engine, and from seed to pixels in Python."""

from __future__ import annotations

import shutil
from importlib.resources import as_file, files
from pathlib import Path
from typing import Final

from ddops.config.stages import ProfileConfig
from ddops.export.copying import place_file
from ddops.export.manifest import MODEL, EngineFacts, Input, Manifest, ModelFacts, model_digests
from ddops.files import atomic_path, sha256_file, write_json, write_text

REPOSITORY: Final = "triton"
ONNX_MODEL: Final = "onestep_onnx"
TENSORRT_MODEL: Final = "onestep_tensorrt"
PYTHON_MODEL: Final = "onestep_python"

MAX_QUEUE_DELAY_US: Final = 5000


def write_model_repository(directory: Path, manifest: Manifest, profile: ProfileConfig) -> dict[str, str]:
    """Write ``triton/`` into a bundle anew; the hashes of its files. What lay there before, another model's, is gone.

    The TensorRT variant is there if the bundle has an engine of the flavour ``tensorrt``: Triton runs no RTX engine.
    """
    root = directory / REPOSITORY
    if root.exists():
        shutil.rmtree(root)
    write_text(root / ONNX_MODEL / "config.pbtxt", onnx_config(manifest.model, profile))
    for name in model_digests(manifest):
        place_file(directory / name, root / ONNX_MODEL / "1" / name)
        place_file(directory / name, root / PYTHON_MODEL / "1" / name)
    if manifest.onnx.precision == "bfloat16":
        _write_for_cpu(directory / MODEL, root / PYTHON_MODEL / "1" / MODEL)
    write_text(root / PYTHON_MODEL / "config.pbtxt", python_config(manifest.model, profile))
    model = manifest.model
    facts = {
        "length": model.length,
        "code_dim": model.code_dim,
        "num_classes": model.num_classes,
        "condition": list(model.inputs)[1:],
    }
    write_json(root / PYTHON_MODEL / "1" / "model.json", facts)
    for package, source, name in (
        ("ddops.export", "triton_model.py", "model.py"),
        ("ddops.sampling", "noise.py", "ddops_noise.py"),
    ):
        with as_file(files(package) / source) as path:
            write_text(root / PYTHON_MODEL / "1" / name, path.read_text())
    for engine in manifest.engines:
        if engine.flavour == "tensorrt":
            write_text(root / TENSORRT_MODEL / "config.pbtxt", tensorrt_config(manifest.model, engine))
            place_file(directory / engine.file, root / TENSORRT_MODEL / "1" / "model.plan")
    written = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): sha256_file(path) for path in written}


def onnx_config(model: ModelFacts, profile: ProfileConfig) -> str:
    """``config.pbtxt`` of the graph in Triton's ONNX Runtime backend."""
    return _config(ONNX_MODEL, 'backend: "onnxruntime"', profile, _graph_inputs(model), _GRAPH_OUTPUT, model)


def tensorrt_config(model: ModelFacts, engine: EngineFacts) -> str:
    """``config.pbtxt`` of an engine."""
    return _config(
        TENSORRT_MODEL, 'platform: "tensorrt_plan"', engine.profile, _graph_inputs(model), _GRAPH_OUTPUT, model
    )


def python_config(model: ModelFacts, profile: ProfileConfig) -> str:
    """``config.pbtxt`` of the variant that takes a seed and gives pixels."""
    inputs = [_input("seed", Input((1,), "uint64")), _input("index", Input((1,), "int64"))]
    inputs += [_input(name, Input(shape or (1,), dtype)) for name, (shape, dtype) in list(model.inputs.items())[1:]]
    return _config(PYTHON_MODEL, 'backend: "python"', profile, inputs, _PIXELS_OUTPUT, model)


def _write_for_cpu(source: Path, target: Path) -> None:
    """The graph as a CPU can run it: the Python variant asks for no GPU. Weights beside it stay where they are."""
    import onnx

    from ddops.export.precision import widen_products

    model = onnx.load(source, load_external_data=False)
    widen_products(model)
    with atomic_path(target) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))


_TYPES: Final = {"float32": "TYPE_FP32", "int64": "TYPE_INT64", "uint64": "TYPE_UINT64", "bool": "TYPE_BOOL"}
_GRAPH_OUTPUT: Final = '{{ name: "images" data_type: TYPE_FP32 dims: [ {channels}, {size}, {size} ] }}'
_PIXELS_OUTPUT: Final = '{{ name: "pixels" data_type: TYPE_UINT8 dims: [ {size}, {size}, {channels} ] }}'


def _graph_inputs(model: ModelFacts) -> list[str]:
    return [_input(name, each) for name, each in model.inputs.items()]


def _input(name: str, each: Input) -> str:
    # The batch is Triton's own dimension; a label has no other, which its configuration cannot say but by a reshape.
    dims = ", ".join(map(str, each.shape or (1,)))
    reshape = "" if each.shape else " reshape: { shape: [ ] }"
    return f'{{ name: "{name}" data_type: {_TYPES[each.dtype]} dims: [ {dims} ]{reshape} }}'


def _config(name: str, kind: str, profile: ProfileConfig, inputs: list[str], output: str, model: ModelFacts) -> str:
    sizes = {"channels": model.image_channels, "size": model.image_size}
    return f"""name: "{name}"
{kind}
max_batch_size: {profile.max}
input [
  {f",{chr(10)}  ".join(inputs)}
]
output [
  {output.format(**sizes)}
]
dynamic_batching {{
  preferred_batch_size: [ {profile.opt} ]
  max_queue_delay_microseconds: {MAX_QUEUE_DELAY_US}
}}
"""
