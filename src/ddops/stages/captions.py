"""Stage ``captions``: encode the prompts of a text-to-image pipeline; nothing where the models draw for classes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ddops.config.captions import CaptionsConfig, EncodedCaptionsConfig, NoCaptionsConfig, PublishedEncoderConfig
from ddops.files import sha256_file, write_json
from ddops.stages import paths
from ddops.stages.common import run_stage, write_not_trained

FACTS = "encoder.json"


def captions(captions: CaptionsConfig) -> None:
    """Write ``data/captions/<set>``, and what their encoder is.

    Raises:
        CaptionError: the prompts cannot be read, or transformers is not installed.
        CheckpointError: the encoder cannot be had.
    """
    if isinstance(captions, NoCaptionsConfig):
        shutil.rmtree(paths.CAPTIONS, ignore_errors=True)
        write_not_trained("captions", [paths.CAPTIONS])
        return
    _encode(captions)


def _encode(config: EncodedCaptionsConfig) -> None:
    # Here, because a pipeline of classes need not wait for torch.
    from ddops.captions.encode import encode_set, load_prompts
    from ddops.captions.pretrained import TextEncoder

    (paths.CAPTIONS / "origin.json").unlink(missing_ok=True)
    sets = {
        paths.TRAIN_CAPTIONS: load_prompts(config.sets.train),
        paths.EVALUATE_CAPTIONS: load_prompts(config.sets.evaluate),
    }
    directory, facts = _encoder(config, [text for prompts in sets.values() for text in prompts.texts])
    encoder = TextEncoder(directory, config.length, _device())
    for target, prompts in sets.items():
        encode_set(target, prompts, encoder, config, facts)
    write_json(paths.TEXT_ENCODER / FACTS, {"length": config.length, "width": encoder.width, "encoder": facts})


def _encoder(config: EncodedCaptionsConfig, prompts: list[str]) -> tuple[Path, dict[str, Any]]:
    """The directory of the encoder's files, and what it is."""
    from ddops.captions.pretrained import write_seeded_encoder

    if isinstance(config.encoder, PublishedEncoderConfig):
        from ddops.hub.acquire import obtain_directory

        shutil.rmtree(paths.TEXT_ENCODER, ignore_errors=True)
        directory, fetched = obtain_directory(config.encoder)
        files = dict(zip(config.encoder.files, (file.sha256 for file in fetched), strict=True))
        commit = fetched[0].origin.partition("@")[2].partition("/")[0] or None
        return directory, {"name": "t5", "repo": config.encoder.repo, "revision": commit, "files": files}
    write_seeded_encoder(paths.TEXT_ENCODER, config.encoder, prompts)
    files = {path.name: sha256_file(path) for path in sorted(paths.TEXT_ENCODER.iterdir()) if path.name != FACTS}
    return paths.TEXT_ENCODER, {"name": "seeded", "repo": None, "revision": None, "files": files}


def _device() -> str:
    from ddops.evaluation.device import accelerator

    return str(accelerator())


if __name__ == "__main__":
    run_stage(captions)
