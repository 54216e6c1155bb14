"""VAR: a transformer that predicts an image scale by scale, each scale's tokens in parallel (arXiv 2404.02905).

Shape suffixes are those of :mod:`ddops.models.interface` and: H heads, E width of a head, K attended positions,
M adaptive-norm vectors. Adaptive-norm vectors keep an axis of one for the positions: (B, 1, M, D).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddops.config.models import SamplingConfig, VARConfig
from ddops.models.conditions import Condition
from ddops.models.interface import BackboneSession, BackboneTeacher
from ddops.models.layout import LevelLayout
from ddops.models.precision import WholeLinear, full_precision, product_dtype
from ddops.models.sampling_filters import guided_log_probs
from ddops.models.var_tokenizer import VARTokenizer

MAX_LOG_SCALE: Final = math.log(100)
GATE_INIT: Final = 1e-5
HEAD_INIT: Final = 0.02


Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""``(q_BHlE, k_BHlE, v_BHlE, scale) -> y_BHlE``: who sees whom."""


def attend_all(q_BHlE: Tensor, k_BHKE: Tensor, v_BHKE: Tensor, scale: float) -> Tensor:
    """Every position sees every other."""
    return F.scaled_dot_product_attention(q_BHlE, k_BHKE, v_BHKE, scale=scale)


def attend_masked(q_BHlE: Tensor, k_BHKE: Tensor, v_BHKE: Tensor, scale: float, *, mask_lK: Tensor) -> Tensor:
    """A row sees a column where ``mask_lK`` is true."""
    return F.scaled_dot_product_attention(q_BHlE, k_BHKE, v_BHKE, attn_mask=mask_lK, scale=scale)


def init_std(width: int) -> float:
    """Standard deviation of new weights (released code)."""
    return math.sqrt(1 / (3 * width))


def normal_parameter(*shape: int, std: float) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=std))


