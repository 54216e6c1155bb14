"""The Inception judge: torch-fidelity's network bit by bit, with random weights in the published layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from ddops.evaluation.inception import Inception, InceptionJudge, convert_inception, load_inception, to_inception
from ddops.models.errors import CheckpointError
from ddops.torchvision_compat import define_missing_operators

define_missing_operators()

from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # noqa: E402

IMAGES = torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file like the published one."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "weights-inception.pth"
    torch.save(Inception().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def judge(weights: Path) -> InceptionJudge:
    convert_inception(weights, weights.with_name("ours.safetensors"), 2048)
    return load_inception(weights.with_name("ours.safetensors"), "tensorflow1", "sha")


def test_features_and_logits_are_torch_fidelitys_own(weights: Path, judge: InceptionJudge) -> None:
    names = ["64", "192", "768", "2048", "logits_unbiased"]
    oracle = FeatureExtractorInceptionV3("oracle", names, feature_extractor_weights_path=str(weights))
    expected = dict(zip(names, oracle(IMAGES), strict=True))
    sight = judge.see(IMAGES)
    torch.testing.assert_close(sight.features_BF, expected["2048"], rtol=1e-5, atol=1e-6)
    assert sight.logits_BK is not None
    torch.testing.assert_close(sight.logits_BK, expected["logits_unbiased"], rtol=1e-5, atol=1e-6)
    for layer in (64, 192, 768):
        features_BF, logits = InceptionJudge(judge.network, layer, "tensorflow1").see(IMAGES)
        torch.testing.assert_close(features_BF, expected[str(layer)], rtol=1e-5, atol=1e-6)
        assert logits is None


def test_the_two_ways_to_resize_are_the_published_ones() -> None:
    """A ramp: TensorFlow 1 puts output i at i * scale of the input, pytorch-fid at the centres of the pixels."""
    ramp = torch.arange(64, dtype=torch.uint8).expand(1, 3, 64, 64)
    scale, at = 64 / 299, torch.arange(299, dtype=torch.float64)
    expected = {
        "tensorflow1": ((at * scale).clamp(0, 63) - 128) / 128,
        "pytorch_fid": ((at + 0.5) * scale - 0.5).clamp(0, 63) / 255 * 2 - 1,
    }
    for resize, row in expected.items():
        found = to_inception(ramp, resize)
        assert found.shape == (1, 3, 299, 299)
        torch.testing.assert_close(found[0, 0, 150].double(), row, rtol=0, atol=1e-5)


def test_grey_images_and_unknown_ways_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 3 channels, got 1"):
        to_inception(IMAGES[:, :1], "tensorflow1")
    with pytest.raises(ValueError, match="valid: pytorch_fid, tensorflow1"):
        to_inception(IMAGES, "bicubic")


def test_a_batch_does_not_matter(judge: InceptionJudge) -> None:
    small = InceptionJudge(judge.network, 64, "pytorch_fid")
    each = torch.cat([small.see(image[None]).features_BF for image in IMAGES])
    torch.testing.assert_close(each, small.see(IMAGES).features_BF, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fault", ["missing", "extra", "misshapen"])
def test_other_weights_are_refused_by_name(weights: Path, tmp_path: Path, fault: str) -> None:
    state = torch.load(weights, weights_only=True)
    key = {"missing": "fc.bias", "extra": "surprise", "misshapen": "Mixed_5b.branch1x1.conv.weight"}[fault]
    if fault == "missing":
        del state[key]
    else:
        state[key] = torch.ones(3)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=rf"weights\.pth: not Inception's weights: .*{key}"):
        convert_inception(tmp_path / "weights.pth", tmp_path / "ours", 2048)
    assert not (tmp_path / "ours").exists()


def test_weights_without_the_counters_of_training_are_taken(weights: Path, tmp_path: Path) -> None:
    state = {k: v for k, v in torch.load(weights, weights_only=True).items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "weights.pth")
    convert_inception(tmp_path / "weights.pth", tmp_path / "ours", 64)
    loaded = load_inception(tmp_path / "ours", "pytorch_fid", "")
    assert loaded.feature_dim == 64
    assert F.mse_loss(loaded.network.fc.weight.cpu(), state["fc.weight"]) == 0


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "judge").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match=r"judge: .* stage features"):
        load_inception(tmp_path / "judge", "pytorch_fid", "")
