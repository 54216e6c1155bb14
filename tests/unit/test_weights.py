"""Weight files: what comes back, what is refused and with which words, and the registry that builds the models."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddops.config.models import AutoencoderConfig, ModelConfig
from ddops.models import registry
from ddops.models.errors import CheckpointError
from ddops.models.interface import Student, Teacher, Tokenizer
from ddops.models.registry import build_student, build_teacher, build_tokenizer
from ddops.models.weights import (
    STUDENT,
    TOKENIZER,
    TRANSFORMER,
    load_student,
    load_teacher,
    load_tokenizer,
    load_weights,
    save_weights,
)
from helpers.llamagen_helpers import SMALL
from helpers.var_helpers import TINY as TINY_VAR

SMALL_VAR = replace(
    TINY_VAR,
    image_size=8,
    image_channels=1,
    patch_sizes=(1, 2, 4),
    autoencoder=AutoencoderConfig(channels=32, channel_multipliers=(1, 2), res_blocks=1),
)
FAMILIES = pytest.mark.parametrize("config", [SMALL, SMALL_VAR], ids=lambda config: config.family)


def some_state() -> dict[str, Tensor]:
    return {
        "b.weight": torch.arange(6.0).reshape(2, 3).T,  # not contiguous
        "a.bias": torch.tensor([1, 2], dtype=torch.int64),
        "c": torch.ones(3, dtype=torch.bfloat16, requires_grad=True),
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A valid file."""
    path = tmp_path / "deep" / "weights.safetensors"
    save_weights(path, some_state(), SMALL, TRANSFORMER, {"step": "7"})
    return path


def with_metadata(path: Path, **changes: str | None) -> None:
    """Rewrite a file's metadata under ``ddops.``; None removes a key."""
    with safe_open(path, framework="pt") as file:
        metadata: dict[str, str | None] = dict(file.metadata())
    metadata |= {f"ddops.{key}": value for key, value in changes.items()}
    save_file(load_file(path), path, {key: value for key, value in metadata.items() if value is not None})


def assert_same(module: nn.Module, other: nn.Module) -> None:
    ours, theirs = module.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@FAMILIES
def test_round_trip(tmp_path: Path, config: ModelConfig) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(path, some_state(), config, "generator", {"step": "7", "note": 'zwölf "quoted"\n'})
    state, loaded_config, extra = load_weights(path, "generator")
    assert loaded_config == config
    assert extra == {"step": "7", "note": 'zwölf "quoted"\n'}
    assert state.keys() == some_state().keys()
    for key, tensor in some_state().items():
        assert state[key].dtype == tensor.dtype
        assert torch.equal(state[key], tensor)


def test_no_temporary_file_is_left(path: Path) -> None:
    assert list(path.parent.iterdir()) == [path]


def test_bytes_are_a_function_of_the_contents(tmp_path: Path) -> None:
    """In separate processes too, since safetensors' own order of the metadata is random."""
    program = (
        "import sys; from pathlib import Path; sys.path[:0] = sys.argv[2:]\n"
        "from test_weights import SMALL, save_weights, some_state\n"
        "save_weights(Path(sys.argv[1]), some_state(), SMALL, 'student', {f'key{i}': 'é' for i in range(9)})"
    )
    places = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    written = [tmp_path / "elsewhere.safetensors", tmp_path / "here.safetensors"]
    subprocess.run([sys.executable, "-c", program, str(written[0]), *places], check=True)
    save_weights(written[1], some_state(), SMALL, STUDENT, {f"key{index}": "é" for index in range(9)})
    reordered = tmp_path / "reordered.safetensors"
    extra = {f"key{index}": "é" for index in reversed(range(9))}
    save_weights(reordered, dict(reversed(some_state().items())), SMALL, STUDENT, extra)
    assert len({path.read_bytes() for path in [*written, reordered]}) == 1


def test_a_failed_write_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("ddops.models.weights._sort_metadata", fail)
    with pytest.raises(OSError, match="disk full"):
        save_weights(path, {"x": torch.zeros(1)}, SMALL, TRANSFORMER)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_extra_may_not_shadow_our_metadata(path: Path) -> None:
    with pytest.raises(ValueError, match=r"ddops\.kind"):
        save_weights(path, some_state(), SMALL, TRANSFORMER, {"ddops.kind": "student"})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        load_weights(tmp_path / "nowhere.safetensors", TRANSFORMER)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors.*produce it again"):
        load_weights(path, TRANSFORMER)


def test_a_file_of_another_format_is_refused(path: Path) -> None:
    torch.save(some_state(), path)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors"):
        load_weights(path, TRANSFORMER)


def test_another_kind_is_refused(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"weights\.safetensors.*transformer.*student"):
        load_weights(path, STUDENT)


@pytest.mark.parametrize("key", ["kind", "config", "format_version"])
def test_missing_metadata_is_refused(path: Path, key: str) -> None:
    with_metadata(path, **{key: None})
    with pytest.raises(CheckpointError, match=rf"weights\.safetensors.*ddops\.{key}.*import"):
        load_weights(path, TRANSFORMER)


