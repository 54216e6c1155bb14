"""Stage ``build_engine``: the exported bundle, with the TensorRT engines that the preset asks for (by default none)."""

from __future__ import annotations

from dataclasses import asdict

from ddops.config.stages import EngineConfig
from ddops.export.engines import build_engines
from ddops.export.errors import BundleError, ExportError
from ddops.export.progress import phase_bar
from ddops.extras import MissingExtra
from ddops.files import write_json
from ddops.stages import paths
from ddops.stages.common import StageError, require, run_stage


def build(engine: EngineConfig) -> None:
    """Write ``artifacts/bundle`` and what the builds took.

    Raises:
        StageError: the library is not installed, does not know a target, or refuses the graph.
    """
    timing_cache = paths.STATE / f"{engine.flavour}.timing"
    require(paths.ONNX_BUNDLE, "export_onnx")
    try:
        with phase_bar("build_engine") as report:
            reports = build_engines(paths.ONNX_BUNDLE, paths.BUNDLE, engine, timing_cache, report)
    except (BundleError, ExportError, MissingExtra) as error:
        raise StageError(str(error)) from error
    write_json(paths.ENGINE_METRICS, {"flavour": engine.flavour, "engines": [asdict(report) for report in reports]})


if __name__ == "__main__":
    run_stage(build)
