"""The networks of transformers, in its one place: a T5 that encodes captions. An extra: ``ddops[t2i]``.

Loaded from a directory, without a network and without running code in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddops.captions.errors import CaptionError
from ddops.config.captions import SeededEncoderConfig
from ddops.torchvision_compat import define_missing_operators

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


class TextEncoder:
    """A T5 encoder and its tokenizer. Not for several threads at once."""

    def __init__(self, directory: Path, length: int, device: torch.device | str = "cpu") -> None:
        """From the files in ``directory``; captions longer than ``length`` tokens are cut.

        Raises:
            CaptionError: transformers is not installed, or there is no encoder that it reads.
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


def write_seeded_encoder(directory: Path, config: SeededEncoderConfig, prompts: Iterable[str]) -> None:
    """A small T5 with random weights, a function of the seed, whose tokens are the words of some prompts; the files
    that :class:`TextEncoder` reads.

    Raises:
        CaptionError: transformers is not installed.
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
    except ImportError:
        raise CaptionError("captions are encoded by transformers: pip install 'ddops[t2i]'") from None
    transformers.utils.logging.disable_progress_bar()
    return transformers
