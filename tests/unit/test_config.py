"""The configuration: every preset is valid, params.yaml is up to date, and a mistake is named with its cure."""

import copy
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dvc.utils.hydra import compose_and_dump

from ddops.cli import main
from ddops.config.load import ConfigError, compose, group_files, load_config, validate, write_params
from helpers.tiny import write_recipes

ROOT = Path(__file__).parents[2]
PARAMS = ROOT / "params"
PRESETS = sorted(group_files(PARAMS, "preset"))


SIZES = ["teacher.model.width=96", "teacher.model.heads=4", "teacher.model.codebook_size=64", "dd1.logit_prefix=16"]


@pytest.fixture(scope="module")
def composed():
    """The values of preset digits, to be copied and spoilt; the sizes that messages quote are pinned."""
    return compose(PARAMS, ["preset=digits", "ar_diffusion=digits", *SIZES, "dd1.start_positions=[0,5]"])


def at(values, dotted):
    """The mapping that holds the last key of a dotted path, and that key."""
    *parents, key = dotted.split(".")
    for parent in parents:
        values = values[parent]
    return values, key


def spoilt(values, dotted, value):
    result = copy.deepcopy(values)
    section, key = at(result, dotted)
    section[key] = value
    return result


def refusal(values):
    with pytest.raises(ConfigError) as error:
        validate(values, "here.yaml")
    return str(error.value)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_composes_and_validates(preset, tmp_path):
    values = compose(PARAMS, [f"preset={preset}"])
    assert values["preset"] == preset
    # What `ddops compose` writes reads back as the same configuration: tuples, floats such as 1e-5 and all.
    write_params(values, tmp_path / "params.yaml")
    assert load_config(tmp_path / "params.yaml") == validate(values, "composed")


def test_the_presets_that_the_readme_names_are_there():
    assert {"digits", "digits_var", "smoke"} <= set(PRESETS)
    assert compose(PARAMS)["preset"] == "digits"
    assert compose(PARAMS, ["preset=digits_var"])["teacher"]["model"]["family"] == "var"


def test_committed_params_yaml_is_what_params_composes_to():
    """`dvc repro` reads params.yaml and never composes; without this test an edit of params/ would have no effect."""
    committed = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert committed == compose(PARAMS), "params.yaml is stale: run `ddops compose` and commit it"


@pytest.mark.parametrize("overrides", [[], ["preset=smoke"], ["preset=digits_var", "dd1.training.steps=123"]])
def test_dvcs_own_composer_writes_the_same_values(overrides, tmp_path):
    """`dvc exp run -S preset=...` composes by itself; it must give what `ddops compose preset=...` gives."""
    compose_and_dump(tmp_path / "params.yaml", str(PARAMS), None, "config", str(ROOT / ".dvc"), overrides)
    assert load_config(tmp_path / "params.yaml") == validate(compose(PARAMS, overrides), "composed")
    assert yaml.safe_load((tmp_path / "params.yaml").read_text()) == compose(PARAMS, overrides)


def test_composing_again_writes_the_same_bytes(tmp_path):
    for name in ("a.yaml", "b.yaml"):
        write_params(compose(PARAMS, ["preset=digits"]), tmp_path / name)
    assert (tmp_path / "a.yaml").read_bytes() == (tmp_path / "b.yaml").read_bytes()


@pytest.mark.parametrize("prefix", ["", "+", "++"])
@pytest.mark.parametrize(
    ("override", "key", "suggestion", "choice"),
    [
        ("dd1.trainng.steps=3", "dd1.trainng", "training", "start_positions"),
        ("dd1.training.step=3", "dd1.training.step", "steps", "batch_size"),
        ("teacher.model.gridd=4", "teacher.model.gridd", "grid", "codebook_size"),
        ("tracher.source=train", "tracher", "teacher", "trajectories"),
    ],
)
def test_an_override_of_an_unknown_key_says_what_was_meant(prefix, override, key, suggestion, choice):
    """Hydra alone would say "To append to your config use +", which leads the user from one error into the next."""
    override = prefix + override
    with pytest.raises(ConfigError) as error:
        compose(PARAMS, [override])
    message = str(error.value)
    assert message.startswith(f"{PARAMS} {override}: ")
    assert re.search(rf"{re.escape(key)}: .*'{suggestion}'\? valid: ", message)
    assert choice in message.partition("valid: ")[2]


