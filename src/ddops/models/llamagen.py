"""LlamaGen (arXiv 2406.06525): a Llama-style transformer over image tokens in raster order.

The sequence is the condition (one class token, or the tokens of a caption) followed by the image tokens. Layout of the
weights, the zero rotation of condition tokens and the guidance convention follow the released code, so that published
checkpoints load.

Shape suffixes beyond :mod:`ddops.models.interface`: T condition and image tokens, h attention heads, K head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddops.config.models import LlamaGenConfig, SamplingConfig
from ddops.models.conditions import Condition, condition_embedding
from ddops.models.interface import BackboneSession, BackboneTeacher
from ddops.models.layout import LevelLayout
from ddops.models.llamagen_tokenizer import LlamaGenTokenizer
from ddops.models.precision import WholeLinear, product_dtype
from ddops.models.sampling_filters import guided_log_probs

INIT_STD = 0.02


def init_weights(module: nn.Module) -> None:
    """Normal(0, 0.02) linear and embedding weights, zero biases; for ``nn.Module.apply``."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def rotary_angles(grid: int, head_width: int, base: float) -> Tensor:
    """Angles (L, K/2) of the 2D rotary embedding: the first half of a head's channel pairs turns with the row of a
    token, the second half with its column."""
    quarter = head_width // 4
    frequencies = base ** -(torch.arange(quarter, dtype=torch.float32) / quarter)
    index = torch.arange(grid * grid)
    rows, columns = index // grid, index % grid
    return torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=1)


def rotary_tables(config: LlamaGenConfig) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine (T, 1, 1, K) to be used by :func:`rotate`.

    Both are zero, not (1, 0), for condition tokens: their queries and keys vanish, so that every position scores 0
    against them and reads only their values. The released weights were trained this way.
    """
    angles_LK = rotary_angles(config.grid, config.width // config.heads, config.rope_base).repeat_interleave(2, dim=1)
    sign_K = torch.tensor([-1.0, 1.0]).repeat(angles_LK.shape[1] // 2)
    tables = angles_LK.cos(), angles_LK.sin() * sign_K
    cos_TK, sin_TK = (F.pad(table_LK, (0, 0, config.condition_tokens, 0)) for table_LK in tables)
    return cos_TK[:, None, None], sin_TK[:, None, None]


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Turn the adjacent channel pairs of ``x`` (..., K): ``(a, b) -> (a cos - b sin, a sin + b cos)``."""
    swapped = x.unflatten(-1, (-1, 2)).roll(1, -1).flatten(-2)
    return torch.addcmul(x * cos, swapped, signed_sin)


class LayerCache:
    """Keys and values of one layer, allocated once for all positions, as wide as the products that read them."""

    def __init__(self, batch: int, heads: int, length: int, head_width: int, like: Tensor) -> None:
        # Position first: what one step writes is contiguous.
        shape = 2, length, batch, heads, head_width
        self._kv_2BhTK = like.new_empty(shape, dtype=product_dtype(like)).permute(0, 2, 3, 1, 4)

    def extend(self, start: int, k_BhTK: Tensor, v_BhTK: Tensor) -> tuple[Tensor, Tensor]:
        """Write at positions ``start...`` and return all keys and values up to there."""
        stop = start + k_BhTK.shape[2]
        self._kv_2BhTK[0, :, :, start:stop] = k_BhTK
        self._kv_2BhTK[1, :, :, start:stop] = v_BhTK
        keys_BhTK, values_BhTK = self._kv_2BhTK[:, :, :, :stop]
        return keys_BhTK, values_BhTK


class Attention(nn.Module):
    """Causal self-attention with rotary positions; no biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        start: int,
        cache: LayerCache | None,
        seen_B1TT: Tensor | None,
    ) -> Tensor:
        """Attend from positions ``start...`` to themselves and, through the cache, to everything before them; or to
        what ``seen_B1TT`` says of that."""
        qkv_BT3hK = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1))
        qk_BT2hK, v_BT1hK = qkv_BT3hK.split((2, 1), dim=2)
        q_BhTK, k_BhTK = rotate(qk_BT2hK, *rotary).permute(2, 0, 3, 1, 4)
        v_BhTK = v_BT1hK.squeeze(2).transpose(1, 2)
        if cache is not None:
            k_BhTK, v_BhTK = cache.extend(start, k_BhTK, v_BhTK)
        out_BhTK = F.scaled_dot_product_attention(
            q_BhTK,
            k_BhTK,
            v_BhTK,
            attn_mask=_offset_causal_mask(x_BTD, start) if seen_B1TT is None else seen_B1TT,
            is_causal=start == 0 and seen_B1TT is None,
        )
        return self.proj(out_BhTK.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _offset_causal_mask(x_BTD: Tensor, start: int) -> Tensor | None:
    """Mask of several positions that follow a cached prefix; one position alone sees everything and needs none."""
    length = x_BTD.shape[1]
    if start == 0 or length == 1:
        return None
    return torch.ones(length, start + length, dtype=torch.bool, device=x_BTD.device).tril(start)


def seen_with_captions(mask_BT: Tensor, start: int, stop: int) -> Tensor:
    """Bool (B, 1, stop - start, stop): causal, and of the caption only its own tokens, not its padding, which sees
    itself alone. ``mask_BT`` is of the caption's length, which ``stop`` is not below."""
    keys_T = torch.arange(stop, device=mask_BT.device)
    rows_T1 = keys_T[start:, None]
    there_B1T = F.pad(mask_BT, (0, stop - mask_BT.shape[1]), value=True)[:, None]
    return ((there_B1T & (keys_T <= rows_T1)) | (keys_T == rows_T1))[:, None]


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config.width, config.heads)
        self.ffn_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.ffn = FeedForward(config.width, config.ffn_hidden)

    def forward(
        self,
        h_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        start: int,
        cache: LayerCache | None,
        seen_B1TT: Tensor | None,
    ) -> Tensor:
        h_BTD = h_BTD + self.attention(self.attention_norm(h_BTD), rotary, start, cache, seen_B1TT)
        return h_BTD + self.ffn(self.ffn_norm(h_BTD))  # type: ignore[no-any-return]


