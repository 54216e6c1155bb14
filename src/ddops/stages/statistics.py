"""What a protocol needs besides the judge: the file of statistics that it compares with, and its prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ddops.captions.store import PROMPTS, read_manifest
from ddops.config.evaluation import EvaluateConfig, ImageNetEvaluateConfig, LocalFile, T2IEvaluateConfig
from ddops.files import sha256_file
from ddops.hub.acquire import obtain_directory
from ddops.hub.files import obtain_file
from ddops.hub.records import DownloadError

if TYPE_CHECKING:
    from ddops.evaluation.ruler import Asked


def statistics_file(evaluate: EvaluateConfig) -> Path | None:
    """The verified file, fetched if need be; None for a protocol that has its own images.

    Raises:
        CheckpointError: it cannot be had; the message says what to put where.
    """
    if isinstance(evaluate, ImageNetEvaluateConfig):
        return obtain_file(evaluate.statistics, "evaluate.statistics").path
    if isinstance(evaluate, T2IEvaluateConfig):
        return _local_file(evaluate.statistics)
    return None


def asked(evaluate: EvaluateConfig, captions: Path) -> Asked | None:
    """The prompts in ``captions``, and the CLIP model, fetched if need be; None for a protocol that asks by classes.

    Raises:
        CaptionError: there are no prompts. CheckpointError: the model cannot be had.
    """
    if not isinstance(evaluate, T2IEvaluateConfig):
        return None
    from ddops.evaluation.ruler import Asked  # loads torch-fidelity, which drawing can do without

    manifest = read_manifest(captions)
    prompts = (captions / PROMPTS).read_text(encoding="utf-8").splitlines()
    clip = None if evaluate.clip is None else obtain_directory(evaluate.clip)[0]
    return Asked(prompts, manifest["prompts_sha256"], clip)


def reference_facts(evaluate: EvaluateConfig, captions: Path) -> dict[str, str | None]:
    """Hashes of what lies at hand of all that, under the names that figures state them by (``Ruler.facts``); none for
    the digits, whose images come with a package. Raises as the functions above."""
    if (statistics := statistics_file(evaluate)) is None:
        return {}
    facts: dict[str, str | None] = {"reference_sha256": sha256_file(statistics)}
    if (prompts := asked(evaluate, captions)) is not None:
        from ddops.evaluation.ruler import CLIP_WEIGHTS

        clip = prompts.clip
        facts["prompts_sha256"] = prompts.sha256
        facts["clip_sha256"] = None if clip is None else sha256_file(clip / CLIP_WEIGHTS)
    return facts


def _local_file(config: LocalFile) -> Path:
    path = Path(config.path).expanduser()
    if not path.is_file():
        raise DownloadError(f"{path}: no such file; evaluate.statistics.path is a file of the real images' statistics")
    if config.sha256 is not None and (found := sha256_file(path)) != config.sha256:
        raise DownloadError(f"{path}: has sha256 {found}, evaluate.statistics says {config.sha256}")
    return path
