"""A decoder made ready to draw: how its weights lie, and products that need not be computed. Its images stay what they
are, up to rounding (docs/FAST_PATH.md).

Shape suffixes: K channels of a feature map, h and w its sides.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddops.models.autoencoder import Stage

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Doubled(nn.Module):
    """What a nearest-neighbour doubling and the 3x3 convolution after it compute, as one 2x2 convolution.

    In the doubled map a 3x3 window sees four pixels of the small map, each several times. Which, and how often, depends
    on the place of the window's centre in its pixel's square: the weights on equal pixels are added up, once, for each
    of the four places. That takes 16 products where the doubled map takes 36.

    The places are the channels of the small convolution, in such an order that it is shuffled into the doubled map with
    a border of one, which is cut off.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        weight_OI33 = convolution.weight.detach()
        outputs, inputs = weight_OI33.shape[:2]
        # Rows: place 1 then 0 in the square; columns: the small map's two pixels; then the 3 of the window.
        sums_223 = weight_OI33.new_tensor([[[1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 1]]])
        weight_OPPI22 = torch.einsum("aps,bqt,oist->oabipq", sums_223, sums_223, weight_OI33)
        self.convolution = nn.Conv2d(inputs, 4 * outputs, 2, padding=1)
        self.convolution.weight.data = weight_OPPI22.reshape(4 * outputs, inputs, 2, 2)
        assert convolution.bias is not None
        assert self.convolution.bias is not None
        self.convolution.bias.data = convolution.bias.detach().repeat_interleave(4)
        self.convolution.requires_grad_(convolution.weight.requires_grad)

    def forward(self, x_BKhw: Tensor) -> Tensor:
        return F.pixel_shuffle(self.convolution(x_BKhw), 2)[..., 1:-1, 1:-1]


def make_lean(tokenizer: ModuleT) -> ModuleT:
    """A tokenizer ready to decode: changed in place, its parameters' names included, so not to be saved.

    Beside :func:`join_doublings`, convolutions' weights are stored channels-last, so that no input is reordered.
    """
    join_doublings(tokenizer)
    tokenizer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return tokenizer


def join_doublings(tokenizer: nn.Module) -> None:
    """Each doubling of the sides and its convolution become one :class:`Doubled`, in place."""
    for stage in [part for part in tokenizer.modules() if isinstance(part, Stage)]:
        if isinstance(stage.resample, nn.Sequential) and isinstance(stage.resample[0], nn.Upsample):
            convolution = stage.resample[1]
            assert isinstance(convolution, nn.Conv2d)
            stage.resample = Doubled(convolution).train(stage.training)