class CausalTrunk(nn.Module):
    """The blocks that teacher and student share: condition tokens and image positions in, hidden states out."""

    cos: Tensor
    signed_sin: Tensor

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        cos, signed_sin = rotary_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("signed_sin", signed_sin, persistent=False)

    def forward(
        self,
        h_BTD: Tensor,
        mask_BT: Tensor | None = None,
        start: int = 0,
        caches: list[LayerCache] | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D), before the final norm, of the sequence positions ``start...``.

        ``mask_BT`` says which tokens of a caption there are (:attr:`ConditionTokens.mask_BT`). ``caches`` (one a block)
        hold the positions before ``start`` and take in the new ones.
        """
        stop = start + h_BTD.shape[1]
        rotary = self.cos[start:stop], self.signed_sin[start:stop]
        seen_B1TT = None if mask_BT is None else seen_with_captions(mask_BT, start, stop)
        for index, block in enumerate(self.blocks):
            h_BTD = block(h_BTD, rotary, start, caches[index] if caches else None, seen_B1TT)
        return h_BTD


class LlamaGenTransformer(nn.Module):
    """Condition and token ids to next-token logits."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        # Of captions too, by the name that the weight files have for it.
        self.class_embedding = condition_embedding(config.num_classes, config.captions, config.width)
        self.token_embedding = nn.Embedding(config.codebook_size, config.width)
        self.trunk = CausalTrunk(config)
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = WholeLinear(config.width, config.codebook_size, bias=False)
        self.apply(init_weights)

    def forward(self, labels_B: Condition, prefix_BlD: Tensor) -> Tensor:
        """Normed hidden states (B, L, D); row i has seen the condition and the embedded tokens 0..i-1."""
        tokens_BTD, mask_BT = self.class_embedding.tokens(labels_B)
        h_BTD = self.trunk(torch.cat([tokens_BTD, prefix_BlD], dim=1), mask_BT)
        hidden_BLD: Tensor = self.norm(h_BTD[:, tokens_BTD.shape[1] - 1 :])
        return hidden_BLD

    def classify(self, hidden_BTD: Tensor) -> Tensor:
        """Logits (B, T, V), float32, from normed hidden states."""
        logits_BTV: Tensor = self.head(hidden_BTD)
        return logits_BTV.float()


def fit_linear(linear: nn.Linear, inputs_VC: Tensor, targets_VD: Tensor) -> None:
    """Set a linear layer to the least-squares map from ``inputs_VC`` to ``targets_VD`` (in float64, on the CPU)."""
    inputs_VC = inputs_VC.detach().double().cpu()
    design = torch.cat([inputs_VC, torch.ones(len(inputs_VC), 1, dtype=torch.float64)], dim=1)
    solution = torch.linalg.lstsq(design, targets_VD.detach().double().cpu(), driver="gelsd").solution
    linear.weight.data.copy_(solution[:-1].T)
    linear.bias.data.copy_(solution[-1])


