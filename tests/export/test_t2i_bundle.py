"""A bundle whose model draws for captions: its graph, the pipeline by prompt, and the server."""

import io
import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from ddops import OneStepPipeline
from ddops.captions.pretrained import TextEncoder
from ddops.config.captions import DigitsPromptsConfig, EncodedCaptionsConfig, PromptSets, SeededEncoderConfig
from ddops.config.stages import ProfileConfig
from ddops.export.bundle import Sources, write_bundle
from ddops.export.errors import BundleError, ExportError
from ddops.export.manifest import read_manifest
from ddops.export.triton import write_model_repository
from ddops.models.conditions import Captions, pad_left
from ddops.models.llamagen_student import LlamaGenStudent
from ddops.models.llamagen_tokenizer import LlamaGenTokenizer
from ddops.models.weights import STUDENT, TOKENIZER, save_weights
from ddops.sampling.few_step import sample_student
from ddops.sampling.noise import Stream, normals
from ddops.stages import paths
from ddops.stages.captions import captions as captions_stage
from helpers.llamagen_helpers import SMALL_CAPTIONS, randomised
from helpers.tiny import tiny
from helpers.tiny_bundle import serving

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("t2i bundle")]

DIGITS = DigitsPromptsConfig(source="digits")
SETTINGS = EncodedCaptionsConfig(
    source="encode",
    sets=PromptSets(train=DIGITS, evaluate=DIGITS),
    encoder=SeededEncoderConfig(name="seeded", seed=3, width=6, layers=1, heads=2),
    length=5,
    dtype="float32",
    batch_size=32,
    shard_size=50,
)
PROMPT = "a bold handwritten seven, slanted left"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    directory = tmp_path_factory.mktemp("t2i")
    student, tokenizer = (
        randomised(LlamaGenStudent(SMALL_CAPTIONS)),
        randomised(LlamaGenTokenizer(SMALL_CAPTIONS), 0.15),
    )
    save_weights(directory / "student", student.state_dict(), SMALL_CAPTIONS, STUDENT)
    save_weights(directory / "tokenizer", tokenizer.state_dict(), SMALL_CAPTIONS, TOKENIZER)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        captions_stage(SETTINGS)
    return Sources(directory / "student", directory / "tokenizer", (0, 4), 9, directory / paths.CAPTIONS)


@pytest.fixture(scope="module")
def t2i_bundle(sources, tmp_path_factory):
    directory = tmp_path_factory.mktemp("bundle") / "bundle"
    write_bundle(directory, sources, replace(tiny().export, parity_count=8, steps=2), {"ddops.preset": "tiny"})
    return directory


def expected(sources, prompts, seed):
    """The student by itself on the encoder's own features."""
    student, tokenizer = (
        randomised(LlamaGenStudent(SMALL_CAPTIONS)),
        randomised(LlamaGenTokenizer(SMALL_CAPTIONS), 0.15),
    )
    captions = pad_left(TextEncoder(sources.captions / "encoder", 5)(prompts), 5)
    noise_BLC = normals(seed, Stream.SAMPLE_NOISE, np.arange(len(prompts)), (16, 8))
    with torch.no_grad():
        q_BLC = sample_student(student, tokenizer.codebook_VC, noise_BLC, captions, (0, 4), 9)
        images_BIHW = tokenizer.decode(q_BLC).clamp(-1, 1)
    return ((images_BIHW[:, 0] + 1) * 127.5).round().numpy()


def pixels(picture):
    return np.asarray(picture).astype(int)


