"""The presets of published weights: whole, of the published sizes and settings, planned without a network."""

from __future__ import annotations

import socket
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ddops.class_names import imagenet_names
from ddops.cli import main
from ddops.commands import estimates
from ddops.commands.arguments import CommandError, load_preset
from ddops.commands.classes import parse_classes
from ddops.config.load import group_files
from ddops.config.models import VARConfig
from ddops.config.stages import Config, DownloadedTeacherConfig, ReleasedDD1Config
from ddops.costs.devices import DEVICES
from ddops.costs.stages import predict
from ddops.hub.records import HubRecords
from helpers.tiny import PARAMS

TEACHERS = {
    "var_d16": 310.28,
    "var_d20": 600.92,
    "var_d24": 1033.4,
    "var_d30": 2010.0,
    "var_d36": 2353.9,
    "llamagen_b": 110.89,
    "llamagen_l": 342.91,
    "llamagen_b_384": 110.89,
    "llamagen_l_384": 342.91,
    "llamagen_xl_384": 774.70,
    "llamagen_xxl_384": 1410.97,
    "llamagen_3b_384": 3096.7,
    # 774.70 less the classes' embedding, and the captions' two layers.
    "llamagen_xl_t2i_256": 777.68,
    "llamagen_xl_t2i_512": 777.68,
}
"""Millions of parameters, as the authors or their code state them."""
STUDENTS = {
    "released_dd1_var_d16": 328.17,
    "released_dd1_var_d20": 635.40,
    "released_dd1_var_d24": 1092.5,
    "released_dd1_llamagen_b": 98.32,
    "released_dd1_llamagen_l": 326.16,
}
PUBLISHED = [*TEACHERS, *STUDENTS]
DD2 = ["var_d16_dd2", "var_d20_dd2", "llamagen_l_dd2"]
SCHEDULES = {
    "var_d16": ((0, 5), 5),
    "var_d20": ((0, 4), 4),
    "var_d24": ((0, 4), 4),
    "llamagen_b": ((0, 80), 80),
    "llamagen_l": ((0, 80), 130),
}


@cache
def config_of(preset: str) -> Config:
    return load_preset(preset, PARAMS).config