class LlamaGenTeacher(BackboneTeacher):
    """LlamaGen as a distillation teacher: transformer and tokenizer."""

    config: LlamaGenConfig
    tokenizer: LlamaGenTokenizer
    head_modules = ("norm", "head")

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.config = config
        self.layout = LevelLayout(config.level_sizes)
        self.transformer = LlamaGenTransformer(config)
        self.tokenizer = LlamaGenTokenizer(config)

    @property
    def num_conditions(self) -> int:
        """See :attr:`Teacher.num_conditions`."""
        return self.transformer.class_embedding.num_conditions

    def unconditional(self, labels_B: Tensor) -> Tensor:
        """See :meth:`Teacher.unconditional`."""
        return self.transformer.class_embedding.unconditional(labels_B)

    def guidance_scale(self, guidance: float, level: int) -> float:
        """The same scale at every level; at 1 or below LlamaGen runs without guidance (released code)."""
        return max(guidance, 1.0)

    def prefix_inputs(self, q_BLC: Tensor) -> Tensor:
        """See :meth:`BackboneTeacher.prefix_inputs`: every embedding but the last."""
        return q_BLC[:, :-1]

    def embed_prefix(self, ids_BL: Tensor) -> Tensor:
        """See :meth:`BackboneTeacher.embed_prefix`: every token but the last, looked up in the token table."""
        return self.transformer.token_embedding(ids_BL[:, :-1])  # type: ignore[no-any-return]

    def prefix_layer(self) -> nn.Linear:
        """See :meth:`BackboneTeacher.prefix_layer`: fitted to the token table."""
        layer = nn.Linear(self.config.code_dim, self.config.width)
        fit_linear(layer, self.codebook_VC, self.transformer.token_embedding.weight)
        return layer

    def hidden(self, labels_B: Condition, prefix_BlD: Tensor) -> Tensor:
        """See :meth:`BackboneTeacher.hidden`: one causal pass."""
        return self.transformer(labels_B, prefix_BlD)  # type: ignore[no-any-return]

    def classify(self, hidden_BLD: Tensor) -> Tensor:
        """See :meth:`BackboneTeacher.classify`."""
        return self.transformer.classify(hidden_BLD)

    def open(self, labels_B: Tensor, sampling: SamplingConfig) -> LlamaGenSession:
        """Start a KV-cached sampling run; guidance above 1 doubles the batch."""
        return LlamaGenSession(self, labels_B, sampling)


class LlamaGenSession(BackboneSession):
    """KV-cached sampling. Tokens appended without asking for their distribution are prefilled in one pass."""

    @torch.no_grad()
    def __init__(self, teacher: LlamaGenTeacher, labels_B: Tensor, sampling: SamplingConfig) -> None:
        config = teacher.config
        self._transformer = teacher.transformer
        self._sampling = sampling
        self._batch = len(labels_B)
        self._length = teacher.layout.length
        self._scale = teacher.guidance_scale(sampling.guidance, 0)
        self._guided = self._scale > 1
        if self._guided:
            labels_B = torch.cat([labels_B, teacher.unconditional(labels_B)])
        tokens_BTD, self._mask_BT = self._transformer.class_embedding.tokens(labels_B)
        positions = config.condition_tokens + self._length - 1
        self._caches = [
            LayerCache(len(labels_B), config.heads, positions, config.width // config.heads, tokens_BTD)
            for _ in range(config.depth)
        ]
        self._cached = 0
        self._fixed = 0
        self._pending_BTD = [tokens_BTD]
        self._hidden_B1D: Tensor | None = None

    @torch.no_grad()
    def next_hidden(self) -> Tensor:
        """See :meth:`BackboneSession.next_hidden`; raises RuntimeError once all L tokens are fixed."""
        if self._hidden_B1D is None:
            self._hidden_B1D = self._advance()
        return self._hidden_B1D

    @torch.no_grad()
    def next_log_probs(self) -> Tensor:
        """See :meth:`TeacherSession.next_log_probs`; raises RuntimeError once all L tokens are fixed."""
        logits_B1V = self._transformer.classify(self.next_hidden())
        cond_B1V, uncond_B1V = logits_B1V.chunk(2) if self._guided else (logits_B1V, None)
        return guided_log_probs(cond_B1V, uncond_B1V, self._scale, self._sampling)

    @torch.no_grad()
    def append(self, ids_Bl: Tensor) -> None:
        """See :meth:`TeacherSession.append`.

        Raises RuntimeError once all L tokens are fixed, ValueError unless the ids are of shape (B, 1).
        """
        self._check_room()
        if ids_Bl.shape != (self._batch, 1):
            raise ValueError(f"ids are {tuple(ids_Bl.shape)}, the level is {(self._batch, 1)}")
        embedding_B1D = self._transformer.token_embedding(ids_Bl)
        self._pending_BTD.append(embedding_B1D.repeat(2, 1, 1) if self._guided else embedding_B1D)
        self._fixed += 1
        self._hidden_B1D = None

    def _advance(self) -> Tensor:
        """Run the positions not yet cached and return the hidden state of the last of them."""
        self._check_room()
        h_BTD = torch.cat(self._pending_BTD, dim=1)
        h_BTD = self._transformer.trunk(h_BTD, self._mask_BT, self._cached, self._caches)
        self._cached += h_BTD.shape[1]
        self._pending_BTD = []
        hidden_B1D: Tensor = self._transformer.norm(h_BTD[:, -1:])
        return hidden_B1D

    def _check_room(self) -> None:
        if self._fixed == self._length:
            raise RuntimeError(f"all {self._length} tokens of this session are fixed already")
