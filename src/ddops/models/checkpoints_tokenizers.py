"""The published tokenizer checkpoints' names for our weights.

Both families hold one architecture under different names. What differs besides the names: LlamaGen has attention's
query, key and value as three convolutions where VAR and we have one; VAR lists the decoder's stages by resolution,
full size first, where LlamaGen and we list them as they run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import torch
from torch import Tensor

from ddops.config.models import LlamaGenConfig, VARConfig
from ddops.models.llamagen_tokenizer import LlamaGenTokenizer
from ddops.models.name_map import map_state
from ddops.models.var_tokenizer import VARTokenizer

VAR_IGNORED: Final = ("quantize.ema_vocab_hit_SV",)
"""How often each scale used each code in training."""
LLAMAGEN_IGNORED: Final = ("quantize.codebook_used",)
"""The codes last used in training."""


def var_tokenizer_state(reference: Mapping[str, Tensor], config: VARConfig) -> dict[str, Tensor]:
    """State dict of :class:`VARTokenizer` from a published one (the file ``vae_ch160v4096z32.pth``).

    Raises:
        CheckpointError: a published key is missing, unexpected or of another shape than ``config`` asks for.
    """
    with torch.device("meta"):
        expected = VARTokenizer(config).state_dict()
    fragments = _var_fragments(len(config.autoencoder.channel_multipliers))
    return map_state(reference, _published_names(expected, fragments), expected, VAR_IGNORED)


def llamagen_tokenizer_state(reference: Mapping[str, Tensor], config: LlamaGenConfig) -> dict[str, Tensor]:
    """State dict of :class:`LlamaGenTokenizer` from a published one (the ``model`` entry of ``vq_ds16_c2i.pt``).

    Raises:
        CheckpointError: a published key is missing, unexpected or of another shape than ``config`` asks for.
    """
    with torch.device("meta"):
        expected = LlamaGenTokenizer(config).state_dict()
    split = _split_qkv(expected)
    fragments = _llamagen_fragments(len(config.autoencoder.channel_multipliers))
    return _fuse_qkv(map_state(reference, _published_names(split, fragments), split, LLAMAGEN_IGNORED), expected)


def _published_names(ours: Iterable[str], fragments: Mapping[str, str]) -> dict[str, str]:
    """Published key -> our key. ``fragments`` are replaced in our keys one after the other."""
    names = {}
    for key in ours:
        published = key
        for fragment, replacement in fragments.items():
            published = published.replace(fragment, replacement)
        names[published] = key
    return names


def _var_fragments(stages: int) -> dict[str, str]:
    fragments = {"codebook": "quantize.embedding.weight", "phis.": "quantize.quant_resi.qresi_ls."}
    for index in range(stages):
        encoder, decoder = f"encoder.down.{index}.", f"decoder.up.{stages - 1 - index}."
        fragments |= _stage_fragments(index, encoder, decoder)
    return fragments | {
        ".blocks.": ".block.",
        ".middle.0.": ".mid.block_1.",
        ".middle.1.": ".mid.attn_1.",
        ".middle.2.": ".mid.block_2.",
        **_LAYER_FRAGMENTS,
    }


def _llamagen_fragments(stages: int) -> dict[str, str]:
    fragments = {"codebook": "quantize.embedding.weight"}
    for index in range(stages):
        encoder, decoder = f"encoder.conv_blocks.{index}.", f"decoder.conv_blocks.{index}."
        fragments |= _stage_fragments(index, encoder, decoder)
    return fragments | {".blocks.": ".res.", ".middle.": ".mid.", **_LAYER_FRAGMENTS}


def _stage_fragments(index: int, encoder: str, decoder: str) -> dict[str, str]:
    """Stage ``index`` of our encoder and of our decoder, under their published names."""
    return {
        f"encoder.stages.{index}.resample.1.": f"{encoder}downsample.conv.",
        f"decoder.stages.{index}.resample.1.": f"{decoder}upsample.conv.",
        f"encoder.stages.{index}.": encoder,
        f"decoder.stages.{index}.": decoder,
    }


_LAYER_FRAGMENTS: Final = {".attentions.": ".attn.", ".shortcut.": ".nin_shortcut.", ".out.": ".proj_out."}
"""Layers that both families name alike."""


def _split_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each fused ``qkv`` entry as three, ``q``, ``k`` and ``v``."""
    split: dict[str, Tensor] = {}
    for key, value in state.items():
        if ".qkv." in key:
            split |= dict(zip(_qkv_parts(key), value.chunk(3), strict=True))
        else:
            split[key] = value
    return split


def _fuse_qkv(split: Mapping[str, Tensor], fused_keys: Iterable[str]) -> dict[str, Tensor]:
    """The inverse of :func:`_split_qkv`."""
    return {
        key: torch.cat([split[part] for part in _qkv_parts(key)]) if ".qkv." in key else split[key]
        for key in fused_keys
    }


def _qkv_parts(key: str) -> list[str]:
    return [key.replace(".qkv.", f".{part}.") for part in "qkv"]
