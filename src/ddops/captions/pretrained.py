"""The networks of transformers, in its one place: a T5 that encodes captions, and a CLIP that compares images with
them. An extra: ``ddops[t2i]``.

Loaded from a directory, without a network and without running code in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddops.captions.errors import CaptionError
from ddops.config.captions import SeededEncoderConfig
from ddops.extras import explained
from ddops.torchvision_compat import define_missing_operators

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels that the published CLIP models were trained on."""
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


class TextEncoder:
    """A T5 encoder and its tokenizer. Not for several threads at once."""

    def __init__(self, directory: Path, length: int, device: torch.device | str = "cpu") -> None:
        """From the files in ``directory``; captions longer than ``length`` tokens are cut.

        Raises:
            CaptionError: there is no encoder that transformers reads. MissingExtra: it is not installed.
        """
        transformers = _transformers()
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
            self._model = transformers.T5EncoderModel.from_pretrained(
                directory, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise CaptionError(f"{directory}: holds no T5 encoder that transformers reads: {error}") from error
        self._model = self._model.eval().requires_grad_(False).to(device)
        self._device, self.length = device, length
        self.width: int = self._model.config.d_model

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str]) -> list[Tensor]:
        """Features (n, W) of each prompt's n tokens, float32 on the CPU."""
        tokens = self._tokenizer(
            list(prompts), max_length=self.length, truncation=True, padding=True, return_tensors="pt"
        ).to(self._device)
        hidden_BnW = self._model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        # Copies: a view would keep the batch, with its padding, in memory.
        return [
            hidden_nW[mask_n.bool()].clone().cpu()
            for hidden_nW, mask_n in zip(hidden_BnW, tokens.attention_mask, strict=True)
        ]


class ImageTextModel:
    """A CLIP model (arXiv 2103.00020) and its tokenizer. Not for several threads at once."""

    def __init__(self, directory: Path, device: torch.device | str = "cpu") -> None:
        """From the files in ``directory``.

        Raises:
            CaptionError: there is no CLIP model that transformers reads. MissingExtra: it is not installed.
        """
        transformers = _transformers()
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
            model = transformers.CLIPModel.from_pretrained(
                directory, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise CaptionError(f"{directory}: holds no CLIP model that transformers reads: {error}") from error
        self._model, self._device = model.eval().requires_grad_(False).to(device), device

    @torch.inference_mode()
    def similarity(self, images_BIHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine (B,) between each uint8 image and its prompt, float64 on the CPU.

        Images are brought to the model's size (bicubic, antialiased) and normalised as the published models were
        trained; prompts longer than the model takes are cut.
        """
        vision, text = self._model.config.vision_config, self._model.config.text_config
        pixels_BIHW = images_BIHW.to(self._device).float().div(255)
        if pixels_BIHW.shape[1] == 1:
            pixels_BIHW = pixels_BIHW.expand(-1, 3, -1, -1)
        size = (vision.image_size, vision.image_size)
        pixels_BIHW = F.interpolate(pixels_BIHW, size, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(values, device=self._device).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        tokens = self._tokenizer(
            list(prompts), max_length=text.max_position_embeddings, truncation=True, padding=True, return_tensors="pt"
        ).to(self._device)
        output = self._model(
            pixel_values=(pixels_BIHW - mean) / std,
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
        )
        return F.cosine_similarity(output.image_embeds.double(), output.text_embeds.double()).cpu()


def write_seeded_encoder(directory: Path, config: SeededEncoderConfig, prompts: Iterable[str]) -> None:
    """A small T5 with random weights, a function of the seed, whose tokens are the words of some prompts; the files
    that :class:`TextEncoder` reads.

    Raises:
        MissingExtra: transformers is not installed.
    """
    transformers = _transformers()
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    words = sorted({word for prompt in prompts for word in prompt.lower().replace(",", " , ").split()})
    vocabulary = {word: number for number, word in enumerate([PAD, END, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(","), "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(f"$A {END}", special_tokens=[(END, vocabulary[END])])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN
    )
    shape = transformers.T5Config(
        vocab_size=len(vocabulary),
        d_model=config.width,
        d_kv=config.width // config.heads,
        d_ff=2 * config.width,
        num_layers=config.layers,
        num_heads=config.heads,
        pad_token_id=vocabulary[PAD],
        eos_token_id=vocabulary[END],
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = transformers.T5EncoderModel(shape)
    directory.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(directory)
    model.save_pretrained(directory)


def _transformers() -> Any:
    define_missing_operators()
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise explained(error, "what reads captions") from None
    transformers.utils.logging.disable_progress_bar()
    return transformers