def test_a_new_key_that_would_be_valid_is_to_be_added():
    """A further gate rule is legitimate, and is added with a plus, or two."""
    rule = "gate.rules.mine={value: teacher.fid, max: 9}"
    with pytest.raises(ConfigError, match=r"gate\.rules\.mine=.* put \+\+ before the override"):
        compose(PARAMS, [rule])
    for plus in ("+", "++"):
        assert compose(PARAMS, [f"{plus}{rule}"])["gate"]["rules"]["mine"] == {"value": "teacher.fid", "max": 9}


@pytest.mark.parametrize(
    ("group", "wrong", "right"), [("preset", "digitz", "digits"), ("dd1", "digits_va", "digits_var")]
)
def test_an_unknown_choice_of_a_group_lists_the_known_ones(group, wrong, right):
    with pytest.raises(ConfigError) as error:
        compose(PARAMS, [f"{group}={wrong}"])
    known = ", ".join(sorted(group_files(PARAMS, group)))
    assert str(error.value) == (f"params/{group}: no {group} named {wrong!r}; did you mean {right!r}? valid: {known}")


@pytest.mark.parametrize("override", ["=3", "preset", "dd1.start_positions=[0,", "~dd1.nothing"])
def test_an_override_that_makes_no_sense_is_an_explained_error(override):
    with pytest.raises(ConfigError, match=r"params|not an override"):
        compose(PARAMS, [override])


def test_a_directory_without_groups_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no config\.yaml"):
        compose(tmp_path)


