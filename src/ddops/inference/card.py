"""The model card: what a stranger must know before quoting a figure or shipping an image."""

from __future__ import annotations

from ddops.export.manifest import Manifest


def model_card(manifest: Manifest) -> str:
    """Markdown, with the metadata block that the Hugging Face hub reads."""
    facts = {key.removeprefix("ddops."): value for key, value in manifest.facts.items()}
    model = manifest.model
    size = f"{model.image_size} x {model.image_size}"
    fid = (
        f"FID {facts['fid']} by the protocol `{facts['protocol']}`; it compares with nothing measured otherwise."
        if "fid" in facts
        else "No FID was measured for this export."
    )
    what = f"{model.num_classes} classes" if model.captions is None else "for captions"
    call = "class_labels=[0]" if model.captions is None else 'prompt="..."'
    rows = "\n".join(f"| {key} | `{value}` |" for key, value in sorted(facts.items()))
    return f"""---
library_name: ddops
license: {facts.get("license", "other").lower()}
tags: [image-generation, distilled-decoding]
---

# {facts.get("preset", "unnamed")}, {model.steps} step{"s" if model.steps > 1 else ""}

An image autoregressive model distilled into a few-step generator with ddops: {what},
{size} pixels. {fid}

    from ddops import OneStepPipeline
    pipe = OneStepPipeline.from_pretrained("this repository or directory")
    pipe({call}, seed=0).images[0]

Steps start at {list(model.start_positions)}; the first {model.logit_prefix} levels take the code of the largest logit,
later ones the regressed embedding. Noise is `{model.noise}`: an image is a function of seed, index and label.
The ONNX graph is opset {manifest.onnx.opset}, {manifest.onnx.precision}.

| | |
|---|---|
{rows}
"""
