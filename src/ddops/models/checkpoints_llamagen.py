"""Published LlamaGen weights, and the DD1 students distilled from them, under ddops' names.

The published keys are those of ``c2i_*.pt`` (FoundationVision/LlamaGen; the dict under ``model``, or the whole file
for XXL and 3B), of ``t2i_XL_*.pt`` (peizesun/llamagen_t2i; the dict under ``model``) and of
``LlamaGen-DD/llamagen-*.pt`` (microsoft/distilled_decoding; the dict under ``ema``). The tokenizer is a file of its
own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from ddops.config.models import LlamaGenConfig
from ddops.models.llamagen import LlamaGenTransformer
from ddops.models.llamagen_student import LlamaGenStudent
from ddops.models.name_map import map_state

_CLASSES: Final = {"cls_embedding.embedding_table.weight": "class_embedding.weight"}
_CAPTIONS: Final = {
    "cls_embedding.cap_proj.fc1.weight": "class_embedding.fc1.weight",
    "cls_embedding.cap_proj.fc2.weight": "class_embedding.fc2.weight",
    "cls_embedding.uncond_embedding": "class_embedding.uncond_TW",
}
_SHARED: Final = {
    "norm.weight": "norm.weight",
    "output.weight": "head.weight",
}
_BLOCK: Final = {
    "attention_norm.weight": "attention_norm.weight",
    "attention.wqkv.weight": "attention.qkv.weight",
    "attention.wo.weight": "attention.proj.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "feed_forward.w1.weight": "ffn.gate.weight",
    "feed_forward.w3.weight": "ffn.up.weight",
    "feed_forward.w2.weight": "ffn.down.weight",
}
_TEACHER: Final = {"tok_embeddings.weight": "token_embedding.weight"}
_STUDENT: Final = {
    "tok_embeddings.weight": "input_proj.weight",
    "tok_embeddings.bias": "input_proj.bias",
    "n_d_embed.weight": "noise_data_embedding.weight",
    "final_layer_conti.scale_shift_table": "embedding_head.shift_scale_2D",
    "final_layer_conti.linear.weight": "embedding_head.proj.weight",
    "final_layer_conti.linear.bias": "embedding_head.proj.bias",
}
_DERIVED: Final = frozenset({"freqs_cis"})
"""The rotary table, which some files carry and ddops computes."""


def llamagen_teacher_state(reference: Mapping[str, Tensor], config: LlamaGenConfig) -> dict[str, Tensor]:
    """The state of ``LlamaGenTeacher.transformer`` from a published ``c2i_*.pt`` or ``t2i_*.pt``.

    Raises CheckpointError where a key is missing, unexpected or misshapen for ``config``.
    """
    with torch.device("meta"):
        expected = LlamaGenTransformer(config).state_dict()
    return map_state(reference, _names(config, _TEACHER), expected, _DERIVED)


def llamagen_student_state(reference: Mapping[str, Tensor], config: LlamaGenConfig) -> dict[str, Tensor]:
    """The state of a :class:`LlamaGenStudent` from the weights (``ema``) of a released DD1 student.

    Raises CheckpointError where a key is missing, unexpected or misshapen for ``config``.
    """
    with torch.device("meta"):
        expected = LlamaGenStudent(config).state_dict()
    return map_state(reference, _names(config, _STUDENT), expected, _DERIVED)


def _names(config: LlamaGenConfig, own: Mapping[str, str]) -> dict[str, str]:
    names = {**(_CLASSES if config.captions is None else _CAPTIONS), **_SHARED, **own}
    for index in range(config.depth):
        names |= {f"layers.{index}.{theirs}": f"trunk.blocks.{index}.{ours}" for theirs, ours in _BLOCK.items()}
    return names
