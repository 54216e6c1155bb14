"""The stages that train, or fetch what others trained: what is run of them, and what of it counts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ddops.config.stages import (
    DownloadedTeacherConfig,
    PublishedFile,
    ReleasedDD1Config,
    StudentDownloadConfig,
    TeacherDownloadConfig,
)
from ddops.data import digits
from ddops.pretrain.teacher import reseed_schedule
from ddops.stages import paths
from ddops.stages.ar_diffusion import ar_diffusion
from ddops.stages.distill_dd1 import distill_dd1
from ddops.stages.distill_dd2 import distill_dd2
from ddops.stages.features import features
from ddops.stages.teacher import teacher
from helpers.few_digits import few_digits
from helpers.published_world import MODELS, published_files
from helpers.recipes import digest
from helpers.recipes.digest import Digest
from helpers.recipes.inputs import (
    IMAGES,
    config_of,
    write_all,
    write_captions,
    write_classifier,
    write_teacher,
    write_trajectories,
)
from helpers.recipes.run import Variants, run, variants

HALF = {"training__precision": "bfloat16"}
MUON = {"training__optimizer": "muon"}


def _features(family: str, **changes: Any) -> Digest:
    """On the whole embedded data set, which is a part of what the stage computes."""
    run(features, config_of(family, **changes))
    metrics = json.loads(paths.FEATURES_METRICS.read_text())
    data = digits.load()
    return {
        "weights": digest.weights(paths.CLASSIFIER),
        "losses": {name: curve for name, curve in digest.curves(paths.CURVES).items() if name != "accuracy"},
        "metrics": {"name": metrics["name"], "heldout": metrics["heldout"]},
        # One image more or less, on another processor, moves the share.
        "right": {"many": metrics["heldout_accuracy"] > 0.5},
        "data": {"mean": float(data.images_NIHW.mean()), "labels": data.labels_N.bincount().tolist()},
    }


def _teacher(family: str, **changes: Any) -> Digest:
    config = config_of(family, **changes)
    if family == "t2i":
        write_captions(config)
    with few_digits(IMAGES):
        run(teacher, config)
    return {
        "weights": {name: digest.weights(file) for name, file in _teacher_files().items()},
        "losses": {name: digest.curves(paths.CURVES / name) for name in ("tokenizer", "teacher")},
        "reseeds": _reseeds(),
    }


def _reseeds() -> list[int]:
    """Steps of a longer training before which unused codes move."""
    seen: list[int] = []
    before_step = reseed_schedule(torch.zeros(1), 300)
    for step in range(300):
        module = torch.nn.Linear(1, 1)
        module.reseed_unused_codes = lambda _, step=step: seen.append(step)
        before_step(module, step)
    return seen


def _downloaded_teacher(family: str) -> Digest:
    run(teacher, _published(family))
    return {"weights": {name: digest.weights(file) for name, file in _teacher_files().items()}}


def _dd1(family: str, **changes: Any) -> Digest:
    config = config_of(family, **{f"dd1__{name}": value for name, value in changes.items()})
    write_all(config)
    paths.DD1_STUDENT.unlink()
    with few_digits(IMAGES):
        run(distill_dd1, config)
    return _trained(paths.DD1_STUDENT, "dd1")


def _released_dd1(family: str) -> Digest:
    config = _published(family)
    write_teacher(config)
    run(distill_dd1, config)
    return {"weights": digest.weights(paths.DD1_STUDENT)}


def _ar_diffusion(family: str, **changes: Any) -> Digest:
    config = config_of(family, **{f"ar_diffusion__{name}": value for name, value in changes.items()})
    write_classifier(config)
    write_teacher(config)
    write_trajectories(config)
    with few_digits(IMAGES):
        run(ar_diffusion, config)
    return _trained(paths.AR_DIFFUSION, "ar_diffusion")


def _dd2(family: str, head: str = "codes", **changes: Any) -> Digest:
    heads = {} if family == "t2i" else {"ar_diffusion__head__predicts": head}
    config = config_of(family, **heads, **{f"dd2__{name}": value for name, value in changes.items()})
    write_all(config)
    paths.DD2_GENERATOR.unlink()
    with few_digits(IMAGES):
        run(distill_dd2, config)
    pictures = sorted(file.name for file in (paths.CURVES / "dd2").glob("*.png"))
    found = _trained(paths.DD2_GENERATOR, "dd2")
    played = {"alternating": found.pop("losses"), "generator": found.pop("weights")}
    return {**played, **found, "pictures": pictures}


def _trained(file: Path, curves: str) -> Digest:
    return {"weights": digest.weights(file), **_split(digest.curves(paths.CURVES / curves))}


def _split(curves: Digest) -> Digest:
    """Losses, and figures of what the model draws."""
    loose = {name for name in curves if name.startswith("fid") or name in ("recall", "diversity", "accuracy")}
    return {
        # A level may be a token a sample, and its curve one that rounding flips; the sum of the levels is there.
        "losses": {name: curves[name] for name in sorted(curves.keys() - loose) if "_level" not in name},
        "drawn": {name: curves[name] for name in sorted(loose)},
    }


def _teacher_files() -> dict[str, Path]:
    return {"tokenizer": paths.TOKENIZER, "transformer": paths.TRANSFORMER}


def _published(family: str) -> Any:
    """Sections of settings for published weights, which lie here as their authors lay them out."""
    Path("published").mkdir()
    for name, content in published_files().items():
        Path("published", Path(name).name).write_bytes(content)
    files = [PublishedFile(name=name, layout=layout) for name, layout in PUBLISHED[family]]
    source = {"repo": "a/b", "revision": "main", "path": "published"}
    teacher_source = TeacherDownloadConfig(**source, tokenizer=files[0], transformer=files[1])
    return SimpleNamespace(
        seed=0,
        features=None,
        teacher=DownloadedTeacherConfig(model=MODELS[family], source="download", download=teacher_source),
        dd1=ReleasedDD1Config(
            start_positions=(0, 2),
            logit_prefix=2,
            source="released",
            download=StudentDownloadConfig(**source, student=files[2]),
        ),
    )


PUBLISHED = {
    "var": (("vae_ch160v4096z32.pth", "flat"), ("var_d16.pth", "flat"), ("var-d16.pth", "trainer.ema_parameters")),
    "llamagen": (("vq_ds16_c2i.pt", "model"), ("c2i_B_256.pt", "model"), ("llamagen-B.pt", "ema")),
}
"""Tokenizer, transformer and student: file and layout."""
AR_GUIDANCE = {"guidance__start": "ar_diffusion"}
PAPER = {
    **AR_GUIDANCE,
    **{"start": "ar_diffusion", "output": "embeddings", "anchor_weight": 0.0, "training__learning_rate": 0.01},
    "training__final_learning_rate": 0.005,
}
VARIANTS: Variants = {
    "features": variants(_features, classifier=("llamagen",)),
    "teacher": variants(
        _teacher,
        llamagen=("llamagen",),
        var=("var",),
        captions=("t2i",),
        muon=("llamagen", {f"teacher__{name}": value for name, value in MUON.items()}),
        bfloat16=("var", {f"teacher__{name}": value for name, value in HALF.items()}),
    )
    | variants(_downloaded_teacher, published_var=("var",), published_llamagen=("llamagen",)),
    "distill_dd1": variants(
        _dd1,
        llamagen=("llamagen",),
        var=("var",),
        captions=("t2i",),
        muon=("llamagen", MUON),
        bfloat16=("llamagen", HALF),
        plain=("llamagen", {"perceptual__weight": 0.0, "embedding_weight": 0.0}),
        regressed=("var", {"logit_prefix": 1, "embedding_weight": 1.0, "cross_entropy_weight": 0.5}),
    )
    | variants(_released_dd1, released_var=("var",), released_llamagen=("llamagen",)),
    "ar_diffusion": variants(
        _ar_diffusion,
        llamagen=("llamagen",),
        var=("var",),
        velocity=("llamagen", {"weighting": "velocity"}),
        flow_matching=("llamagen", {"target": "flow_matching"}),
        embedding=("var", {"head__predicts": "embedding"}),
        muon=("var", MUON),
        bfloat16=("llamagen", HALF),
    ),
    "distill_dd2": variants(
        _dd2,
        llamagen=("llamagen",),
        var=("var",),
        captions=("t2i",),
        paper=("llamagen", {**PAPER, "head": "embedding"}),
        paper_var=("var", {**PAPER, "head": "embedding", "weighting": "score", "normalization": "none"}),
        from_teacher=("var", {**AR_GUIDANCE, "start": "teacher", "normalization": "direction"}),
        codes_head=("llamagen", {**AR_GUIDANCE, "start": "ar_diffusion", "weighting": "velocity"}),
        jensen_shannon=("llamagen", {"divergence": "jensen_shannon", "guidance__ema_decay": 0.8}),
        forward=("var", {"divergence": "forward", "guidance__optimizer": "muon", **MUON}),
        bfloat16=("llamagen", HALF),
    ),
}
