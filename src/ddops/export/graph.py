"""What is exported: noise and class label, or encoded caption, in; images out. One student pass a step and one decoder
pass."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from ddops.models.conditions import Captions, Condition
from ddops.models.interface import Student, Tokenizer
from ddops.models.lean import make_lean
from ddops.models.weights import load_tokenizer
from ddops.models.weights_dd2 import load_generator
from ddops.sampling.few_step import sample_sequence


class OneStepGraph(nn.Module):
    """Student and image decoder as one module: ``(noise_BLC, class_label_B) -> images_BIHW`` clamped to [-1, 1]. The
    tokenizer is made lean, in place."""

    input_names: tuple[str, ...] = ("noise", "class_label")

    def __init__(
        self, student: Student, tokenizer: Tokenizer, start_positions: tuple[int, ...], logit_prefix: int
    ) -> None:
        super().__init__()
        self.student = student
        self.tokenizer = make_lean(tokenizer)
        self.start_positions = start_positions
        self.logit_prefix = logit_prefix
        self.register_buffer("codebook_VC", tokenizer.codebook_VC.detach().clone())
        self.codebook_VC: Tensor

    @property
    def whole_modules(self) -> tuple[str, ...]:
        """Modules that mixed precision leaves in float32: the student's heads, the decoder's last layers."""
        heads = (f"student.{name}" for name in self.student.head_modules)
        return (*heads, "tokenizer.decoder.norm_out", "tokenizer.decoder.conv_out")

    def forward(self, noise_BLC: Tensor, class_label_B: Tensor) -> Tensor:
        """Images (B, I, H, W) in [-1, 1]."""
        return self.draw(noise_BLC, class_label_B)[0]

    def condition(self, class_label_B: Tensor) -> Condition:
        """What :meth:`draw` takes, from the inputs besides the noise."""
        return class_label_B

    def draw(self, noise_BLC: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """The images, and the tokens (B, n) that an argmax decided."""
        q_BLC, ids_Bn = sample_sequence(
            self.student, self.codebook_VC, noise_BLC, condition, self.start_positions, self.logit_prefix
        )
        return self.tokenizer.decode(q_BLC).clamp(-1, 1), ids_Bn


class CaptionGraph(OneStepGraph):
    """``(noise_BLC, caption_features_BTW, caption_mask_BT) -> images_BIHW``: the text encoder is not part of it."""

    input_names = ("noise", "caption_features", "caption_mask")

    def forward(self, noise_BLC: Tensor, caption_features_BTW: Tensor, caption_mask_BT: Tensor) -> Tensor:  # type: ignore[override]
        """Images (B, I, H, W) in [-1, 1]."""
        return self.draw(noise_BLC, self.condition(caption_features_BTW, caption_mask_BT))[0]

    def condition(self, caption_features_BTW: Tensor, caption_mask_BT: Tensor) -> Condition:  # type: ignore[override]
        """See :meth:`OneStepGraph.condition`."""
        return Captions(caption_features_BTW, caption_mask_BT)


def load_graph(student: Path, tokenizer: Path, start_positions: tuple[int, ...], logit_prefix: int) -> OneStepGraph:
    """The model in PyTorch, in evaluation mode and without gradients; raises CheckpointError."""
    model = load_generator(tokenizer, student)
    kind = OneStepGraph if model.num_conditions else CaptionGraph  # before a prompt set is attached
    graph = kind(model, load_tokenizer(tokenizer), start_positions, logit_prefix)
    return graph.eval().requires_grad_(False)