def test_features_and_mask_are_inputs_of_the_graph(t2i_bundle):
    graph = onnx.load(t2i_bundle / "model.onnx").graph
    shapes = {
        value.name: [side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in graph.input
    }
    assert list(shapes.values()) == [["batch", 16, 8], ["batch", 5, 6], ["batch", 5]]
    assert list(shapes) == list(read_manifest(t2i_bundle).model.inputs) == ["noise", "caption_features", "caption_mask"]
    assert [value.type.tensor_type.elem_type for value in graph.input] == [1, 1, onnx.TensorProto.BOOL]


@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_a_prompt_is_drawn_as_the_student_draws_its_caption(t2i_bundle, sources, backend):
    prompts = [PROMPT, "a handwritten two", PROMPT]
    pipe = OneStepPipeline.from_pretrained(t2i_bundle, backend=backend)
    drawn = pipe(prompt=prompts, seed=5).images
    for image, wanted in zip(drawn, expected(sources, prompts, 5), strict=True):
        assert np.abs(pixels(image) - wanted).max() <= 1
    alone = pipe(prompt=PROMPT, seed=5).images[0]
    assert np.abs(pixels(alone) - pixels(drawn[0])).max() <= 1
    assert np.abs(pixels(drawn[1]) - expected(sources, [PROMPT, PROMPT], 5)[1]).max() > 5, "the prompt is not seen"


def test_what_the_padding_holds_does_not_matter(t2i_bundle):
    """The graph masks it, as PyTorch does."""
    pipe = OneStepPipeline(t2i_bundle)
    noise_BLC = normals(0, Stream.SAMPLE_NOISE, np.arange(2), (16, 8)).numpy()
    features_BTW, mask_BT = np.zeros((2, 5, 6), np.float32), np.zeros((2, 5), bool)
    mask_BT[:, 3:] = True
    features_BTW[:, 3:] = 0.5
    features_BTW[1, :3] = 9.0
    backend = pipe._load(2)
    # The student's head sees the mean of the caption's tokens, which leaves out the padding.
    first, second = (backend.draw(noise_BLC[:1], features_BTW[row : row + 1], mask_BT[:1]) for row in (0, 1))
    np.testing.assert_allclose(first, second, atol=1e-5)


def test_a_model_is_asked_for_what_it_draws(t2i_bundle, bundle):
    with pytest.raises(ValueError, match="draws for a prompt, and for no class_labels"):
        OneStepPipeline(t2i_bundle)(class_labels=[3])
    with pytest.raises(ValueError, match="draws for class_labels, and for no prompt"):
        OneStepPipeline(bundle)(prompt="a cat")


def test_the_bundle_says_which_encoder_and_holds_it(t2i_bundle, sources, tmp_path):
    facts = read_manifest(t2i_bundle)
    assert facts.model.captions.encoder.name == "seeded"
    assert {f"encoder/{name}" for name in facts.model.captions.encoder.files} <= set(facts.files)
    saved = tmp_path / "saved"
    OneStepPipeline(t2i_bundle).save_pretrained(saved)
    assert "for captions" in (saved / "README.md").read_text()
    weights = saved / "encoder" / "model.safetensors"
    damaged = weights.read_bytes()[:-1] + b"!"
    weights.unlink()  # a link to the bundle's own
    weights.write_bytes(damaged)
    with pytest.raises(BundleError, match=r"model\.safetensors: damaged or changed"):
        OneStepPipeline(saved)(prompt=PROMPT)
    copied = OneStepPipeline.from_pretrained(saved, text_encoder=sources.captions / "encoder")
    assert np.abs(pixels(copied(prompt=PROMPT, seed=1).images[0]) - expected(sources, [PROMPT], 1)[0]).max() <= 1


def test_a_student_of_captions_is_not_exported_without_them(sources, tmp_path):
    with pytest.raises(ExportError, match="needs what the stage captions wrote"):
        write_bundle(tmp_path, sources._replace(captions=None), tiny().export, {})


def test_tritons_configuration_names_the_inputs(t2i_bundle, tmp_path):
    OneStepPipeline(t2i_bundle).save_pretrained(tmp_path)
    write_model_repository(tmp_path, read_manifest(tmp_path), ProfileConfig(min=1, opt=2, max=4))
    graph = (tmp_path / "triton/onestep_onnx/config.pbtxt").read_text()
    assert '{ name: "caption_features" data_type: TYPE_FP32 dims: [ 5, 6 ] }' in graph
    assert '{ name: "caption_mask" data_type: TYPE_BOOL dims: [ 5 ] }' in graph
    assert json.loads((tmp_path / "triton/onestep_python/1/model.json").read_text())["condition"] == [
        *("caption_features", "caption_mask")
    ]


def test_the_server_draws_prompts_and_holds_its_limits(t2i_bundle, sources, tmp_path):
    with serving(t2i_bundle, tmp_path / "log", "--set", "max_prompt=60") as server, server.client() as client:

        def ask(**request):
            return client.post("/v1/images", json=request)

        answer = ask(prompt=PROMPT, seed=7)
        assert answer.status_code == 200, answer.text
        drawn = pixels(Image.open(io.BytesIO(answer.content)))
        assert np.abs(drawn - expected(sources, [PROMPT], 7)[0]).max() <= 1
        assert ask(prompt=PROMPT, seed=7, format="base64").json()["prompt"] == PROMPT
        refusals = {
            "for a prompt, and for no class": {"class": 3},
            "prompt: this model draws for a prompt": {"class": 3, "prompt": PROMPT},
            "60 characters at most": {"prompt": "a" * 61},
            "at least 1 character": {"prompt": ""},
            "unicode string": {"prompt": "\ud800"},
        }
        for message, request in refusals.items():
            # As bytes: the client would not write the surrogate.
            headers = {"content-type": "application/json"}
            refused = client.post("/v1/images", content=json.dumps(request).encode(), headers=headers)
            assert (refused.status_code, message in refused.json()["error"]) == (422, True), refused.text


def test_captions_are_flat_inputs():
    captions = pad_left([torch.ones(2, 3), torch.ones(4, 3)], 4)
    assert isinstance(captions, Captions)
    assert captions.mask_BT.tolist() == [[False, False, True, True], [True] * 4]
    assert captions.features_BTW.sum((1, 2)).tolist() == [6, 12]
