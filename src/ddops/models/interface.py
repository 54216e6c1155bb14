"""What the rest of ddops asks of a model. Nothing downstream branches on the family.

Shape suffixes, here and everywhere: B batch, L positions, l positions of one level, V codebook size,
C embedding width, D transformer width, S levels; ``labels_B`` are numbers of conditions (classes, or the captions of
the attached prompt set, see :mod:`ddops.models.conditions`); images are (B, I, H, W) with I colour channels, in
[-1, 1].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddops.config.models import ModelConfig, SamplingConfig
from ddops.models.conditions import Condition
from ddops.models.layout import LevelLayout


class TokenizerOutput(NamedTuple):
    """What a tokenizer's training step needs."""

    reconstruction_BIHW: Tensor
    codebook_loss: Tensor
    """Scalar: codebook term + commitment term, to be weighted and added to the reconstruction error."""
    ids_BL: Tensor


class Tokenizer(nn.Module, ABC):
    """Images to token ids and embeddings back to images."""

    layout: LevelLayout

    @property
    @abstractmethod
    def codebook_VC(self) -> Tensor:
        """The codes as every consumer sees them (LlamaGen's are of unit norm)."""

    @abstractmethod
    def encode(self, images_BIHW: Tensor) -> Tensor:
        """Token ids, int64 of shape (B, L)."""

    @abstractmethod
    def decode(self, q_BLC: Tensor) -> Tensor:
        """Images (B, I, H, W), nominally in [-1, 1] but not clamped; the embeddings need not lie on the codebook."""

    @abstractmethod
    def forward(self, images_BIHW: Tensor) -> TokenizerOutput:
        """Reconstruction with straight-through gradients, for training."""

    @abstractmethod
    def reseed_unused_codes(self, images_BIHW: Tensor, generator: torch.Generator | None = None) -> int:
        """Move the codes that no image of the batch uses to encoder outputs drawn at random; how many moved."""


class TeacherSession(ABC):
    """One KV-cached sampling run: ask for the next level's distribution, append what was drawn, repeat."""

    @abstractmethod
    def next_log_probs(self) -> Tensor:
        """Log-probabilities (B, l, V) of the next level, guidance, temperature, top-k and top-p applied
        (``-inf`` for dropped codes), normalised over V."""

    @abstractmethod
    def append(self, ids_Bl: Tensor) -> None:
        """Fix the tokens of the next level; of a level that was not asked for, they are a given prefix."""


class Teacher(nn.Module, ABC):
    """An autoregressive image model over ``layout`` and its tokenizer."""

    layout: LevelLayout
    tokenizer: Tokenizer
    head_modules: ClassVar[tuple[str, ...]] = ()
    """Names of the submodules of its ``transformer`` between the last hidden state and the logits. Sampling in bfloat16
    leaves them whole: guidance multiplies their rounding."""

    @property
    @abstractmethod
    def num_conditions(self) -> int:
        """How many conditions it can be asked for: its classes, or the captions attached to it; numbered from 0."""

    @property
    def codebook_VC(self) -> Tensor:
        return self.tokenizer.codebook_VC

    def unconditional(self, labels_B: Tensor) -> Tensor:
        """The numbers that stand for no condition, which guidance asks for beside ``labels_B``."""
        return torch.full_like(labels_B, self.num_conditions)

    @abstractmethod
    def guidance_scale(self, guidance: float, level: int) -> float:
        """w in ``uncond + w * (cond - uncond)`` at a level, from the setting in the family's own convention."""

    @abstractmethod
    def logits(self, labels_B: Condition, ids_BL: Tensor) -> Tensor:
        """Teacher-forced logits (B, L, V): row i is the distribution of token i given all earlier levels.
        No guidance, no filter; differentiable."""

    @abstractmethod
    def open(self, labels_B: Tensor, sampling: SamplingConfig) -> TeacherSession:
        """Start a KV-cached sampling run."""

    def decode(self, q_BLC: Tensor) -> Tensor:
        """See :meth:`Tokenizer.decode`."""
        return self.tokenizer.decode(q_BLC)


class BackboneSession(TeacherSession):
    """A sampling run that also gives out what the classifier reads; opened without guidance, one row a sample."""

    @abstractmethod
    def next_hidden(self) -> Tensor:
        """Hidden states (B, l, D) of the next level; see :meth:`BackboneTeacher.hidden`."""