def linear(inputs: int, outputs: int, std: float, bias: bool = True, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    """A linear layer of truncated-normal weights and zero bias."""
    layer = kind(inputs, outputs, bias)
    nn.init.trunc_normal_(layer.weight, std=std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def embedding(rows: int, width: int) -> nn.Embedding:
    table = nn.Embedding(rows, width)
    nn.init.trunc_normal_(table.weight, std=init_std(width))
    return table


class KeyValueCache:
    """Keys and values, in one block, of the levels already run, as wide as the products that read them."""

    def __init__(self) -> None:
        self._keys_and_values: tuple[Tensor, Tensor] | None = None

    def attend(self, q_BHlE: Tensor, k_BHlE: Tensor, v_BHlE: Tensor, scale: float) -> Tensor:
        """Add a level, which sees itself and everything so far."""
        dtype = product_dtype(k_BHlE)
        k_BHlE, v_BHlE = k_BHlE.to(dtype), v_BHlE.to(dtype)
        if self._keys_and_values is not None:
            k_BHKE, v_BHKE = self._keys_and_values
            k_BHlE, v_BHlE = torch.cat([k_BHKE, k_BHlE], dim=2), torch.cat([v_BHKE, v_BHlE], dim=2)
        self._keys_and_values = k_BHlE, v_BHlE
        return attend_all(q_BHlE, k_BHlE, v_BHlE, scale)


class Modulation(nn.Module):
    """Adaptive-norm vectors from the condition: (B, D) -> (B, 1, M, D). The first ``gates`` of them gate residuals."""

    def __init__(self, width: int, count: int, gates: int = 0) -> None:
        super().__init__()
        self.count = count
        self.linear = linear(width, count * width, std=init_std(width) / 2)
        with torch.no_grad():
            self.linear.weight[: gates * width] *= GATE_INIT

    def forward(self, cond_BD: Tensor) -> Tensor:
        flat: Tensor = self.linear(F.silu(cond_BD))
        return flat.view(-1, 1, self.count, cond_BD.shape[-1])


class ModulationOffset(nn.Module):
    """A block's own addition to the vectors that all blocks share: (B, 1, M, D) -> (B, 1, M, D)."""

    def __init__(self, width: int, count: int, gates: int = 0) -> None:
        super().__init__()
        self.offset_11MD = normal_parameter(1, 1, count, width, std=init_std(width) / 2)
        with torch.no_grad():
            self.offset_11MD[:, :, :gates] *= GATE_INIT

    def forward(self, shared_B1MD: Tensor) -> Tensor:
        return shared_B1MD + self.offset_11MD


def modulate(x_BlD: Tensor, scale_B1D: Tensor, shift_B1D: Tensor) -> Tensor:
    return x_BlD * (1 + scale_B1D) + shift_B1D


class Attention(nn.Module):
    """Multi-head attention whose keys have no bias.

    With ``attention_l2_norm``, queries and keys are unit vectors and each head learns the scale of its logits, as a
    logarithm of at most ``MAX_LOG_SCALE``. Without it the scale is a quarter of the usual one (released code).
    """

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        width, self.heads, self.l2_norm = config.width, config.heads, config.attention_l2_norm
        self.scale = 1.0 if self.l2_norm else 0.25 / math.sqrt(width // self.heads)
        self.qkv = linear(width, 3 * width, std=init_std(width), bias=False)
        self.q_bias_D = nn.Parameter(torch.zeros(width))
        self.v_bias_D = nn.Parameter(torch.zeros(width))
        self.out = linear(width, width, std=init_std(width) / math.sqrt(2 * config.depth))
        if self.l2_norm:
            self.log_scale_1H11 = nn.Parameter(torch.full((1, self.heads, 1, 1), math.log(4)))

    def forward(self, x_BlD: Tensor, attend: Attend = attend_all) -> Tensor:
        bias = torch.cat([self.q_bias_D, torch.zeros_like(self.q_bias_D), self.v_bias_D])
        qkv_Bl3HE = F.linear(x_BlD, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1))
        q_BHlE, k_BHlE, v_BHlE = (part_BlHE.transpose(1, 2) for part_BlHE in qkv_Bl3HE.unbind(2))
        if self.l2_norm:
            q_BHlE = F.normalize(q_BHlE, dim=-1) * self.log_scale_1H11.clamp(max=MAX_LOG_SCALE).exp()
            k_BHlE = F.normalize(k_BHlE, dim=-1)
        y_BHlE = attend(q_BHlE, k_BHlE, v_BHlE, self.scale)
        y_BlD: Tensor = self.out(y_BHlE.transpose(1, 2).flatten(2))
        return y_BlD


class Block(nn.Module):
    """Adaptive-norm transformer block.

    Its six adaptive-norm vectors are two gates, two scales and two shifts, attention's before the feed-forward's.
    """

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        width, hidden = config.width, round(config.width * config.mlp_ratio)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps, elementwise_affine=False)
        self.attention = Attention(config)
        self.mlp = nn.Sequential(
            linear(width, hidden, std=init_std(width)),
            nn.GELU(approximate="tanh"),
            linear(hidden, width, std=init_std(width) / math.sqrt(2 * config.depth)),
        )

    def forward(
        self,
        x_BlD: Tensor,
        vectors_B16D: Tensor,
        attend: Attend = attend_all,
        between_BlD: Tensor | None = None,
    ) -> Tensor:
        """``between_BlD`` is added between attention and feed-forward (the DD1 student's)."""
        gate1_B1D, gate2_B1D, scale1_B1D, scale2_B1D, shift1_B1D, shift2_B1D = vectors_B16D.unbind(2)
        x_BlD = x_BlD + gate1_B1D * self.attention(modulate(self.norm(x_BlD), scale1_B1D, shift1_B1D), attend)
        if between_BlD is not None:
            x_BlD = x_BlD + between_BlD
        y_BlD: Tensor = self.mlp(modulate(self.norm(x_BlD), scale2_B1D, shift2_B1D))
        return x_BlD + gate2_B1D * y_BlD


class ModulationVectors(NamedTuple):
    """Every adaptive-norm vector of a condition."""

    blocks: list[Tensor]
    """(B, 1, 6, D) a block."""
    head_B12D: Tensor
    """Scale, then shift."""


class VARTransformer(nn.Module):
    """The transformer of VAR. The first level of ``layout`` holds the class embedding, the others tokens' inputs.

    Initialised in the spirit of the released code: truncated normals of variance 1/(3D), those that write to the
    residual stream divided by sqrt(2 depth), adaptive-norm weights halved, their gates times ``GATE_INIT`` (each
    block starts as nearly the identity) and the head times ``HEAD_INIT`` (the first prediction is nearly uniform).
    """

    def __init__(self, config: VARConfig, layout: LevelLayout) -> None:
        super().__init__()
        width, std = config.width, init_std(config.width)
        self.layout = layout
        self.class_embedding = embedding(config.num_classes + 1, width)
        self.start_1lD = normal_parameter(1, layout.sizes[0], width, std=std)
        self.position_1LD = normal_parameter(1, layout.length, width, std=std)
        self.level_embedding = embedding(layout.num_levels, width)
        self.word_embedding = linear(config.code_dim, width, std=std)
        self.shared_modulation = Modulation(width, count=6, gates=2) if config.shared_ada_ln else nn.Identity()
        block_modulation = ModulationOffset if config.shared_ada_ln else Modulation
        self.modulations = nn.ModuleList(block_modulation(width, count=6, gates=2) for _ in range(config.depth))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_norm = nn.LayerNorm(width, eps=config.norm_eps, elementwise_affine=False)
        self.head_modulation = Modulation(width, count=2)
        self.head = linear(width, config.codebook_size, std=std * HEAD_INIT, kind=WholeLinear)

    def forward(self, labels_B: Tensor, prefix_BlD: Tensor) -> Tensor:
        """Modulated hidden states (B, L, D) from the embedded inputs of every level but the first."""
        attend = partial(attend_masked, mask_lK=scale_causal_mask(self.layout, prefix_BlD.device))
        cond_BD = self.class_embedding(labels_B)
        vectors = self.modulation_vectors(cond_BD)
        x_BLD = self.join(cond_BD, prefix_BlD)
        for block, vectors_B16D in zip(self.blocks, vectors.blocks, strict=True):
            x_BLD = block(x_BLD, vectors_B16D, attend)
        return self.head_input(x_BLD, vectors)

    def forward_level(
        self, level: int, x_BlD: Tensor, vectors: ModulationVectors, caches: list[KeyValueCache]
    ) -> Tensor:
        """Modulated hidden states (B, l, D) of one level, not yet placed, given the earlier levels' caches."""
        x_BlD = self.place(x_BlD, self.layout.positions(level))
        for block, vectors_B16D, cache in zip(self.blocks, vectors.blocks, caches, strict=True):
            x_BlD = block(x_BlD, vectors_B16D, cache.attend)
        return self.head_input(x_BlD, vectors)

    def modulation_vectors(self, cond_BD: Tensor) -> ModulationVectors:
        shared = self.shared_modulation(cond_BD)
        return ModulationVectors([modulation(shared) for modulation in self.modulations], self.head_modulation(cond_BD))

    def embed_class(self, cond_BD: Tensor) -> Tensor:
        """The first level's embedding, (B, l, D)."""
        return cond_BD[:, None] + self.start_1lD

    def place(self, x_BlD: Tensor, positions: slice) -> Tensor:
        """Add the embeddings of the positions and of their levels."""
        level_l = self.layout.level_of_position(x_BlD.device)[positions]
        placed_BlD: Tensor = x_BlD + self.position_1LD[:, positions] + self.level_embedding(level_l)
        return placed_BlD

    def embed_sequence(self, cond_BD: Tensor, inputs_BlC: Tensor) -> Tensor:
        """The positions' embeddings, (B, l_0 + l, D), from the inputs of the l positions after the first level."""
        return self.join(cond_BD, self.word_embedding(inputs_BlC))

    def join(self, cond_BD: Tensor, prefix_BlD: Tensor) -> Tensor:
        """The first level's embedding and those of the l positions after it, placed: (B, l_0 + l, D)."""
        x_BlD = torch.cat([self.embed_class(cond_BD), prefix_BlD], dim=1)
        return self.place(x_BlD, slice(x_BlD.shape[1]))

    def head_input(self, x_BlD: Tensor, vectors: ModulationVectors) -> Tensor:
        """The residual stream normed and modulated, (B, l, D): what the classifier reads."""
        scale_B1D, shift_B1D = vectors.head_B12D.unbind(2)
        return modulate(self.head_norm(x_BlD), scale_B1D, shift_B1D)

    def classify(self, hidden_BlD: Tensor) -> Tensor:
        """Logits (B, l, V), float32."""
        logits_BlV: Tensor = self.head(hidden_BlD)
        return logits_BlV.float()

    def predict(self, x_BlD: Tensor, vectors: ModulationVectors) -> Tensor:
        """Logits (B, l, V), float32, from the residual stream."""
        return self.classify(self.head_input(x_BlD, vectors))


def scale_causal_mask(layout: LevelLayout, device: torch.device) -> Tensor:
    """True where a row sees a column, (L, L): its own level and earlier ones (VAR)."""
    level_L = layout.level_of_position(device)
    return level_L[:, None] >= level_L[None, :]


class VARTeacher(BackboneTeacher):
    """VAR and its tokenizer as a :class:`Teacher`. Guidance grows linearly over the levels, from none at the first."""

    config: VARConfig
    tokenizer: VARTokenizer
    head_modules = ("head_norm", "head")

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.config = config
        self.layout = LevelLayout(config.level_sizes)
        self.tokenizer = VARTokenizer(config)
        self.transformer = VARTransformer(config, self.layout)

    @property
    def num_conditions(self) -> int:
        """See :attr:`Teacher.num_conditions`."""
        return self.config.num_classes

    def guidance_scale(self, guidance: float, level: int) -> float:
        """``1 + guidance * level / (S - 1)`` (released code)."""
        return 1 + guidance * level / (self.layout.num_levels - 1)

    def prefix_inputs(self, q_BLC: Tensor) -> Tensor:
        """See :meth:`BackboneTeacher.prefix_inputs`: the tokenizer's next-scale inputs."""
        return self.tokenizer.teacher_forcing_input(q_BLC)

    def embed_prefix(self, ids_BL: Tensor) -> Tensor:
        """See :meth:`BackboneTeacher.embed_prefix`. No gradient reaches the tokenizer."""
        with torch.no_grad():
            inputs_BlC = self.prefix_inputs(F.embedding(ids_BL, self.codebook_VC))
        return self.transformer.word_embedding(inputs_BlC)  # type: ignore[no-any-return]

    def prefix_layer(self) -> nn.Linear:
        """See :meth:`BackboneTeacher.prefix_layer`: a copy of the teacher's own."""
        return copy.deepcopy(self.transformer.word_embedding)

    def hidden(self, labels_B: Condition, prefix_BlD: Tensor) -> Tensor:
        """See :meth:`BackboneTeacher.hidden`: one masked pass."""
        return self.transformer(labels_B, prefix_BlD)  # type: ignore[no-any-return]

    def classify(self, hidden_BLD: Tensor) -> Tensor:
        """See :meth:`BackboneTeacher.classify`."""
        return self.transformer.classify(hidden_BLD)

    def open(self, labels_B: Tensor, sampling: SamplingConfig) -> VARSession:
        return VARSession(self, labels_B, sampling)


class VARSession(BackboneSession):
    """KV-cached sampling of :class:`VARTeacher`, without gradients.

    With guidance, the batch holds the conditional half and then the unconditional half, with the same tokens.
    """

    @torch.no_grad()
    def __init__(self, teacher: VARTeacher, labels_B: Tensor, sampling: SamplingConfig) -> None:
        self._teacher = teacher
        self._sampling = sampling
        self._guided = sampling.guidance > 0
        self._batch = len(labels_B)
        if self._guided:
            labels_B = torch.cat([labels_B, teacher.unconditional(labels_B)])
        cond_BD = teacher.transformer.class_embedding(labels_B)
        self._vectors = teacher.transformer.modulation_vectors(cond_BD)
        self._caches = [KeyValueCache() for _ in teacher.transformer.blocks]
        self._level = 0
        self._x_BlD = teacher.transformer.embed_class(cond_BD)
        self._f_hat_BCgg: Tensor | None = None
        self._hidden_BlD: Tensor | None = None

    @torch.no_grad()
    def next_hidden(self) -> Tensor:
        """See :meth:`BackboneSession.next_hidden`. Raises RuntimeError after the last level."""
        teacher = self._teacher
        if self._level == teacher.layout.num_levels:
            raise RuntimeError(f"all {self._level} levels have been appended")
        if self._hidden_BlD is None:
            self._hidden_BlD = teacher.transformer.forward_level(self._level, self._x_BlD, self._vectors, self._caches)
        return self._hidden_BlD

    @torch.no_grad()
    def next_log_probs(self) -> Tensor:
        """See :meth:`TeacherSession.next_log_probs`. Raises RuntimeError after the last level."""
        logits_BlV = self._teacher.classify(self.next_hidden())
        cond_BlV, uncond_BlV = logits_BlV.chunk(2) if self._guided else (logits_BlV, None)
        scale = self._teacher.guidance_scale(self._sampling.guidance, self._level)
        return guided_log_probs(cond_BlV, uncond_BlV, scale, self._sampling)

    @torch.no_grad()
    def append(self, ids_Bl: Tensor) -> None:
        """See :meth:`TeacherSession.append`.

        Raises RuntimeError after the last level, ValueError where the shape is not the level's.
        """
        self.next_hidden()  # of a prefix that was not asked for: its keys and values are needed
        if ids_Bl.shape != (expected := (self._batch, self._teacher.layout.sizes[self._level])):
            raise ValueError(f"ids are {tuple(ids_Bl.shape)}, the level is {expected}")
        if self._level + 1 < self._teacher.layout.num_levels:
            self._x_BlD = self._embed_next(F.embedding(ids_Bl, self._teacher.codebook_VC))
        self._hidden_BlD = None
        self._level += 1

    def _embed_next(self, q_BlC: Tensor) -> Tensor:
        """The next level's embedding, (B, l, D), for each half of the batch."""
        if self._f_hat_BCgg is None:
            grid = self._teacher.config.grid
            self._f_hat_BCgg = q_BlC.new_zeros(q_BlC.shape[0], q_BlC.shape[2], grid, grid)
        # The tokenizer's sums are those of the decoder, whatever the transformer computes in.
        next_input = full_precision(self._teacher.tokenizer.next_input)
        self._f_hat_BCgg, inputs_BlC = next_input(self._f_hat_BCgg, self._level, q_BlC)
        x_BlD: Tensor = self._teacher.transformer.word_embedding(inputs_BlC)
        return x_BlD.repeat(2, 1, 1) if self._guided else x_BlD
