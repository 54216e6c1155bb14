"""A workspace that the gate can judge: files that hash, and figures that state their hashes."""

from __future__ import annotations

from pathlib import Path

from ddops.config.base import plain
from ddops.config.load import compose, load_config, write_params
from ddops.files import sha256_file, sha256_json, write_json
from ddops.stages import gate, paths
from ddops.stages.common import drawing_of, sections
from helpers.tiny import PARAMS, write_recipes


def make_workspace() -> None:
    """In the current directory."""
    write_params(compose(PARAMS, ["preset=smoke"]), paths.PARAMS)
    write_recipes(Path())
    files = {"tokenizer": paths.TOKENIZER, "teacher": paths.TRANSFORMER, **paths.STUDENTS}
    for path in (*files.values(), paths.CLASSIFIER):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(path))
    protocol = {
        "name": "digits",
        "settings_sha256": sha256_json(plain(load_config().evaluate)),
        "features_sha256": sha256_file(paths.CLASSIFIER),
        "drawing_sha256": drawing_of(load_config()),
    }
    models = {name: sha256_file(path) for name, path in files.items()}
    write_json(paths.METRICS, {"protocol": protocol, "models": models, "dd2_1step": {"fid": 3.0}})


def run_gate() -> None:
    config = load_config()
    gate.gate(**{name: getattr(config, name) for name in sections(gate.gate)})