class BackboneTeacher(Teacher):
    """A teacher whose parts can be asked for one by one: what DD2's AR-diffusion model is built on."""

    config: ModelConfig

    @abstractmethod
    def prefix_inputs(self, q_BLC: Tensor) -> Tensor:
        """What of the embeddings, on the codebook or not, is read for the levels after the first: (B, L - l_0, C)."""

    @abstractmethod
    def embed_prefix(self, ids_BL: Tensor) -> Tensor:
        """The transformer's input for the levels after the first, (B, L - l_0, D), from the tokens."""

    @abstractmethod
    def prefix_layer(self) -> nn.Linear:
        """A new layer from :meth:`prefix_inputs` to (nearly) what :meth:`embed_prefix` gives for tokens. It is
        trained where noise stands in place of the tokens."""

    @abstractmethod
    def hidden(self, labels_B: Condition, prefix_BlD: Tensor) -> Tensor:
        """What the classifier reads, (B, L, D), in one pass: row i depends on the label and on all earlier levels."""

    @abstractmethod
    def classify(self, hidden_BLD: Tensor) -> Tensor:
        """Logits (B, L, V), float32."""

    @abstractmethod
    def open(self, labels_B: Tensor, sampling: SamplingConfig) -> BackboneSession:
        """See :meth:`Teacher.open`."""

    def logits(self, labels_B: Condition, ids_BL: Tensor) -> Tensor:
        """See :meth:`Teacher.logits`. No gradient reaches the tokenizer."""
        return self.classify(self.hidden(labels_B, self.embed_prefix(ids_BL)))


class StudentOutput(NamedTuple):
    """The two heads of a DD1 student."""

    logits_BLV: Tensor
    """L stands for the positions that were asked for."""
    embeddings_BLC: Tensor


class StudentSession(ABC):
    """One sampling run of a student. What depends on the condition and the weights alone is computed once, when it is
    opened, for all its passes. Without gradients or with, as PyTorch is set."""

    @abstractmethod
    def predict(self, x_BlC: Tensor, given: int, coded: int) -> StudentOutput:
        """One pass over the first l positions, which end with a level; the ``given`` ones are data, the rest noise.

        No position is computed that nothing is asked of: later ones are not seen, so that leaving them out changes
        nothing. Logits (B, coded - given, V) of the positions ``given..coded - 1``, embeddings (B, l - coded, C) of
        the positions ``coded..l - 1``; ``given <= coded <= l``, in positions, not levels.
        """


class Student(nn.Module, ABC):
    """DD1 student: one pass from a partly noisy sequence to all of its tokens (arXiv 2412.17153)."""

    layout: LevelLayout
    head_modules: ClassVar[tuple[str, ...]]
    """Names of the submodules between the last hidden state and the outputs. Mixed precision leaves them whole."""

    @property
    @abstractmethod
    def num_conditions(self) -> int:
        """See :attr:`Teacher.num_conditions`."""

    @abstractmethod
    def forward(
        self, x_BLC: Tensor, labels_B: Condition, start_B: Tensor, logits_at: slice = slice(None)
    ) -> StudentOutput:
        """Embeddings at every position and logits at the positions ``logits_at``: they cost most where V is large.

        ``x_BLC`` holds each position's own value (an embedding where given, standard normal noise elsewhere);
        ``start_B`` (int64) counts the leading levels that are given, 0..S. Position i sees the condition,
        every position of strictly earlier levels and itself.
        """

    def open(self, labels_B: Condition) -> StudentSession:
        """Start a sampling run. A family overrides it with passes that leave out what :meth:`forward` could."""
        return FullPasses(self, labels_B)

    @abstractmethod
    def init_from_teacher(self, teacher: Teacher) -> None:
        """Copy every weight that the teacher and the student share; the rest keep their initialisation."""


class FullPasses(StudentSession):
    """A session of any student through its :meth:`Student.forward`, the cut sequence filled up with zeros."""

    def __init__(self, student: Student, labels_B: Condition) -> None:
        self._student = student
        self._labels_B = labels_B

    def predict(self, x_BlC: Tensor, given: int, coded: int) -> StudentOutput:
        """See :meth:`StudentSession.predict`."""
        layout, length = self._student.layout, x_BlC.shape[1]
        x_BLC = F.pad(x_BlC, (0, 0, 0, layout.length - length))
        start_B = torch.full_like(x_BlC[:, 0, 0], layout.offsets.index(given), dtype=torch.int64)
        output = self._student(x_BLC, self._labels_B, start_B, slice(given, coded))
        return StudentOutput(output.logits_BLV, output.embeddings_BLC[:, coded:length])
