"""The Inception network of 2015 as a judge: torch-fidelity's blocks and weights, both published ways to resize.

The same weights serve pytorch-fid, torch-fidelity and (as a TensorFlow graph) the ADM evaluator. They differ in how an
image comes to 299 pixels: pytorch-fid interpolates between pixel centres, TensorFlow 1 between pixel corners.
torch-fidelity's own class is not used as a whole because it unpickles the weights without protection.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ddops.evaluation.device import accelerator
from ddops.evaluation.judge import Judge, Sight
from ddops.files import atomic_path
from ddops.models.errors import CheckpointError
from ddops.models.name_map import map_state
from ddops.models.published_files import read_published
from ddops.torchvision_compat import define_missing_operators

define_missing_operators()

from torch_fidelity import feature_extractor_inceptionv3 as blocks  # noqa: E402
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x  # noqa: E402

SIDE: Final = 299
CLASSES: Final = 1008
LAYERS: Final = {
    64: ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1"),
    192: ("Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    768: ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    2048: ("Mixed_7a", "Mixed_7b", "Mixed_7c"),
}
"""Features -> the blocks that lead to them from the features before."""
_METADATA: Final = "inception"


class Inception(nn.Module):
    """The network's parts under their published names; :class:`InceptionJudge` runs them in order."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = blocks.BasicConv2d(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = blocks.BasicConv2d(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = blocks.BasicConv2d(32, 64, kernel_size=3, padding=1)
        self.MaxPool_1 = nn.MaxPool2d(kernel_size=3, stride=2)
        self.Conv2d_3b_1x1 = blocks.BasicConv2d(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = blocks.BasicConv2d(80, 192, kernel_size=3)
        self.MaxPool_2 = nn.MaxPool2d(kernel_size=3, stride=2)
        self.Mixed_5b = blocks.InceptionA(192, pool_features=32)
        self.Mixed_5c = blocks.InceptionA(256, pool_features=64)
        self.Mixed_5d = blocks.InceptionA(288, pool_features=64)
        self.Mixed_6a = blocks.InceptionB(288)
        self.Mixed_6b = blocks.InceptionC(768, channels_7x7=128)
        self.Mixed_6c = blocks.InceptionC(768, channels_7x7=160)
        self.Mixed_6d = blocks.InceptionC(768, channels_7x7=160)
        self.Mixed_6e = blocks.InceptionC(768, channels_7x7=192)
        self.Mixed_7a = blocks.InceptionD(768)
        self.Mixed_7b = blocks.InceptionE_1(1280)
        self.Mixed_7c = blocks.InceptionE_2(2048)
        self.fc = nn.Linear(2048, CLASSES)


class InceptionJudge(Judge):
    """Features of one layer; of the last one, also the 1008 logits, without bias as the Inception score has them."""

    name = "inception"
    knows_classes = False  # its classes are numbered otherwise than ImageNet's

    def __init__(self, network: Inception, layer: int, resize: str, sha256: str = "") -> None:
        self.device = accelerator()
        self.network = network.eval().requires_grad_(False).to(self.device)
        self.feature_dim, self.resize, self.sha256 = layer, resize, sha256

    @torch.no_grad()
    def see(self, images_BIHW: Tensor) -> Sight:
        x_BCHW = to_inception(images_BIHW.to(self.device), self.resize)
        for dim, names in LAYERS.items():
            for name in names:
                x_BCHW = getattr(self.network, name)(x_BCHW)
            if dim == self.feature_dim:
                break
        features_BF = x_BCHW.mean((2, 3))
        logits_BK = features_BF @ self.network.fc.weight.T if self.feature_dim == 2048 else None
        return Sight(features_BF, logits_BK)


def to_inception(images_BIHW: Tensor, resize: str) -> Tensor:
    """uint8 images to 299 x 299 pixels about zero, float32, in the way of ``pytorch_fid`` or of ``tensorflow1``.

    Raises:
        ValueError: the images have not three channels, or there is no such way.
    """
    if images_BIHW.shape[1] != 3:
        raise ValueError(f"Inception sees colour: expected 3 channels, got {images_BIHW.shape[1]}")
    x_BIHW = images_BIHW.float()
    if resize == "tensorflow1":
        resized_BIHW: Tensor = interpolate_bilinear_2d_like_tensorflow1x(x_BIHW, size=(SIDE, SIDE), align_corners=False)
        return (resized_BIHW - 128) / 128
    if resize == "pytorch_fid":
        return F.interpolate(x_BIHW / 255, size=(SIDE, SIDE), mode="bilinear", align_corners=False) * 2 - 1
    raise ValueError(f"no way to resize named {resize!r}; valid: pytorch_fid, tensorflow1")


def convert_inception(source: Path, target: Path, layer: int) -> None:
    """The published weights (a ``.pth``) as our file.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape; or the file asks to run code.
    """
    network = Inception()
    expected = network.state_dict()
    counters = {key: value for key, value in expected.items() if key.endswith("num_batches_tracked")}
    wanted = {key: value for key, value in expected.items() if key not in counters}
    try:
        # Counters of batches matter in training alone, and a file may have them or not.
        state = map_state(read_published(source, "flat"), {key: key for key in wanted}, wanted, ignored=counters)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: not Inception's weights: {error}") from error
    network.load_state_dict({**counters, **state})
    with atomic_path(target) as temporary:
        save_file(network.state_dict(), temporary, metadata={_METADATA: json.dumps({"layer": layer})})


def load_inception(path: Path, resize: str, sha256: str) -> InceptionJudge:
    """The judge.

    Raises:
        CheckpointError: not what :func:`convert_inception` writes.
    """
    try:
        with safe_open(path, framework="pt") as file:
            layer = json.loads((file.metadata() or {})[_METADATA])["layer"]
        network = Inception()
        network.load_state_dict(load_file(path))
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not Inception's weights ({error}); run the stage features again") from error
    return InceptionJudge(network, layer, resize, sha256)
