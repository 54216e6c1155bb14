"""Prompts, their encoding by a small T5 made on the spot, and the prompt set on disk."""

import json
import subprocess
import sys
from dataclasses import replace

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from ddops.captions.conditions import Conditions, open_conditions
from ddops.captions.digits import NUMERALS, THICKNESS, describe, ink, slant
from ddops.captions.encode import PromptSet, encode_set, load_prompts
from ddops.captions.errors import CaptionError
from ddops.captions.pretrained import TextEncoder, write_seeded_encoder
from ddops.captions.prompts import read_prompts
from ddops.captions.store import CaptionSet
from ddops.config.captions import (
    PromptFileConfig,
    PromptSets,
    PublishedEncoderConfig,
)
from ddops.data import digits
from ddops.models.llamagen import LlamaGenTeacher
from ddops.models.llamagen_student import LlamaGenStudent
from ddops.stages import paths
from ddops.stages.captions import captions as captions_stage
from helpers.llamagen_helpers import SMALL, SMALL_CAPTIONS
from helpers.tiny import contents, write_tiny_params
from helpers.tiny_captions import ENCODER, PROMPTS, settings

LONG = "word " * 30


def read(path, limit=None):
    return read_prompts(path, "caption", max_characters=40, limit=limit)


# Files of prompts


def write_text(path):
    path.write_bytes(f"a  cat \r\n\n{LONG}\n".encode() + b"\xff\xfe broken\n" + "ein schöner Hund\n   \n".encode())


def write_csv(path):
    path.write_bytes(
        b"number,caption\n1,a  cat\n2,\n3," + LONG.encode() + b"\n4,\xff\xfe broken\n5,"
        b'"ein sch\xc3\xb6ner\nHund"\n6,"  "\n'
    )


def write_parquet(path):
    contents = [b"a  cat", None, LONG.encode(), b"\xff\xfe broken", "ein schöner Hund".encode(), b"  "]
    column = pa.array(contents, pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"number": range(6), "caption": column}), path)


@pytest.mark.parametrize("kind", ["txt", "csv", "parquet"])
def test_usable_prompts_are_read_and_the_others_counted_and_named(tmp_path, kind):
    path = tmp_path / f"prompts.{kind}"
    {"txt": write_text, "csv": write_csv, "parquet": write_parquet}[kind](path)
    found = read(path)
    assert found.texts == ["a cat", "ein schöner Hund"]
    assert {name: bad.rows for name, bad in found.bad.items()} == {"empty": [2, 6], "too long": [3], "not UTF-8": [4]}
    assert "2 rows are empty: 2, 6" in found.complaints()
    assert read(path, limit=1).texts == ["a cat"]


@pytest.mark.parametrize(("name", "content"), [("p.txt", "a cat\na dog\n"), ("p.csv", "caption,n\na cat,1\na dog,2\n")])
def test_a_byte_order_mark_is_no_part_of_the_prompts(tmp_path, name, content):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    found = read(tmp_path / name)
    assert found.texts == ["a cat", "a dog"]
    assert not found.bad


def test_many_bad_rows_are_all_counted_and_the_first_named(tmp_path):
    (tmp_path / "p.txt").write_text("\n" * 50 + "a cat\n")
    bad = read(tmp_path / "p.txt").bad["empty"]
    assert (bad.count, bad.rows) == (50, list(range(1, 21)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "no such file"),
        ("p.jsonl", b"{}", "are read from .txt, .csv, .parquet"),
        ("p.csv", b"text\na cat\n", "no column 'caption' but text"),
        ("p.parquet", b"PAR1 or not", "not readable as Parquet"),
        ("p.txt", b"\n\n", r"no usable prompt. 2 rows are empty: 1, 2"),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CaptionError, match=message):
        read(tmp_path / name)


