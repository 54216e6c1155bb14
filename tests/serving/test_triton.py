"""The bundle's Triton model repository: every configuration is one by Triton's own definition, and the Python variant
is loaded and asked for images in a real Triton server.

The server comes with the wheel nvidia-pytriton, in an environment of its own (it needs numpy<2):
`make .venv-triton/.ready`, which `make test` does.
"""

import json
import os
import re
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from ddops import OneStepPipeline
from ddops.config.stages import EngineConfig, ProfileConfig
from ddops.export.copying import copy_bundle
from ddops.export.engines import build_engines
from ddops.export.manifest import EngineFacts, read_manifest, verify_files
from ddops.export.triton import onnx_config, python_config, tensorrt_config, write_model_repository
from helpers.tiny_bundle import free_port

PYTHON = Path(os.environ.get("DDOPS_TRITON_PYTHON", Path(__file__).parents[2] / ".venv-triton/bin/python"))
needs_triton = pytest.mark.skipif(not PYTHON.exists(), reason="no Triton here: make .venv-triton/.ready")
PROFILE = ProfileConfig(min=1, opt=4, max=8)

PARSE = """
import json, sys
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2
for name, text in json.load(sys.stdin).items():
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    print(json.dumps([name, json_format.MessageToDict(config)]))
"""
ASK = """
import json, pathlib, shutil, subprocess, sys, sysconfig, time
import numpy as np
import tritonclient.http as http
server, repository, port, log = sys.argv[1:5]
# The wheel keeps the backend's process, one for each version of Python, apart from the backend.
backends = pathlib.Path(log).parent / "backends"
shutil.copytree(server + "/backends", backends)
stub = f"{server}/python_backend_stubs/3.{sys.version_info.minor}/triton_python_backend_stub"
(backends / "python" / "triton_python_backend_stub").symlink_to(stub)  # a link: it finds its libraries from where it is
command = [server + "/bin/tritonserver", f"--model-repository={repository}", f"--backend-directory={backends}",
           f"--http-port={port}", "--http-address=127.0.0.1", "--allow-grpc=false", "--allow-metrics=false",
           "--model-control-mode=explicit", "--load-model=onestep_python"]
# Its models run in a Python that ignores this environment and PYTHONPATH but looks into the working directory first.
with open(log, "w") as stream:
    process = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=sysconfig.get_path("purelib"))
try:
    client = http.InferenceServerClient(f"127.0.0.1:{port}", concurrency=8, network_timeout=120)
    deadline = time.monotonic() + 150
    while True:
        try:
            if client.is_model_ready("onestep_python"):
                break
        except Exception:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(open(log).read()[-4000:])
        time.sleep(0.2)
    def tensor(name, values, kind):
        array = np.array(values)[:, None]
        one = http.InferInput(name, array.shape, kind)
        one.set_data_from_numpy(array)
        return one
    def ask(s, i, l):
        return client.async_infer("onestep_python", [tensor("seed", np.array(s, np.uint64), "UINT64"),
            tensor("index", np.array(i, np.int64), "INT64"), tensor("class_label", np.array(l, np.int64), "INT64")],
            outputs=[http.InferRequestedOutput("pixels", binary_data=False)])
    def refusal(waiting):
        try:
            return waiting.get_result().as_numpy("pixels").tolist()
        except Exception as error:
            return str(error)
    requests = [([seed] * 2, [0, 1], [seed % 10] * 2) for seed in range(6)]
    impossible = [ask([0], [0], [10]), ask([0, 1], [0, 0], [3, -1]), ask([0], [-1], [3])]
    waiting = [ask(*one) for one in requests]
    refusals = [refusal(one) for one in impossible]
    pixels = [one.get_result().as_numpy("pixels").tolist() for one in waiting]
    # A request is counted after it was answered.
    deadline = time.monotonic() + 30
    while True:
        stats = client.get_inference_statistics("onestep_python")["model_stats"][0]
        if stats["inference_count"] >= 16 or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    print(json.dumps({"pixels": pixels, "refusals": refusals, "inferences": stats["inference_count"]}))
finally:
    process.terminate()
    process.wait()
"""