def planned(preset: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", preset, *arguments, "--params", str(PARAMS)]) == 0
    return capsys.readouterr().out


def number_on_line(text: str, name: str) -> float:
    """The first number of the line that begins with a name."""
    line = next(line.strip() for line in text.splitlines() if line.strip().startswith(name))
    return float(line.removeprefix(name).split()[0])


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_models_have_the_published_sizes(preset: str) -> None:
    measured = estimates.measure(config_of(preset))
    size, published = (
        (measured.transformer, TEACHERS[preset]) if preset in TEACHERS else (measured.student, STUDENTS[preset])
    )
    digits = len(str(published).partition(".")[2])
    assert round(size.parameters / 1e6, digits) == published


@pytest.mark.slow
@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(("preset", "name", "size"), [("released_dd1_llamagen_b", "DD1 student", 98.32)])
def test_plan_states_sizes_and_costs_and_fetches_nothing(
    preset: str,
    name: str,
    size: float,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    text = planned(preset, capsys)
    assert number_on_line(text, name) == size
    for heading in ("Models (exact)", "Stages", "Disk (estimate)", "Time and memory (predicted"):
        assert heading in text
    assert "MIT" in text
    assert list(tmp_path.iterdir()) == [], "nothing is downloaded or written"


def test_every_preset_of_the_issue_is_there_and_nothing_is_left_out() -> None:
    presets = set(group_files(PARAMS, "preset"))
    assert presets - {"digits", "digits_t2i", "digits_var", "smoke"} == {*PUBLISHED, *DD2}


@pytest.mark.parametrize("preset", DD2)
def test_presets_with_dd2_are_those_without_it_and_dd2_after_dd1(preset: str) -> None:
    config, without = config_of(preset), config_of(preset.removesuffix("_dd2"))
    for section in ("features", "teacher", "sampling", "trajectories", "dd1", "gate", "engine"):
        assert getattr(config, section) == getattr(without, section)
    assert (config.ar_diffusion.source, config.dd2.source, without.dd2.source) == ("train", "train", "none")
    assert config.export.row == "dd2_1step"
    assert set(config.evaluate.rows) > set(without.evaluate.rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "card"), [("var_d16_dd2", "h100"), pytest.param("llamagen_l_dd2", "h100", marks=pytest.mark.rare)]
)
def test_dd2_of_a_published_teacher_is_predicted_to_fit_the_card(preset: str, card: str) -> None:
    """Its updates run, without values, through the stages' own code, in the precision that the preset trains in."""
    costs = predict(config_of(preset), DEVICES[card])
    for stage in ("ar_diffusion", "distill_dd2"):
        assert 0 < costs[stage].memory < DEVICES[card].memory
        assert costs[stage].flops < costs["distill_dd1"].flops / 3, "less training than DD1 takes"


@pytest.mark.parametrize("preset", PUBLISHED)
def test_files_are_those_of_the_manifest(preset: str) -> None:
    config, records = config_of(preset), HubRecords.load(None)
    assert isinstance(config.teacher, DownloadedTeacherConfig)
    wanted = [(config.teacher.download.repo, config.teacher.download.tokenizer.name)]
    wanted.append((config.teacher.download.repo, config.teacher.download.transformer.name))
    if isinstance(config.dd1, ReleasedDD1Config):
        wanted.append((config.dd1.download.repo, config.dd1.download.student.name))
    for repo, name in wanted:
        assert name in records.manifest[repo]["files"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_training_and_released_students_share_the_published_schedule(name: str) -> None:
    for preset in (name, f"released_dd1_{name}"):
        dd1 = config_of(preset).dd1
        assert (dd1.start_positions, dd1.logit_prefix) == SCHEDULES[name]
    assert config_of(f"released_dd1_{name}").trajectories.count == 0
    assert config_of(name).trajectories.count == 1_200_000


@pytest.mark.parametrize(
    ("preset", "guidance", "top_k", "top_p"),
    [
        ("var_d16", 2.0, 900, 0.95),
        ("var_d30", 1.5, 900, 0.96),
        ("llamagen_l", 2.0, 8000, 1.0),
        ("llamagen_l_384", 2.0, 0, 1.0),
        ("llamagen_xl_384", 1.75, 0, 1.0),
        ("llamagen_3b_384", 1.65, 0, 1.0),
        ("llamagen_xl_t2i_256", 7.5, 1000, 1.0),
        ("llamagen_xl_t2i_512", 7.5, 1000, 1.0),
    ],
)
def test_sampling_settings(preset: str, guidance: float, top_k: int, top_p: float) -> None:
    sampling = config_of(preset).sampling
    assert (sampling.guidance, sampling.top_k, sampling.top_p) == (guidance, top_k, top_p)


def test_vars_scaling_rule() -> None:
    for preset in (name for name in TEACHERS if name.startswith("var")):
        model = config_of(preset).teacher.model
        assert isinstance(model, VARConfig)
        assert (model.width, model.heads) == (64 * model.depth, model.depth)
        assert f"d{model.depth}" in preset


def test_sizes_and_work_that_were_measured_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the project's cost study: 1.6 GB for VAR's data set, 100 GB with its noise."""
    config = config_of("var_d16")
    measured = estimates.measure(config)
    assert estimates.trajectory_bytes(measured) * config.trajectories.count / 1e9 == pytest.approx(1.63, abs=0.01)
    assert estimates.noise_bytes(config, measured) * config.trajectories.count / 1e9 == pytest.approx(104.4, abs=0.1)
    assert measured.tokenizer.parameters / 1e6 == pytest.approx(108.95, abs=0.01)


@pytest.mark.slow
def test_plan_takes_overrides_and_devices(capsys: pytest.CaptureFixture[str]) -> None:
    text = planned("var_d16", capsys, "trajectories.count=1000", "dd1.training.batch_size=4096", "--device", "a100")
    assert "1,000 by the flow map" in text
    assert "more than the a100 has: lower the batch size" in text
    assert main(["plan", "var_d16", "--device", "abacus", "--params", str(PARAMS)]) == 1
    assert "no device 'abacus' in the table; valid: h200" in capsys.readouterr().err


@pytest.mark.slow
def test_plan_of_a_trained_preset(capsys: pytest.CaptureFixture[str]) -> None:
    text = planned("digits", capsys)
    assert "train the digits classifier" in text
    assert "download" not in text
    assert "not built yet" not in text


def test_plan_of_no_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "var_d166", "--params", str(PARAMS)]) == 1
    assert "did you mean 'var_d16'?" in capsys.readouterr().err


# Classes


def test_classes_by_number_and_by_name() -> None:
    assert parse_classes("207, 360", 1000) == [207, 360]
    assert parse_classes("Golden Retriever,otter,0", 1000) == [207, 360, 0]
    assert parse_classes("0,9", 10) == [0, 9]


def test_there_are_a_thousand_different_names() -> None:
    assert len(set(imagenet_names())) == 1000
    assert parse_classes("Cardigan,cardigan", 1000) == [264, 474]


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("golden retreiver", 1000, r"close are: golden retriever \(207\)"),
        ("retriever", 1000, "Labrador retriever"),
        ("1000", 1000, "no class 1000; there are 1000, 0 to 999"),
        ("CARDIGAN", 1000, r"Cardigan \(264\), cardigan \(474\)"),
        ("", 1000, "no ImageNet class"),
        ("1,,2", 1000, "no ImageNet class"),
        ("-1", 10, "no names: give numbers, 0 to 9"),
        ("otter", 10, "no names: give numbers, 0 to 9"),
    ],
)
def test_unknown_classes_are_named_with_what_is_close(text: str, count: int, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        parse_classes(text, count)
