"""Published VAR weights, and the DD1 students distilled from them, under ddops' names.

The published keys are those of ``var_dNN.pth`` (FoundationVision/var) and of the weights inside the released
``VAR-DD/var-dNN.pth`` (microsoft/distilled_decoding). The tokenizer is a file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ddops.config.models import VARConfig
from ddops.models.layout import LevelLayout
from ddops.models.name_map import map_state
from ddops.models.var import VARTransformer
from ddops.models.var_student import VARStudent

_TRANSFORMER = {
    "class_emb.weight": "class_embedding.weight",
    "pos_start": "start_1lD",
    "pos_1LC": "position_1LD",
    "lvl_embed.weight": "level_embedding.weight",
    "word_embed.weight": "word_embedding.weight",
    "word_embed.bias": "word_embedding.bias",
    "head_nm.ada_lin.1.weight": "head_modulation.linear.weight",
    "head_nm.ada_lin.1.bias": "head_modulation.linear.bias",
    "head.weight": "head.weight",
    "head.bias": "head.bias",
}
_SHARED_MODULATION = {
    "shared_ada_lin.1.weight": "shared_modulation.linear.weight",
    "shared_ada_lin.1.bias": "shared_modulation.linear.bias",
}
_BLOCK = {
    "attn.mat_qkv.weight": "attention.qkv.weight",
    "attn.q_bias": "attention.q_bias_D",
    "attn.v_bias": "attention.v_bias_D",
    "attn.proj.weight": "attention.out.weight",
    "attn.proj.bias": "attention.out.bias",
    "ffn.fc1.weight": "mlp.0.weight",
    "ffn.fc1.bias": "mlp.0.bias",
    "ffn.fc2.weight": "mlp.2.weight",
    "ffn.fc2.bias": "mlp.2.bias",
}
_BLOCK_L2_NORM = {"attn.scale_mul_1H11": "attention.log_scale_1H11"}
_MODULATION = {"ada_lin.1.weight": "linear.weight", "ada_lin.1.bias": "linear.bias"}
_MODULATION_OFFSET = {"ada_gss": "offset_11MD"}
_STUDENT = {
    "n_d_embed.weight": "noise_data_embedding.weight",
    "final_layer_conti.scale_shift_table": "regression_head.shift_scale_2D",
    "final_layer_conti.linear.weight": "regression_head.linear.weight",
    "final_layer_conti.linear.bias": "regression_head.linear.bias",
}


def var_teacher_state(reference: Mapping[str, Tensor], config: VARConfig) -> dict[str, Tensor]:
    """The state of ``VARTeacher.transformer`` from a published ``var_dNN.pth``.

    Raises CheckpointError where a key is missing, unexpected or misshapen for ``config``.
    """
    with torch.device("meta"):
        expected = VARTransformer(config, LevelLayout(config.level_sizes)).state_dict()
    return map_state(reference, _transformer_names(config), expected, _derived_buffers(config))


def var_student_state(reference: Mapping[str, Tensor], config: VARConfig) -> dict[str, Tensor]:
    """The state of a :class:`VARStudent` from the weights (``ema_parameters``) of a released DD1 student.

    Raises CheckpointError where a key is missing, unexpected or misshapen for ``config``.
    """
    with torch.device("meta"):
        expected = VARStudent(config).state_dict()
    names = {theirs: f"transformer.{ours}" for theirs, ours in _transformer_names(config).items()} | _STUDENT
    for index in range(config.depth + 1):
        for kind in ("weight", "bias"):
            names[f"layerwise_n_d_embed.{index}.{kind}"] = f"noise_data_linears.{index}.{kind}"
    return map_state(reference, names, expected, _derived_buffers(config))


def _transformer_names(config: VARConfig) -> dict[str, str]:
    block = _BLOCK | (_BLOCK_L2_NORM if config.attention_l2_norm else {})
    modulation = _MODULATION_OFFSET if config.shared_ada_ln else _MODULATION
    names = _TRANSFORMER | (_SHARED_MODULATION if config.shared_ada_ln else {})
    for index in range(config.depth):
        names |= {f"blocks.{index}.{theirs}": f"blocks.{index}.{ours}" for theirs, ours in block.items()}
        names |= {f"blocks.{index}.{theirs}": f"modulations.{index}.{ours}" for theirs, ours in modulation.items()}
    return names


def _derived_buffers(config: VARConfig) -> set[str]:
    """Published buffers that hold nothing learnt: the layout's levels and mask, and the zero bias of the keys."""
    return {"lvl_1L", "attn_bias_for_masking", *(f"blocks.{i}.attn.zero_k_bias" for i in range(config.depth))}
