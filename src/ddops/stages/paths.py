"""Where the pipeline's files are, relative to the workspace. ``dvc.yaml`` says the same; a test compares them."""

from pathlib import Path

from ddops.production import REGISTRY

PARAMS = Path("params.yaml")

CLASSIFIER = Path("artifacts/features/classifier.safetensors")
CAPTIONS = Path("data/captions")
TRAIN_CAPTIONS = CAPTIONS / "train"
EVALUATE_CAPTIONS = CAPTIONS / "evaluate"
TEXT_ENCODER = CAPTIONS / "encoder"
TOKENIZER = Path("artifacts/teacher/tokenizer.safetensors")
TRANSFORMER = Path("artifacts/teacher/transformer.safetensors")
TRAJECTORIES = Path("data/trajectories")
DD1_STUDENT = Path("artifacts/dd1/student.safetensors")
AR_DIFFUSION = Path("artifacts/ar_diffusion/model.safetensors")
DD2_GENERATOR = Path("artifacts/dd2/generator.safetensors")
STUDENTS = {"dd1": DD1_STUDENT, "dd2": DD2_GENERATOR}
"""By ``export.student``; the stage that makes one is ``distill_<name>``."""
SAMPLES = Path("data/samples")
SAMPLES_MANIFEST = SAMPLES / "manifest.json"
ONNX_BUNDLE = Path("artifacts/onnx")
BUNDLE = Path("artifacts/bundle")

REPORTS = Path("reports")
CURVES = REPORTS / "curves"
GRIDS = REPORTS / "grids"
METRICS = REPORTS / "metrics.json"
ROWS_TABLE = REPORTS / "rows.csv"
FEATURES_METRICS = REPORTS / "features.json"
GATE_DECISION = REPORTS / "gate.json"
TRAJECTORIES_THROUGHPUT = REPORTS / "trajectories_throughput.json"
"""Of the last run that made any. No stage's output: it says how fast, not what, and differs every time."""
EXPORT_METRICS = REPORTS / "export.json"
ENGINE_METRICS = REPORTS / "engines.json"
SUMMARY = REPORTS / "summary.json"
"""The metrics that DVC tracks. Nothing depends on it."""
REPORT = REPORTS / "index.html"
MODEL_CARD = REPORTS / "model_card.md"

CODE = REPORTS / "code"
"""Which code each stage ran, for `ddops stale`. In Git; nothing depends on it."""

PRODUCTION = Path("production") / REGISTRY
"""Which model is in production, and every step that led there. In Git; the gate depends on it."""

STATE = Path(".ddops/state")
"""Checkpoints of running stages. Outside the stages' outputs, because DVC deletes those before a stage runs."""


def code_record(stage: str) -> Path:
    """Where a stage notes its code."""
    return CODE / f"{stage}.json"
