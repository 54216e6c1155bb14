"""The protocol ``t2i_30k``: which prompts, what is compared, the CLIP score, and what does not go together."""

from dataclasses import replace

import pytest
import torch
import transformers

from ddops.captions.conditions import Conditions
from ddops.captions.encode import PromptSet, encode_set
from ddops.captions.errors import CaptionError
from ddops.captions.pretrained import CLIP_MEAN, CLIP_STD, ImageTextModel, write_seeded_encoder
from ddops.captions.store import CaptionSet
from ddops.config.captions import PublishedEncoderConfig
from ddops.config.evaluation import LocalFile
from ddops.config.load import ConfigError, compose, validate
from ddops.evaluation.errors import MetricError
from ddops.evaluation.gate import comparable
from ddops.evaluation.judge import DigitsJudge
from ddops.evaluation.metrics import Reference, look
from ddops.evaluation.protocols import open_protocol
from ddops.evaluation.ruler import Asked, Ruler
from ddops.files import sha256_file
from ddops.hub.records import DownloadError
from ddops.models.classifier import DigitsClassifier
from ddops.stages.statistics import asked, reference_facts, statistics_file
from helpers.tiny import PARAMS
from helpers.tiny_captions import ENCODER, PROMPTS, settings

PRESET = "preset=llamagen_xl_t2i_256"


def config_of(*overrides):
    return validate(compose(PARAMS, [PRESET, *overrides]), "here")