WRONG_VALUES = [
    ("dd1.training.steps", "4000", "dd1.training.steps: Input should be a valid integer, got '4000'"),
    ("dd1.training.steps", 10.5, "dd1.training.steps: "),
    ("dd1.training.steps", True, "dd1.training.steps: Input should be a valid integer, got True"),
    ("dd1.training.steps", 0, "dd1.training.steps: Input should be greater than 0, got 0"),
    ("dd1.training", 3, "dd1.training: Input should be an object, got 3"),
    ("dd1.training.learning_rate", -1e-3, "dd1.training.learning_rate: Input should be greater than 0, got -0.001"),
    ("dd1.training.final_learning_rate", 1.0, "final_learning_rate must not exceed learning_rate"),
    ("dd1.training.warmup_steps", 10**6, "dd1.training.warmup_steps 1000000 exceed steps"),
    ("dd1.training.betas", [0.9, 1.0], "dd1.training.betas.1: Input should be less than 1, got 1.0"),
    ("sampling.guidance", math.nan, "sampling.guidance: Input should be a finite number, got nan"),
    ("sampling.guidance", math.inf, "sampling.guidance: Input should be a finite number, got inf"),
    ("sampling.guidance", -0.5, "sampling.guidance: Input should be greater than or equal to 0"),
    ("sampling.top_k", 65, "sampling.top_k: 65 exceeds the codebook's 64 codes"),
    ("sampling.top_p", 0.0, "sampling.top_p: Input should be greater than 0"),
    ("teacher.label_dropout", 1.5, "teacher.label_dropout: Input should be less than or equal to 1, got 1.5"),
    ("teacher.model.image_size", 9, "teacher.model.image_size 9 is not the latent's side 4 times the downsampling 2"),
    ("teacher.model.heads", 5, "teacher.model.width 96 must be a multiple of heads 5 x 4"),
    ("teacher.model.autoencoder.channels", 33, "teacher.model.autoencoder.channels must be a multiple of 32"),
    (
        "trajectories.solver",
        "rk4",
        "trajectories.solver: Input should be 'adaptive', 'multistep', 'heun' or 'euler', got 'rk4'",
    ),
    ("dd1.perceptual.network", "lpips", "Input should be 'digits_classifier' or 'lpips_vgg', got 'lpips'"),
    ("dd1.start_positions", [0, 16], "dd1.start_positions: 16 is past the end, the teacher has 16 tokens"),
    ("dd1.perceptual.batch_size", 7, "dd1.perceptual.batch_size 7 is not a multiple of the 2 processes"),
    ("dd1.evaluate_count", 1, "dd1.evaluate_count 1 is less than the 2 processes that share it"),
    ("ar_diffusion.evaluate_count", 1, "ar_diffusion.evaluate_count 1 is less than the 2 processes that share it"),
    ("dd2.evaluate_count", 1, "dd2.evaluate_count 1 is less than the 2 processes that share it"),
    ("dd1.start_positions", [1, 5], "dd1.start_positions must begin with 0 and increase strictly, got (1, 5)"),
    ("dd1.start_positions", [0, 5, 5], "dd1.start_positions must begin with 0 and increase strictly, got (0, 5, 5)"),
    ("dd1.start_positions", [], "dd1.start_positions: Tuple should have at least 1 item"),
    ("dd1.logit_prefix", 17, "dd1.logit_prefix: 17 exceeds the teacher's 16 tokens"),
    ("export.steps", 3, "export.steps: 3 steps need as many dd1.start_positions"),
    ("export.opset", 23, "export.opset: Input should be 18 or 20, got 23"),
    ("gate.rules", {"mine": {"value": "teacher.fid"}}, "gate.rules.mine: the rule on teacher.fid needs a max or a min"),
    ("seed", -1, "seed: Input should be greater than or equal to 0, got -1"),
    ("seed", 2**63, "seed: Input should be less than 9223372036854775808"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG_VALUES)
def test_a_wrong_or_impossible_value_is_refused_with_file_and_key(composed, key, value, message):
    refused = refusal(spoilt(composed, key, value))
    assert refused.startswith("here.yaml: ")
    assert message in refused


def test_start_positions_of_var_are_counted_in_levels():
    values = compose(PARAMS, ["preset=digits_var"])
    levels = len(values["teacher"]["model"]["patch_sizes"])
    refused = refusal(spoilt(values, "dd1.start_positions", [0, levels]))
    assert re.search(rf"dd1\.start_positions: {levels}.* {levels} levels", refused)


@pytest.mark.parametrize("key", ["features", "dd1", "seed", "dd1.training.steps", "sampling.guidance"])
def test_a_missing_section_or_key_is_named(composed, key):
    values = copy.deepcopy(composed)
    section, name = at(values, key)
    del section[name]
    assert refusal(values) == f"here.yaml: {key}: missing"


@pytest.mark.parametrize(
    ("wrong", "suggestion"), [("dd1.training.stpes", "steps"), ("dd3", "dd2"), ("teacher.model.codbook_size", "codeb")]
)
def test_a_misspelt_key_in_a_file_is_named_with_the_valid_ones(composed, wrong, suggestion):
    message = refusal(spoilt(composed, wrong, 1))
    assert message.startswith(f"here.yaml: {wrong}: unknown key; did you mean '{suggestion}")
    assert "valid: " in message


def test_a_misspelt_key_of_a_gate_rule_lists_the_rules_keys(composed):
    rules = {"mine": {"value": "teacher.fid", "maxx": 1.0}}
    expected = "gate.rules.mine.maxx: unknown key; did you mean 'max'? valid: value, relative_to, max, min"
    assert refusal(spoilt(composed, "gate.rules", rules)) == f"here.yaml: {expected}"


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("varr", "no family named 'varr'; did you mean 'var'? valid: llamagen, var"),
        ("maskgit", "no family named 'maskgit'; valid: llamagen, var"),
    ],
)
def test_an_unknown_family_lists_the_families(composed, family, message):
    assert refusal(spoilt(composed, "teacher.model.family", family)) == f"here.yaml: teacher.model.family: {message}"


def test_a_model_without_family_asks_for_one(composed):
    values = copy.deepcopy(composed)
    del values["teacher"]["model"]["family"]
    assert refusal(values) == "here.yaml: teacher.model.family: missing; valid: llamagen, var"


