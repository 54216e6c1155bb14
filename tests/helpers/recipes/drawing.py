"""The stages that draw and judge: what is run of them, and what of it counts."""

from __future__ import annotations

import json
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ddops.captions.store import CaptionSet
from ddops.config.stages import TrajectoriesConfig
from ddops.evaluation.samples import open_samples
from ddops.export.manifest import MODEL, Manifest, ModelFacts, OnnxFacts, write_manifest
from ddops.export.session import open_session, run_session
from ddops.files import sha256_file, write_json
from ddops.flow.solvers import solve_flow
from ddops.production import Registry
from ddops.stages import paths
from ddops.stages.build_engine import build
from ddops.stages.captions import captions
from ddops.stages.common import ModelRefusedError
from ddops.stages.evaluate import evaluate
from ddops.stages.export_onnx import export
from ddops.stages.gate import gate
from ddops.stages.report import report
from ddops.stages.sample import sample
from ddops.stages.trajectories import trajectories
from ddops.trajectories.dataset import TrajectoryDataset
from helpers.few_digits import few_digits
from helpers.recipes import digest
from helpers.recipes.digest import Digest
from helpers.recipes.inputs import (
    IMAGES,
    config_of,
    numbers,
    write_all,
    write_captions,
    write_classifier,
    write_samples_manifest,
    write_samples_of,
    write_students,
    write_teacher,
)
from helpers.recipes.run import Variants, run, variants


def _captions(family: str, **changes: Any) -> Digest:
    run(captions, config_of(family, **{f"captions__{name}": value for name, value in changes.items()}))
    if family != "t2i":
        return {
            "files": sorted(str(file) for file in paths.CAPTIONS.rglob("*")),
            **_json(paths.CAPTIONS / "origin.json"),
        }
    found = CaptionSet(paths.TRAIN_CAPTIONS)
    features_BTW, mask_BT = found.captions(torch.arange(len(found)))
    reference_TW = numbers("reference", found.length, found.width)
    settings = _json(paths.TRAIN_CAPTIONS / "manifest.json")["settings"]
    return {
        # T5 ends in a norm, so that lengths alone would say nothing.
        "weights": {"distances": (features_BTW - reference_TW).flatten(1).norm(dim=1).tolist()},
        "lengths": mask_BT.sum(1).tolist(),
        "prompts": found.prompts,
        "classes": found.classes,
        "of_images": np.bincount(found.of_images or []).tolist(),
        "settings": {name: settings[name] for name in ("length", "dtype", "shard_size")},
    }


def _trajectories(family: str, **changes: Any) -> Digest:
    sampling = {name: changes.pop(name) for name in ("top_k", "top_p") if name in changes}
    config = config_of(
        family,
        **{f"trajectories__{name}": value for name, value in changes.items()},
        **{f"sampling__{name}": value for name, value in sampling.items()},
    )
    if family == "t2i":
        write_captions(config)
    write_teacher(config)
    run(trajectories, config)
    found = TrajectoryDataset(paths.TRAJECTORIES, config.teacher.model.code_dim)
    noise_BLC = found.batch(torch.arange(4)).noise_BLC
    settings = _json(paths.TRAJECTORIES / "manifest.json")["settings"]
    return {
        "ids": digest.tokens(found.ids_NL.numpy()),
        "labels": found.labels_N.tolist(),
        "noise": {"norm": float(noise_BLC.norm()), "first": noise_BLC.flatten()[:4].tolist()},
        "settings": {key: value for key, value in digest.plain(settings).items() if key != "recipe"},
        "evaluations": _evaluations(config.trajectories),
    }


def _evaluations(config: TrajectoriesConfig) -> float:
    """Posterior means a token: other steps that lead to the same codes are another computation."""
    log_p_NV = numbers("logits", 400, 32).mul(2).log_softmax(-1)
    solution = solve_flow(
        numbers("flow noise", 400, 4),
        log_p_NV,
        numbers("codes", 32, 4),
        solver=config.solver,
        evaluations=config.evaluations,
        tolerance=config.tolerance,
    )
    return float(solution.evaluations_N.double().mean())


