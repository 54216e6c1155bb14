"""The golden models as files like the published ones, on a local hub, with presets that ask for them."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from helpers import llamagen_helpers, var_helpers
from helpers.hub_server import Hub
from helpers.tiny import PARAMS
from helpers.var_helpers import golden, with_prefix

ARGUMENTS = argparse.Namespace(lr=1e-4, note="what training scripts leave beside the weights")
SCHEDULES = {
    "var": {"start_positions": [0, 2], "logit_prefix": 2},
    "llamagen": {"start_positions": [0, 5], "logit_prefix": 5},
}
BASES = {"var": "released_dd1_var_d16", "llamagen": "released_dd1_llamagen_b"}
MODELS = {"var": var_helpers.TINY, "llamagen": llamagen_helpers.TINY}
SAMPLING = {
    "var": {"guidance": 1.5, "top_k": 20, "top_p": 0.9},
    "llamagen": {"guidance": 2.0, "top_k": 20, "top_p": 0.9},
}


class World(NamedTuple):
    """A workspace whose ``params`` have the presets ``tiny_var`` and ``tiny_llamagen``, and the hub they ask."""

    root: Path
    hub: Hub


def reference(name: str) -> dict[str, torch.Tensor]:
    """A golden model's weights under their published names."""
    return with_prefix(golden(name), "sd.")


@cache
def published_files() -> dict[str, bytes]:
    """Repository path -> file, each laid out as GOLDEN.md's section 8 says."""
    student = reference("dd1_var")
    files: dict[str, Any] = {
        "FoundationVision/var/vae_ch160v4096z32.pth": reference("var_tokenizer"),
        "FoundationVision/var/var_d16.pth": reference("var_teacher"),
        "microsoft/distilled_decoding/VAR-DD/var-d16.pth": {
            "epoch": 3,
            "trainer": {"config": {"patch_nums": (1, 2, 3, 4)}, "ema_parameters": student, "var_wo_ddp": {}},
            "args": ARGUMENTS,
        },
        "FoundationVision/LlamaGen/vq_ds16_c2i.pt": {"model": reference("llamagen_tokenizer"), "ema": {}},
        "FoundationVision/LlamaGen/c2i_B_256.pt": {"model": reference("llamagen_c2i_teacher"), "args": ARGUMENTS},
        "microsoft/distilled_decoding/LlamaGen-DD/llamagen-B.pt": {"ema": reference("dd1_llamagen"), "steps": 7},
    }
    return {path: saved(value) for path, value in files.items()}


def saved(value: Any) -> bytes:
    """What ``torch.save`` writes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def build(root: Path, hub: Hub, monkeypatch: Any) -> World:
    """Serve the files, write the presets, and go there. The manifest of the real files is out of the way."""
    hub.files.update(published_files())
    shutil.copytree(PARAMS, root / "params")
    (root / "params" / "preset").mkdir()
    for family, model in MODELS.items():
        preset = {
            "defaults": [BASES[family]],
            "preset": f"tiny_{family}",
            "teacher": {"model": json.loads(json.dumps(dataclasses.asdict(model)))},
            "sampling": SAMPLING[family],
            "dd1": SCHEDULES[family],
        }
        text = "# @package _global_\n" + yaml.safe_dump(preset, sort_keys=False)
        (root / "params" / "preset" / f"tiny_{family}.yaml").write_text(text)
    (root / "manifest.json").write_text("{}")
    monkeypatch.setattr("ddops.hub.records.MANIFEST", root / "manifest.json")
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root / "hub-cache"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.chdir(root)
    return World(root, hub)