def test_the_valid_keys_of_a_model_are_those_of_its_family(composed):
    """A key of the other family is unknown here, and is not offered."""
    valid = refusal(spoilt(composed, "teacher.model.patch_sizes", [1, 2])).partition("valid: ")[2]
    assert "ffn_hidden" in valid
    assert "patch_sizes" not in valid


def test_every_problem_is_reported_at_once_one_a_line(composed):
    message = refusal(spoilt(spoilt(composed, "dd1.training.steps", "x"), "export.opset", 1))
    assert len(message.splitlines()) == 2
    assert all(line.startswith("here.yaml: ") for line in message.splitlines())


def test_a_gate_rule_may_be_called_like_a_family(composed):
    rules = {"var": {"value": "teacher.fid", "max": "low"}}
    assert refusal(spoilt(composed, "gate.rules", rules)).startswith("here.yaml: gate.rules.var.max: ")


def test_a_missing_file_says_how_to_write_it(tmp_path):
    with pytest.raises(ConfigError, match=r"params\.yaml.* ddops compose"):
        load_config(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    "content",
    [b"a: [1, 2", b"\xff\xfe\x00\x01 not text", b"a: 1\na: 2\n"],
    ids=["cut short", "binary", "a key twice"],
)
def test_a_file_that_is_not_yaml_is_named(tmp_path, content):
    (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"params\.yaml: not readable as YAML"):
        load_config(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [("- 1\n- 2\n", "expected a mapping of sections"), ("", "dd1: missing"), ("just words", "words: unknown key")],
)
def test_a_file_without_sections_is_refused(tmp_path, content, message):
    (tmp_path / "params.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "params.yaml")


def test_the_command_composes_and_checks(tmp_path, capsys):
    output = tmp_path / "params.yaml"
    arguments = ["compose", "preset=smoke", "seed=5", "--params", str(PARAMS), "--output", str(output)]
    assert main(arguments) == 0
    assert load_config(output).seed == 5
    assert main(["check", str(output)]) == 0
    assert "preset smoke, valid" in capsys.readouterr().out


def test_the_command_explains_an_error_and_leaves_the_file_as_it_was(tmp_path, capsys):
    output = tmp_path / "params.yaml"
    output.write_text("what was there\n")
    assert main(["compose", "preset=smok", "--params", str(PARAMS), "--output", str(output)]) == 1
    assert "did you mean 'smoke'?" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["params.yaml"]
    assert output.read_text() == "what was there\n"


def test_a_stage_refuses_a_bad_file_in_plain_words_before_it_does_anything(tmp_path):
    """No traceback, exit code 1, nothing written: the promise of every stage's command line."""
    values = spoilt(compose(PARAMS, ["preset=smoke"]), "features.training.stepz", 1)
    write_params(values, tmp_path / "params.yaml")
    write_recipes(tmp_path)
    command = [sys.executable, "-m", "ddops.stages.features"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert re.search(r"features: params\.yaml: features\.training\.stepz: .*'steps'", result.stderr)
    assert "Traceback" not in result.stderr
    assert {file.name for file in tmp_path.iterdir()} == {"params.yaml", "recipes.yaml"}


def test_prompts_of_ones_own_in_place_of_the_digits_are_added_with_two_pluses():
    """The options of the two kinds of prompts have different keys."""
    prompts = "{source: file, path: p.csv, column: caption, max_characters: 60, limit: null, sha256: null}"
    both = [f"captions.sets.{name}={prompts}" for name in ("train", "evaluate")]
    with pytest.raises(ConfigError, match=r"\+\+"):
        compose(PARAMS, ["preset=digits_t2i", *both])
    composed = compose(PARAMS, ["preset=digits_t2i", *(f"++{override}" for override in both)])
    assert composed["captions"]["sets"]["evaluate"]["path"] == "p.csv"


# What overrides may hold


@pytest.mark.parametrize(
    "path",
    [
        *("~/w", "/data/权重/模型.pth", "/data/my weights (new) [1]", "/data/lr=0.1,steps=2", "it's", "a\\'b\\"),
        *("C:\\weights", "/a#b", "range(1,2)", "@home", '"quoted"', "/a;b&c|d", "{a", "*.pth", "true/false"),
    ],
)
def test_any_path_can_be_written_as_it_is(path):
    values = compose(PARAMS, ["preset=digits_var", "teacher=var_d16", f"teacher.download.path={path}"])
    assert values["teacher"]["download"]["path"] == path.removeprefix('"').removesuffix('"')


def test_what_is_no_override_shows_the_form_of_one():
    with pytest.raises(ConfigError, match=r"se~ed=3: not an override; .* se~ed='3'"):
        compose(PARAMS, ["preset=digits", "se~ed=3"])
    with pytest.raises(ConfigError, match=r"nothing: not an override; .* nothing=VALUE"):
        compose(PARAMS, ["preset=digits", "nothing"])


@pytest.mark.parametrize(
    "override",
    [
        *("seed=${oc.env:DDOPS_TEST_TOKEN}", "seed='${oc.env:DDOPS_TEST_TOKEN}'", r"seed=$\{oc.env:DDOPS_TEST_TOKEN\}"),
        *("++export.license=[{a: '${oc.env:DDOPS_TEST_TOKEN}'}]", "++export={'${oc.env:DDOPS_TEST_TOKEN}': 1}"),
        *(r"export.license='\${oc.env:DDOPS_TEST_TOKEN}'", "export.license=~${oc.env:DDOPS_TEST_TOKEN}"),
        *("preset=${oc.env:DDOPS_TEST_TOKEN}", "seed=${hydra:runtime.cwd}", "seed=${dd1.seed}"),
        "export.license=str('${oc.env:DDOPS_TEST_TOKEN}')",
        *(
            "hydra.searchpath=[file:///etc]",
            "+hydra.searchpath=[pkg://os]",
            "++hydra.run.dir=x",
            "~hydra",
            "hydra/job=x",
        ),
        *("+preset@hydra.searchpath=digits", "hydra={}", "+x@hydra=y"),
        *(
            "preset=../../secret",
            "+preset@dd1=../../secret",
            "teacher=[digits,../../secret]",
            "+dd1/base=../../../secret",
        ),
    ],
)
def test_nothing_is_read_from_outside(override, monkeypatch, tmp_path):
    """Whoever may start a run must not learn the environment of the machine it runs on, or other files' contents."""
    monkeypatch.setenv("DDOPS_TEST_TOKEN", "hf_secret")
    params = tmp_path / "w" / "params"
    shutil.copytree(PARAMS, params)
    (tmp_path / "secret.yaml").write_text("token: hf_secret\n")
    (tmp_path / "w" / "secret.yaml").write_text("token: hf_secret\n")
    with pytest.raises(ConfigError) as error:
        compose(params, ["preset=digits", override])
    assert "hf_secret" not in str(error.value)


def test_nothing_is_put_into_a_written_file(tmp_path, composed, monkeypatch):
    """Such as by a reason for an override of the gate."""
    monkeypatch.setenv("DDOPS_TEST_TOKEN", "hf_secret")
    with pytest.raises(ConfigError, match=r"here\.yaml: export\.license: holds"):
        validate(spoilt(composed, "export.license", "${oc.env:DDOPS_TEST_TOKEN}"), "here.yaml")
    write_params(spoilt(composed, "export.license", "${oc.env:DDOPS_TEST_TOKEN}"), tmp_path / "params.yaml")
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "params.yaml")
    assert "hf_secret" not in str(error.value)


def test_presets_that_differ_in_case_alone_are_named(tmp_path):
    """On a disk that does not tell them apart the second would be read in place of the first."""
    shutil.copytree(PARAMS, tmp_path / "params")
    (tmp_path / "params" / "preset").mkdir(exist_ok=True)
    (tmp_path / "params" / "preset" / "Digits.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=r"Digits\.yaml: differs from .*digits\.yaml in case alone"):
        compose(tmp_path / "params", ["preset=digits"])