def test_a_file_is_the_one_that_the_configuration_means(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a cat\n")
    config = PromptFileConfig(source="file", path=str(path), column="caption", max_characters=40)
    assert load_prompts(config).texts == ["a cat"]
    with pytest.raises(CaptionError, match=r"has sha256 [0-9a-f]{64}, captions.sets says 0000"):
        load_prompts(replace(config, sha256="0" * 64))


# The digits' captions


def test_captions_of_the_digits_say_what_is_there():
    data = digits.load()
    described = describe(data)
    assert described == describe(data)
    assert len(set(described.prompts)) == len(described.prompts) == len(described.classes)
    texts = [described.prompts[number] for number in described.of_images]
    for text, label in zip(texts, data.labels_N.tolist(), strict=True):
        assert f"handwritten {NUMERALS[label]}" in text
        assert described.classes[described.prompts.index(text)] == label
    assert "a bold handwritten seven, slanted left" in texts
    thin, bold = (torch.tensor([word in text for text in texts]) for word in THICKNESS[::2])
    left, right = (torch.tensor([side in text for text in texts]) for side in ("left", "right"))
    for label in range(10):
        here = data.labels_N == label
        ink_N, slant_N = ink(data.images_NIHW), slant(data.images_NIHW)
        assert ink_N[here & thin].max() < ink_N[here & ~thin].min()
        assert ink_N[here & bold].min() > ink_N[here & ~bold].max()
        assert slant_N[here & left].max() < slant_N[here & right].min()


def test_slant_of_a_drawn_line():
    """One pixel to the right for every row upwards is a slant of 1."""
    images = torch.full((3, 1, 8, 8), -1.0)
    for row in range(1, 7):
        images[0, 0, row, 7 - row] = 1
        images[1, 0, row, 3] = 1
        images[2, 0, row, row] = 1
    assert slant(images).tolist() == pytest.approx([1, 0, -1])
    assert ink(images).tolist() == pytest.approx([6 / 64] * 3)


# The encoder


def test_features_are_t5s_and_do_not_depend_on_the_batch(encoder, encoder_directory):
    import transformers

    together = encoder(PROMPTS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder_directory)
    model = transformers.T5EncoderModel.from_pretrained(encoder_directory)
    for prompt, features_nW in zip(PROMPTS, together, strict=True):
        tokens = tokenizer(prompt, max_length=5, truncation=True, return_tensors="pt").input_ids
        expected_nW = model(tokens).last_hidden_state[0].detach()
        torch.testing.assert_close(features_nW, expected_nW, atol=1e-5, rtol=1e-5)
    assert [len(features_nW) for features_nW in together] == [3, 5, 5, 4, 2]
    assert encoder.width == 6


def test_seeded_encoders_are_a_function_of_the_seed(encoder_directory, tmp_path):
    state = torch.random.get_rng_state()
    write_seeded_encoder(tmp_path / "same", ENCODER, PROMPTS)
    write_seeded_encoder(tmp_path / "other", replace(ENCODER, seed=4), PROMPTS)
    assert torch.equal(torch.random.get_rng_state(), state)
    for file in sorted(encoder_directory.iterdir()):
        assert file.read_bytes() == (tmp_path / "same" / file.name).read_bytes(), file.name
    weights = "model.safetensors"
    assert (tmp_path / "other" / weights).read_bytes() != (encoder_directory / weights).read_bytes()


def test_a_directory_without_an_encoder_is_refused(tmp_path):
    with pytest.raises(CaptionError, match="holds no T5 encoder"):
        TextEncoder(tmp_path, 5)


# The prompt set


def test_captions_are_padded_on_the_left_and_masked(tmp_path, encoder):
    encode_set(tmp_path, PromptSet(PROMPTS), encoder, settings(), {})
    captions, expected = CaptionSet(tmp_path), encoder(PROMPTS)
    numbers = [4, 1, 1, 0]
    features_BTW, mask_BT = captions.captions(torch.tensor(numbers))
    assert features_BTW.shape == (4, 5, 6)
    for row, number in enumerate(numbers):
        length = len(expected[number])
        assert mask_BT[row].tolist() == [False] * (5 - length) + [True] * length
        torch.testing.assert_close(features_BTW[row, 5 - length :], expected[number])
        assert not features_BTW[row, : 5 - length].any()
    assert captions.prompts == PROMPTS
    assert sorted(path.name for path in tmp_path.glob("shard*")) == [
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    ]


def test_half_precision_is_stored_in_half_the_bytes(tmp_path, encoder):
    for dtype in ("float32", "bfloat16"):
        encode_set(tmp_path / dtype, PromptSet(PROMPTS), encoder, settings(dtype=dtype), {})
    full, half = (CaptionSet(tmp_path / dtype).captions(torch.arange(5)) for dtype in ("float32", "bfloat16"))
    assert torch.equal(half.features_BTW, full.features_BTW.bfloat16().float())
    assert half.features_BTW.dtype == torch.float32


def test_encoding_goes_on_after_a_kill(tmp_path, encoder):
    """The bytes are those of a run that was not killed, and whole shards are not made again."""
    encode_set(tmp_path / "whole", PromptSet(PROMPTS), encoder, settings(), {})
    calls = []

    def dies(prompts):
        calls.append(list(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encoder(prompts)

    with pytest.raises(KeyboardInterrupt):
        encode_set(tmp_path / "killed", PromptSet(PROMPTS), dies, settings(), {})
    assert not (tmp_path / "killed" / "manifest.json").exists()
    with pytest.raises(CaptionError, match="run the stage captions"):
        CaptionSet(tmp_path / "killed")
    assert encode_set(tmp_path / "killed", PromptSet(PROMPTS), encoder, settings(), {}) == 2
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("change", ["settings", "encoder", "prompts"])
def test_shards_of_other_settings_are_made_again(tmp_path, encoder, change):
    encode_set(tmp_path, PromptSet(PROMPTS), encoder, settings(), {"files": 1})
    assert encode_set(tmp_path, PromptSet(PROMPTS), encoder, settings(), {"files": 1}) == 0
    prompts = [*PROMPTS[:4], "dog"] if change == "prompts" else PROMPTS
    config = settings(dtype="bfloat16") if change == "settings" else settings()
    assert encode_set(tmp_path, PromptSet(prompts), encoder, config, {"files": 2 if change == "encoder" else 1}) == 5


@pytest.mark.parametrize("damage", ["alter", "cut", "misplace"])
def test_a_damaged_shard_is_made_again_and_no_other(tmp_path, encoder, damage):
    encode_set(tmp_path, PromptSet(PROMPTS), encoder, settings(), {})
    whole = contents(tmp_path)
    first, second = sorted(tmp_path.glob("shard*"))
    content = second.read_bytes()
    altered = {"alter": content[:-1] + bytes([content[-1] ^ 1]), "cut": content[:-1], "misplace": first.read_bytes()}
    second.write_bytes(altered[damage])
    assert encode_set(tmp_path, PromptSet(PROMPTS), encoder, settings(), {}) == 2
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("file", ["shard-00001.safetensors", "prompts.txt"])
@pytest.mark.parametrize("damage", ["alter", "remove"])
def test_an_altered_prompt_set_is_refused(tmp_path, encoder, file, damage):
    encode_set(tmp_path, PromptSet(PROMPTS), encoder, settings(), {})
    path = tmp_path / file
    path.unlink() if damage == "remove" else path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(CaptionError, match=rf"{file}: missing or altered"):
        CaptionSet(tmp_path)


def test_a_model_of_classes_reads_no_prompt_set(tmp_path):
    conditions = open_conditions(tmp_path / "none", LlamaGenTeacher(SMALL))
    labels = torch.tensor([3, 0])
    assert conditions.count == 4
    assert torch.equal(conditions.of_images(labels), labels)
    assert conditions.classes_K.tolist() == [0, 1, 2, 3]
    assert conditions.files == []


def test_a_model_of_captions_is_given_its_prompt_set(tmp_path, encoder):
    prompts = PromptSet(PROMPTS, classes=[0, 1, 0, 2, 1], of_images=[4, 0, 3])
    encode_set(tmp_path, prompts, encoder, settings(), {})
    teacher, student = LlamaGenTeacher(SMALL_CAPTIONS), LlamaGenStudent(SMALL_CAPTIONS)
    conditions = open_conditions(tmp_path, teacher, student)
    assert conditions.count == teacher.num_conditions == student.num_conditions == 5
    assert conditions.of_images(torch.zeros(3)).tolist() == [4, 0, 3]
    assert conditions.examples(torch.arange(3)).tolist() == [0, 1, 3]
    assert conditions.files == [tmp_path / "manifest.json"]
    with pytest.raises(CaptionError, match="not those of these 2 images"):
        conditions.of_images(torch.zeros(2))
    with pytest.raises(CaptionError, match="no such prompt set"):
        open_conditions(tmp_path / "none", teacher)
    encode_set(tmp_path, prompts, encoder, settings(length=4), {})
    with pytest.raises(CaptionError, match="encode the prompts for this model"):
        open_conditions(tmp_path, teacher)


def test_captions_without_classes_are_a_class_each(tmp_path, encoder):
    encode_set(tmp_path, PromptSet(PROMPTS), encoder, settings(), {})
    assert Conditions(5, CaptionSet(tmp_path)).classes_K.tolist() == [0, 1, 2, 3, 4]


# The stage


def test_the_stage_encodes_both_sets_and_says_what_encoded_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    captions_stage(settings(length=8))
    before = contents(paths.CAPTIONS)
    train, evaluate = CaptionSet(paths.TRAIN_CAPTIONS), CaptionSet(paths.EVALUATE_CAPTIONS)
    assert train.prompts == evaluate.prompts == describe(digits.load()).prompts
    facts = json.loads((paths.TEXT_ENCODER / "encoder.json").read_text())
    assert (facts["encoder"]["name"], facts["length"], facts["width"]) == ("seeded", 8, 6)
    assert set(facts["encoder"]["files"]) == {path.name for path in paths.TEXT_ENCODER.iterdir()} - {"encoder.json"}
    captions_stage(settings(length=8))
    assert contents(paths.CAPTIONS) == before


def test_the_stage_takes_a_published_encoder_from_a_directory(tmp_path, monkeypatch, encoder_directory):
    monkeypatch.chdir(tmp_path)
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat\na dog\n\n")
    source = PromptFileConfig(source="file", path=str(prompts), column="", max_characters=40)
    published = PublishedEncoderConfig(
        name="t5",
        repo="owner/t5",
        revision="main",
        files=("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"),
        path=str(encoder_directory),
    )
    captions_stage(settings(sets=PromptSets(train=source, evaluate=source), encoder=published))
    manifest = json.loads((paths.TRAIN_CAPTIONS / "manifest.json").read_text())
    assert manifest["bad_rows"] == {"empty": {"count": 1, "first": [3]}}
    assert set(manifest["settings"]["encoder"]["files"]) == set(published.files)
    features = CaptionSet(paths.TRAIN_CAPTIONS).captions(torch.tensor([1])).features_BTW
    torch.testing.assert_close(features[0, 2:], TextEncoder(encoder_directory, 5)(["a dog"])[0])


def test_a_preset_of_classes_does_not_wait_for_torch(tmp_path, monkeypatch):
    """And what another preset's captions left is gone."""
    monkeypatch.chdir(tmp_path)
    write_tiny_params(tmp_path)
    (tmp_path / "data/captions/train").mkdir(parents=True)
    code = (
        "import sys, runpy; runpy.run_module('ddops.stages.captions', run_name='__main__');"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert list(contents(paths.CAPTIONS)) == ["origin.json"]