@pytest.fixture(scope="module")
def clip_directory(tmp_path_factory):
    """A tiny CLIP model with random weights."""
    directory = tmp_path_factory.mktemp("clip")
    write_seeded_encoder(directory, ENCODER, PROMPTS)  # for its tokenizer
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": 40, "max_position_embeddings": 8, "eos_token_id": 1, "pad_token_id": 0}
    shape = transformers.CLIPConfig(
        text_config=text, vision_config={**small, "image_size": 16, "patch_size": 8}, projection_dim=12
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.CLIPModel(shape).save_pretrained(directory)
    return directory


def images(count, size=16):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def ruler_of(config, asked):
    """Judged by an untrained classifier, which sees grey; the reference is noise."""

    class GreyJudge(DigitsJudge):
        knows_classes = False

        def see(self, images_BIHW):
            return super().see(images_BIHW[:, :1, :8, :8])

    torch.manual_seed(0)
    judge = GreyJudge(DigitsClassifier(channels=32, feature_dim=8, dropout=0.0).eval())
    return Ruler(config.evaluate, judge, Reference(look(judge, [images(64)]).statistics, None, "sha"), asked)


# Which prompts


def test_every_prompt_is_asked_for_once_in_order(tmp_path, encoder):
    encode_set(tmp_path / "plain", PromptSet(PROMPTS), encoder, settings(), {})
    conditions = Conditions(5, CaptionSet(tmp_path / "plain"))
    protocol = open_protocol(config_of("evaluate.samples=4").evaluate)
    assert protocol.labels(0, conditions).tolist() == protocol.labels(7, conditions).tolist() == [0, 1, 2, 3]
    assert protocol.image_size == 256
    with pytest.raises(MetricError, match=r"6 prompts .*captions\.sets\.evaluate holds 5"):
        open_protocol(config_of("evaluate.samples=6").evaluate).labels(0, conditions)
    encode_set(tmp_path / "classed", PromptSet(PROMPTS, classes=[0, 1, 0, 2, 1]), encoder, settings(), {})
    with pytest.raises(MetricError, match="prompts without classes"):
        protocol.labels(0, Conditions(5, CaptionSet(tmp_path / "classed")))


# CLIP


def test_similarity_is_that_of_clips_own_logits(clip_directory):
    images_BIHW, prompts = images(3), PROMPTS[:3]
    found = ImageTextModel(clip_directory).similarity(images_BIHW, prompts)
    model = transformers.CLIPModel.from_pretrained(clip_directory)
    tokens = transformers.AutoTokenizer.from_pretrained(clip_directory)(
        prompts, padding=True, truncation=True, max_length=8, return_tensors="pt"
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    with torch.no_grad():
        output = model(
            pixel_values=(images_BIHW / 255 - mean) / std,
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
        )
    expected = output.logits_per_image.diagonal() / model.logit_scale.exp()
    torch.testing.assert_close(found.float(), expected.detach(), atol=1e-5, rtol=1e-5)
    larger = torch.nn.functional.interpolate(images_BIHW.float(), scale_factor=4, mode="nearest").to(torch.uint8)
    assert (ImageTextModel(clip_directory).similarity(larger, prompts) - found).abs().max() < 0.2


def test_clip_score_is_the_mean_over_images_and_their_prompts(clip_directory):
    config, prompts = config_of(), PROMPTS
    numbers = torch.tensor([4, 0, 2, 2, 1, 3] * 4)
    drawn = images(24)
    ruler = ruler_of(config, Asked(prompts, "prompts", clip_directory))
    figures = ruler.figures(drawn.split(5), numbers)
    cosines = ImageTextModel(clip_directory).similarity(drawn, [prompts[number] for number in numbers])
    assert figures["clip_score"] == pytest.approx(100 * float(cosines.clamp_min(0).mean()))
    without = ruler_of(config, Asked(prompts, "prompts")).figures(drawn.split(5), numbers)
    assert "clip_score" not in without
    assert without["fid"] == figures["fid"]


def test_a_directory_without_clip_is_refused(tmp_path):
    with pytest.raises(CaptionError, match="holds no CLIP model"):
        ImageTextModel(tmp_path)


# What the figures carry


def test_figures_of_other_prompts_or_another_clip_do_not_compare(clip_directory):
    config = config_of()
    facts = ruler_of(config, Asked(PROMPTS, "one", clip_directory)).facts()
    assert (facts["name"], facts["labels"], facts["prompts_sha256"]) == ("t2i_30k", "a prompt each", "one")
    assert comparable(facts, facts) == []
    assert comparable(facts, ruler_of(config, Asked(PROMPTS, "other", clip_directory)).facts()) == ["prompts_sha256"]
    assert comparable(facts, ruler_of(config, Asked(PROMPTS, "one")).facts()) == ["clip_sha256"]
    assert "name" in comparable(facts, facts | {"name": "dd_50k"})


def test_prompts_and_clip_are_found(tmp_path, encoder, clip_directory):
    encode_set(tmp_path, PromptSet(PROMPTS), encoder, settings(), {})
    files = ("config.json", "tokenizer.json", "model.safetensors")
    clip = PublishedEncoderConfig(name="clip", repo="o/clip", revision="main", files=files, path=str(clip_directory))
    evaluate = config_of().evaluate
    found = asked(replace(evaluate, clip=clip), tmp_path)
    assert (found.prompts, found.clip) == (PROMPTS, clip_directory)
    assert asked(evaluate, tmp_path).clip is None
    assert asked(validate(compose(PARAMS, ["preset=digits"]), "here").evaluate, tmp_path / "none") is None


def test_what_the_gate_asks_of_figures_is_what_they_state(tmp_path, encoder, clip_directory):
    config, statistics = config_of(), tmp_path / "statistics.npz"
    statistics.write_bytes(b"statistics")
    encode_set(tmp_path / "prompts", PromptSet(PROMPTS), encoder, settings(), {})
    files = ("model.safetensors",)
    clip = PublishedEncoderConfig(name="clip", repo="o/clip", revision="main", files=files, path=str(clip_directory))
    here = replace(config.evaluate, statistics=LocalFile(path=str(statistics)), clip=clip)
    config = replace(config, evaluate=here)
    stated = ruler_of(config, asked(here, tmp_path / "prompts")).facts() | {"reference_sha256": sha256_file(statistics)}
    facts = reference_facts(here, tmp_path / "prompts")
    assert facts.keys() == {"reference_sha256", "prompts_sha256", "clip_sha256"}
    assert facts == {name: stated[name] for name in facts}
    assert reference_facts(replace(here, clip=None), tmp_path / "prompts")["clip_sha256"] is None
    assert reference_facts(validate(compose(PARAMS, ["preset=digits"]), "here").evaluate, tmp_path) == {}


def test_the_file_of_statistics_is_yours_and_checked(tmp_path):
    path = tmp_path / "statistics.npz"
    config = config_of(f"evaluate.statistics.path={path}")
    with pytest.raises(DownloadError, match=r"statistics\.npz: .* evaluate\.statistics\.path"):
        statistics_file(config.evaluate)
    path.write_bytes(b"figures")
    assert statistics_file(config.evaluate) == path
    with pytest.raises(DownloadError, match=r"has sha256 [0-9a-f]{64}, evaluate.statistics says"):
        statistics_file(config_of(f"evaluate.statistics={{path: {path}, sha256: {'0' * 64}}}").evaluate)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate=dd_50k"], "evaluate.protocol: dd_50k asks by classes"),
        (["captions=none"], "captions.source: none, but the teacher draws for captions"),
        (["captions.length=60"], "captions.length: 60, but the teacher takes 120 tokens"),
        (["captions.encoder.name=clip"], "clip encodes no captions"),
        (["teacher=llamagen_l"], "captions.source: encode, but the teacher draws for classes"),
        (["teacher=llamagen_l", "captions=none"], "evaluate.protocol: t2i_30k asks by captions"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        config_of(*overrides)


def test_a_seeded_encoder_is_as_wide_as_the_teacher_takes():
    with pytest.raises(ConfigError, match=r"captions\.encoder\.width: 64, .*32"):
        validate(compose(PARAMS, ["preset=digits_t2i", "captions.encoder.width=64"]), "here")