def _sample(family: str, rows: str, **changes: Any) -> Digest:
    config = config_of(family, evaluate__rows=rows.split(), **changes)
    write_all(config)
    with few_digits(IMAGES):
        run(sample, config)
    files = sorted(paths.SAMPLES.rglob("*.npz"))
    drawn = {str(file.relative_to(paths.SAMPLES)): open_samples(file) for file in files}
    manifest = digest.plain(_json(paths.SAMPLES_MANIFEST))
    return {
        "rows": manifest["rows"],
        "models": sorted(_json(paths.SAMPLES_MANIFEST)["models"]),
        "labels": {name: samples.labels_N.tolist() for name, samples in drawn.items() if "teacher/" in name},
        "figures": {name: digest.images(torch.cat(list(samples.batches(64)))) for name, samples in drawn.items()},
        "grids": {file.name: Image.open(file).size for file in sorted(paths.GRIDS.iterdir())},
    }


def _evaluate(family: str, **changes: Any) -> Digest:
    config = config_of(family, **{f"evaluate__{name}": value for name, value in changes.items()})
    with few_digits(IMAGES):
        write_classifier(config)
        for row in ("teacher", "dd1_1step"):
            for seed in config.evaluate.seeds:
                write_samples_of(config, row, seed)
        write_samples_of(config, "reconstruction", 0)
        facts = {"passes": 16, "parameters": 5}
        write_samples_manifest({"teacher": facts, "dd1_1step": {**facts, "passes": 1}})
        run(evaluate, config)
    metrics = digest.plain(_json(paths.METRICS))
    table = [line.split(",")[0] for line in paths.ROWS_TABLE.read_text().splitlines()]
    protocol = {key: value for key, value in metrics.pop("protocol").items() if key != "recipes"}
    metrics.pop("models")
    return {
        "figures": metrics,
        "protocol": protocol,
        "table": table,
        "heading": paths.ROWS_TABLE.read_text().split("\n")[0],
    }


RULES = {
    "good": {"value": "student.fid", "max": 4.0},
    "near": {"value": "student.fid", "relative_to": "teacher.fid", "max": 1.5},
    "covers": {"value": "student.recall", "min": 0.75},
    "not worse": {"value": "student.fid", "relative_to": "production", "max": 1.1},
}