def test_a_file_without_any_metadata_is_refused(path: Path) -> None:
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"lacks the metadata ddops\.kind"):
        load_weights(path, TRANSFORMER)


def test_another_format_version_is_refused(path: Path) -> None:
    with_metadata(path, format_version="2")
    with pytest.raises(CheckpointError, match="format version 2, this ddops reads version 1"):
        load_weights(path, TRANSFORMER)


@pytest.mark.parametrize("config", ["{", '{"family": "pixelcnn"}', '{"family": "llamagen", "depth": 0}'])
def test_an_unreadable_configuration_is_refused(path: Path, config: str) -> None:
    with_metadata(path, config=config)
    with pytest.raises(CheckpointError, match=r"the configuration in .*weights\.safetensors"):
        load_weights(path, TRANSFORMER)


@FAMILIES
def test_models_are_loaded_as_saved(tmp_path: Path, config: ModelConfig) -> None:
    teacher, student = build_teacher(config), build_student(config)
    files = {kind: tmp_path / f"{kind}.safetensors" for kind in (TOKENIZER, TRANSFORMER, STUDENT)}
    save_weights(files[TOKENIZER], teacher.tokenizer.state_dict(), config, TOKENIZER)
    save_weights(files[TRANSFORMER], teacher.get_submodule("transformer").state_dict(), config, TRANSFORMER)
    save_weights(files[STUDENT], student.state_dict(), config, STUDENT)
    loaded: list[nn.Module] = [
        load_teacher(files[TOKENIZER], files[TRANSFORMER]),
        load_student(files[STUDENT]),
        load_tokenizer(files[TOKENIZER]),
    ]
    for module, original in zip(loaded, (teacher, student, teacher.tokenizer), strict=True):
        assert_same(module, original)
        assert not module.training


def test_one_tokenizer_serves_transformers_of_several_sizes(tmp_path: Path) -> None:
    deeper = build_teacher(replace(SMALL, depth=3))
    tokenizer_path, transformer_path = tmp_path / "tokenizer", tmp_path / "transformer"
    save_weights(tokenizer_path, build_tokenizer(SMALL).state_dict(), SMALL, TOKENIZER)
    state = deeper.get_submodule("transformer").state_dict()
    save_weights(transformer_path, state, replace(SMALL, depth=3), TRANSFORMER)
    loaded = load_teacher(tokenizer_path, transformer_path)
    assert_same(loaded.get_submodule("transformer"), deeper.get_submodule("transformer"))


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    tokenizer_path, transformer_path = tmp_path / "tokenizer", tmp_path / "transformer"
    state = build_teacher(SMALL).get_submodule("transformer").state_dict()
    save_weights(transformer_path, state, SMALL, TRANSFORMER)
    other = replace(SMALL, code_dim=4)
    save_weights(tokenizer_path, build_tokenizer(other).state_dict(), other, TOKENIZER)
    with pytest.raises(CheckpointError, match=r"(?s)tokenizer do not fit.*codebook"):
        load_teacher(tokenizer_path, transformer_path)
    save_weights(tokenizer_path, build_tokenizer(SMALL_VAR).state_dict(), SMALL_VAR, TOKENIZER)
    with pytest.raises(CheckpointError, match=r"var tokenizer.*llamagen transformer"):
        load_teacher(tokenizer_path, transformer_path)


def test_weights_that_do_not_fit_name_the_key(tmp_path: Path) -> None:
    state = build_student(SMALL).state_dict()
    del state["head.weight"]
    save_weights(tmp_path / "student", state, SMALL, STUDENT)
    with pytest.raises(CheckpointError, match=r"(?s)student do not fit.*head\.weight"):
        load_student(tmp_path / "student")


@FAMILIES
def test_registry_builds_each_family(config: ModelConfig) -> None:
    tokenizer, teacher, student = build_tokenizer(config), build_teacher(config), build_student(config)
    assert isinstance(tokenizer, Tokenizer)
    assert isinstance(teacher, Teacher)
    assert isinstance(student, Student)
    assert tokenizer.layout == teacher.layout == student.layout
    assert type(tokenizer) is type(teacher.tokenizer)
    assert teacher.num_conditions == student.num_conditions == config.num_classes


@dataclass(frozen=True)
class ThirdConfig:
    family: str = "third"


@pytest.mark.parametrize("build", [build_tokenizer, build_teacher, build_student])
def test_an_unknown_family_lists_the_known_ones(build: Any) -> None:
    with pytest.raises(ValueError, match="'third'; known are llamagen, var"):
        build(ThirdConfig())


def test_a_third_family_is_one_registry_line(monkeypatch: pytest.MonkeyPatch) -> None:
    built = build_tokenizer(SMALL)
    monkeypatch.setitem(registry.FAMILIES, "third", registry.FAMILIES["llamagen"]._replace(tokenizer=lambda _: built))
    assert build_tokenizer(ThirdConfig()) is built  # type: ignore[arg-type]