@pytest.fixture(scope="module")
def repository(bundle, tmp_path_factory):
    directory = tmp_path_factory.mktemp("triton") / "bundle"
    config = EngineConfig(flavour="tensorrt_rtx", targets=(), profile=PROFILE)
    build_engines(bundle, directory, config, None, lambda *phase: None)
    return directory


def in_triton(code, *arguments, **options):
    """Run code with the interpreter that has Triton."""
    libraries = {"LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR")}
    environment = {**os.environ, **libraries, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [str(PYTHON), "-c", code, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, **options)
    assert result.returncode == 0, result.stderr + result.stdout
    return result.stdout


def test_the_repository_is_part_of_the_bundle(repository):
    manifest = read_manifest(repository)
    verify_files(repository, manifest.files)
    names = {name for name in manifest.files if name.startswith("triton/")}
    python = "triton/onestep_python"
    assert names >= {"triton/onestep_onnx/config.pbtxt", "triton/onestep_onnx/1/model.onnx", f"{python}/config.pbtxt"}
    assert names >= {f"{python}/1/{name}" for name in ("model.py", "ddops_noise.py", "model.onnx", "model.json")}


def test_nothing_of_an_earlier_model_stays_in_the_repository(bundle, tmp_path):
    """Such as its plan, which Triton would go on serving, with a hash that the new manifest vouches for."""
    copy_bundle(bundle, tmp_path / "b", read_manifest(bundle))
    plan = tmp_path / "b/triton/onestep_tensorrt/1/model.plan"
    plan.parent.mkdir(parents=True)
    plan.write_bytes(b"another model's")
    files = write_model_repository(tmp_path / "b", read_manifest(bundle), PROFILE)
    assert not plan.exists()
    assert not [name for name in files if "tensorrt" in name]


@pytest.mark.rare
@needs_triton
def test_every_configuration_is_one_by_tritons_definition(bundle):
    manifest = read_manifest(bundle)
    engine = EngineFacts(
        file="engines/x", sha256="0" * 64, flavour="tensorrt", version="11.0", target="89", precision="float16",
        profile=PROFILE, onnx_sha256="0" * 64,
    )  # fmt: skip
    texts = {
        "onnx": onnx_config(manifest.model, PROFILE),
        "tensorrt": tensorrt_config(manifest.model, engine),
        "python": python_config(manifest.model, PROFILE),
    }
    lines = in_triton(PARSE, input=json.dumps(texts)).splitlines()
    configs = dict(json.loads(line) for line in lines)
    assert set(configs) == set(texts)
    for config in configs.values():
        assert config["maxBatchSize"] == 8
        assert config["dynamicBatching"]["preferredBatchSize"] == [4]
    assert configs["onnx"]["backend"] == "onnxruntime"
    assert configs["tensorrt"]["platform"] == "tensorrt_plan"
    for name in ("onnx", "tensorrt"):
        noise, label = configs[name]["input"]
        assert (noise["name"], noise["dims"], noise["dataType"]) == ("noise", ["16", "8"], "TYPE_FP32")
        assert (label["name"], label["dataType"], label["reshape"]) == ("class_label", "TYPE_INT64", {})
        assert configs[name]["output"][0]["dims"] == ["1", "8", "8"]


@pytest.mark.rare
@needs_triton
def test_a_real_server_draws_the_images_of_the_seeds(repository, tmp_path):
    package = in_triton("import pytriton, pathlib; print(pathlib.Path(pytriton.__file__).parent)").strip()
    log = tmp_path / "log"
    answer = json.loads(in_triton(ASK, f"{package}/tritonserver", repository / "triton", free_port(), log))
    pipe = OneStepPipeline(repository)
    for seed, pixels in enumerate(answer["pixels"]):
        wanted = np.stack([np.asarray(image) for image in pipe([seed % 10] * 2, seed=seed).images]).astype(int)
        assert np.abs(np.array(pixels)[..., 0] - wanted).max() <= 1
    assert answer["inferences"] == 12 + 4  # Triton counts what was refused, too
    for refusal, reason in zip(answer["refusals"], ("0..9, got [10]", "0..9, got [3, -1]", "index is 0"), strict=True):
        assert reason in refusal
    assert not re.search(r"\berror\b", log.read_text().partition("Started HTTPService")[2], re.IGNORECASE)