def _gate(fid: float, production: float | None = None, *, override: bool = False, other_model: bool = False) -> Digest:
    """Of figures of a student: the whole decision, and whether the stage refused."""
    by_name = {"student_sha256": "", "by": "Ada", "reason": "a test"}
    files = {"tokenizer": paths.TOKENIZER, "teacher": paths.TRANSFORMER, **paths.STUDENTS}
    for name, path in (*files.items(), ("classifier", paths.CLASSIFIER)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    by_name["student_sha256"] = sha256_file(paths.DD2_GENERATOR)
    config = config_of("llamagen", gate__rules=RULES, gate__override=by_name if override else None)
    from ddops.config.base import plain
    from ddops.evaluation.gate import recipes_of_figures
    from ddops.files import sha256_json
    from ddops.stages.common import drawing_of

    protocol = {
        "name": "digits",
        "recipes": recipes_of_figures(),
        "settings_sha256": sha256_json(plain(config.evaluate)),
        "features_sha256": sha256_file(paths.CLASSIFIER),
        "drawing_sha256": drawing_of(config),
    }
    models = {name: sha256_file(path) for name, path in files.items()}
    if other_model:
        models["dd2"] = "00" * 32
    rows = {"teacher": {"fid": 2.5, "recall": 0.9}, "dd2_1step": {"fid": fid, "recall": 0.8}}
    write_json(paths.METRICS, {"protocol": protocol, "models": models, **rows})
    if production is not None:
        facts = {"preset": "a", "files": {}, "row": "dd2_1step"}
        facts["metrics"] = {"protocol": protocol, "dd2_1step": {"fid": production}}
        Registry.load(paths.PRODUCTION).promote("v1.0.0", facts, by="Ada", reason="a test")
    refused = True
    with suppress(ModelRefusedError):
        run(gate, config)
        refused = False
    decision = digest.plain(_json(paths.GATE_DECISION))
    decision.pop("override")
    for check in decision["checks"]:
        check.pop("detail")
    return {"refused": refused, "decision": decision}


def _write_decision(student_sha256: str, *, passed: bool) -> None:
    rule = {"rule": "near", "quantity": "a.fid / b.fid", "value": 1.2, "bound": "at most 2", "passed": passed}
    check = {"name": "the figures are of this dd2", "passed": True, "detail": "ef"}
    outcome = {"passed": passed, "outcome": "accepted" if passed else "refused", "override": None}
    write_json(paths.GATE_DECISION, {**outcome, "student_sha256": student_sha256, "checks": [check], "rules": [rule]})


def _export(family: str, student: str, steps: int, **changes: Any) -> Digest:
    """The graph's images, which is what it is for; its nodes are PyTorch's business."""
    config = config_of(
        family,
        export__student=student,
        export__steps=steps,
        evaluate__rows=[f"{student}_{steps}step"],
        **{f"export__{name}": value for name, value in changes.items()},
    )
    if family == "t2i":
        write_captions(config)
    write_teacher(config)
    write_students(config)
    _write_decision(sha256_file(paths.STUDENTS[student]), passed=True)
    write_json(paths.METRICS, {"protocol": {"name": "digits"}, config.export.row: {"fid": 7.5}})
    run(export, config)
    session = open_session(paths.ONNX_BUNDLE / MODEL, precision=config.export.precision)
    model = config.teacher.model
    given: list[Any] = [numbers("noise", 6, sum(model.level_sizes), model.code_dim).numpy()]
    if family == "t2i":
        found = CaptionSet(paths.TRAIN_CAPTIONS).captions(torch.arange(6))
        given += [part.numpy() for part in found]
    else:
        given.append(np.arange(6, dtype=np.int64))
    images = torch.from_numpy(run_session(session, *given)).float()
    manifest = digest.plain(_json(paths.ONNX_BUNDLE / "manifest.json"))
    parity = _json(paths.EXPORT_METRICS)
    return {
        "inputs": [[each.name, [str(side) for side in each.shape]] for each in session.get_inputs()],
        "model": manifest["model"],
        "onnx": manifest["onnx"],
        "report": {key: parity[key] for key in ("precision", "steps")} | {"keys": sorted(parity)},
        "figures": {"mean": float(images.mean()), "norms": images.flatten(1).norm(dim=1).tolist()},
    }


def _build(**changes: Any) -> Digest:
    """Without engines, which want a GPU's library: the bundle, and what Triton is told."""
    paths.ONNX_BUNDLE.mkdir(parents=True)
    graph = paths.ONNX_BUNDLE / MODEL
    graph.write_text("a graph")
    facts = ModelFacts(
        num_classes=10,
        class_names=None,
        length=16,
        code_dim=8,
        image_size=8,
        image_channels=1,
        steps=1,
        start_positions=(0, 2),
        logit_prefix=16,
        noise="a test",
    )
    onnx = OnnxFacts(opset=18, precision="float32", sha256=sha256_file(graph), external_sha256=None)
    manifest = Manifest(format=1, facts={"ddops.preset": "a"}, model=facts, onnx=onnx, engines=(), files={})
    write_manifest(paths.ONNX_BUNDLE, manifest)
    run(build, config_of("llamagen", **{f"engine__{name}": value for name, value in changes.items()}))
    files = sorted(file for file in paths.BUNDLE.rglob("*") if file.is_file())
    texts = {str(file.relative_to(paths.BUNDLE)): file.read_text() for file in files if file.suffix == ".pbtxt"}
    return {
        "bundle": [str(file.relative_to(paths.BUNDLE)) for file in files],
        "triton": texts,
        "report": _json(paths.ENGINE_METRICS),
    }


class _Words(HTMLParser):
    """Headings and the cells of tables, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[list[str]] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._inside = tag in ("h1", "h2", "h3", "th", "td", "figcaption")
        if self._inside:
            self.found.append([tag, ""])

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.found[-1][1] = " ".join(f"{self.found[-1][1]} {data}".split())

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag not in ("h1", "h2", "h3", "th", "td", "figcaption")


def _report(*, passed: bool) -> Digest:
    config = config_of("llamagen", evaluate__rows=["teacher", "dd1_1step", "dd2_1step"])
    row = {"fid": 7.5, "fid_spread": 0.25, "recall": 0.5, "recall_spread": 0.01, "samples": 80, "runs": 2, "passes": 1}
    protocol = {
        **{"name": "digits", "reference_images": 80, "features_sha256": "ab" * 32, "reference_sha256": "cd" * 32},
        **{"seeds": [1, 2], "labels": "of the real images", "features": "digits_classifier", "quantisation": "uint8"},
    }
    rows = {"teacher": {**row, "fid": 5.0, "passes": 16}, "dd1_1step": row, "dd2_1step": {**row, "fid": 6.0}}
    write_json(paths.METRICS, {"protocol": protocol, "models": {"dd2": "ef" * 32}, **rows})
    _write_decision("ef" * 32, passed=passed)
    write_json(paths.FEATURES_METRICS, {"name": "digits_classifier", "heldout_accuracy": 0.9, "heldout": 20})
    parity = {"largest": 3.5e-6, "mean": 1e-7, "images": 4}
    digests = {"model.onnx": "9a" * 32}
    write_json(paths.EXPORT_METRICS, {"parity": parity, "bytes": 2_340_000, "steps": 1, "sha256": digests})
    for name in ("teacher", "interpolation_dd2_1step"):
        paths.GRIDS.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(paths.GRIDS / f"{name}.png")
    curve = paths.CURVES / "dd2" / "plots" / "metrics" / "fid_1step.tsv"
    curve.parent.mkdir(parents=True)
    curve.write_text("step\tfid_1step\n1\t9.0\n2\t8.0\n")
    run(report, config)
    page, card = paths.REPORT.read_text(), paths.MODEL_CARD.read_text()
    # What follows names this machine and this checkout.
    own = [words for words in _Words(page).found if words[0] != "td" or "ddops" not in words[1]]
    headings = [line for line in card.splitlines() if line.startswith("#") or line.startswith("| ")]
    return {
        "page": own[: 1 + max(place for place, words in enumerate(own) if words[0] == "td")][:80],
        "charts": page.count("<svg"),
        "pictures": page.count("data:image/png"),
        "card": headings,
    }


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


ROWS = "teacher teacher_flow dd1_1step dd1_2step dd2_1step onestep_class onestep_star"
MORE = "dd2_2step dd2_refine_1 ar_diffusion teacher_involved_1_3 skip_2 dd1_1step dd2_1step"
VARIANTS: Variants = {
    "captions": variants(
        _captions, classes=("llamagen",), digits=("t2i",), bfloat16=("t2i", {"dtype": "bfloat16", "shard_size": 30})
    ),
    "trajectories": variants(
        _trajectories,
        adaptive=("llamagen",),
        adaptive_var=("var",),
        captions=("t2i",),
        multistep=("llamagen", {"solver": "multistep", "evaluations": 8}),
        heun=("llamagen", {"solver": "heun", "evaluations": 8}),
        euler=("var", {"solver": "euler", "evaluations": 8}),
        filters=("llamagen", {"top_k": 20, "top_p": 0.8, "solver": "euler", "evaluations": 8}),
        bfloat16=("llamagen", {"precision": "bfloat16"}),
    ),
    "sample": variants(
        _sample,
        llamagen=("llamagen", ROWS),
        llamagen_more=("llamagen", MORE, {"evaluate__seeds": [1]}),
        var=("var", ROWS, {"evaluate__seeds": [1]}),
        var_more=("var", MORE, {"evaluate__seeds": [1]}),
        captions=("t2i", "teacher teacher_flow dd1_1step dd1_2step dd2_1step onestep_class", {"evaluate__seeds": [1]}),
    ),
    "evaluate": variants(_evaluate, digits=("llamagen",), first=("llamagen", {"precision_recall_samples": 40})),
    "gate": variants(
        _gate,
        accepted=(3.0,),
        refused=(3.9,),
        overridden=(3.9, {"override": True}),
        better=(3.0, 2.9),
        worse=(3.0, 2.0),
        other=(3.0, {"other_model": True}),
    ),
    "export_onnx": variants(
        _export,
        dd1=("llamagen", "dd1", 2),
        dd2_float16=("var", "dd2", 1, {"precision": "float16", "tolerance": None, "min_psnr": 1.0}),
    ),
    "build_engine": variants(_build, none=({},)),
    "report": variants(_report, accepted=({"passed": True},), refused=({"passed": False},)),
}
