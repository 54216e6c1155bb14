"""``ddops export`` and ``ddops engine``: from a student to a verified bundle, and engines into it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ddops.commands.arguments import CommandError, Subparsers, add_params
from ddops.commands.workspace import find_workspace
from ddops.stages import paths

if TYPE_CHECKING:
    from ddops.config.stages import EngineConfig

BOUNDS: Final[dict[str, dict[str, Any]]] = {
    "float32": {},
    "float16": {"tolerance": None, "min_psnr": 30.0, "min_equal_tokens": 0.95},
    "bfloat16": {"tolerance": None, "min_psnr": 25.0, "min_equal_tokens": 0.95},
}
"""What is asked of a graph in another precision than the preset's *(ours)*. A token that flips moves many pixels: what
bounds single pixels in float32 says nothing in half precision."""


def register(commands: Subparsers) -> None:
    """Declare the arguments."""
    exporting = commands.add_parser(
        "export",
        help="a student as a bundle: weights, ONNX graph, manifest, and engines where they are asked for",
        description="Export a student that was trained here or released: `ddops export released_dd1_var_d16 --output "
        "bundle --precision float16 --target 89`. No gate is asked; the pipeline (dvc repro) asks its own.",
    )
    exporting.add_argument("model", help="a preset, a workspace, or a directory that ddops fetch wrote")
    exporting.add_argument("--output", type=Path, required=True, metavar="DIR")
    exporting.add_argument("--steps", type=int, help="passes of the graph; default: export.steps")
    exporting.add_argument("--precision", choices=list(BOUNDS), help="default: export.precision")
    _add_engine_arguments(exporting)
    add_params(exporting)
    exporting.set_defaults(run=run_export)

    building = commands.add_parser(
        "engine",
        help="build TensorRT engines into a bundle",
        description="`ddops engine bundle --target 89 --target portable`. Needs ddops[rtx] or ddops[gpu], --verify "
        "a GPU.",
    )
    building.add_argument("bundle", type=Path)
    building.add_argument("--output", type=Path, metavar="DIR", help="another bundle, with them; default: the same")
    _add_engine_arguments(building)
    building.add_argument(
        "--verify", action="store_true", help="compare the images of the engine that fits this GPU with PyTorch's"
    )
    building.set_defaults(run=run_engine)


def _add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", action="append", default=[], help='"89", "portable", "current"; may be repeated')
    parser.add_argument("--flavour", choices=["tensorrt", "tensorrt_rtx"], default="tensorrt_rtx")
    parser.add_argument("--max-batch", type=int, default=64, metavar="N", help="largest batch of the engines")


def run_export(arguments: argparse.Namespace) -> None:
    """Write the bundle."""
    workspace = find_workspace(arguments.model, arguments.params)
    config, export = workspace.config, workspace.config.export
    if not workspace.student.is_file():
        raise CommandError(f"{workspace.student}: missing; run dvc repro distill_{export.student}")
    most = len(config.dd1.start_positions)
    steps = arguments.steps or export.steps
    if not 1 <= steps <= most:
        raise CommandError(f"--steps {steps}: dd1.start_positions {config.dd1.start_positions} allow 1 to {most}")
    export = replace(export, steps=steps)
    if arguments.precision not in (None, export.precision):
        export = replace(export, precision=arguments.precision, **BOUNDS[arguments.precision])
    engines = _engines(arguments)

    from ddops.export.bundle import find_sources, write_bundle
    from ddops.export.provenance import judged, provenance

    sources = find_sources(
        workspace.student,
        workspace.tokenizer,
        workspace.root / paths.CAPTIONS,
        config.dd1,
        config.dd2,
        export,
    )
    facts = provenance(config.preset, export, workspace.student, workspace.root / "dvc.lock")
    facts |= judged(workspace.root / paths.METRICS, export, facts["ddops.student_sha256"])
    parity = write_bundle(arguments.output, sources, export, facts)
    print(
        f"{arguments.output}: {config.preset}, {steps} step{'s' if steps > 1 else ''}, {export.precision}; against "
        f"PyTorch: largest difference {parity.largest:.2g}, PSNR {parity.psnr:.0f} dB, "
        f"equal tokens {parity.equal_tokens:.1%}"
    )
    _build(arguments.output, arguments.output, engines)


def run_engine(arguments: argparse.Namespace) -> None:
    """Build the engines, verify the one that fits this GPU."""
    if not (arguments.target or arguments.verify):
        raise CommandError("ddops engine: give a --target to build for, or --verify")
    output = arguments.output or arguments.bundle
    if arguments.target:
        _build(arguments.bundle, output, _engines(arguments))
    if arguments.verify:
        _verify(output)


def _verify(bundle: Path) -> None:
    from ddops.export.manifest import read_manifest
    from ddops.inference.backends import load_backend
    from ddops.inference.compare import compare_with_torch, require_images

    manifest = read_manifest(bundle)
    parity = compare_with_torch(bundle, manifest, load_backend(bundle, manifest, "tensorrt"))
    require_images(parity, manifest, f"{bundle}: the engine")
    print(
        f"{bundle}: the engine against PyTorch, {parity.images} images: largest difference {parity.largest:.2g}, "
        f"mean {parity.mean:.2g}, PSNR {parity.psnr:.0f} dB"
    )


def _engines(arguments: argparse.Namespace) -> EngineConfig:
    """What to build. A library or target that is not here shows before an export of minutes, not after it."""
    from ddops.config.stages import EngineConfig, ProfileConfig
    from ddops.export.tensorrt import require_target

    if arguments.max_batch < 1:
        raise CommandError(f"--max-batch {arguments.max_batch}: at least 1")
    for target in arguments.target:
        require_target(arguments.flavour, target)
    profile = ProfileConfig(min=1, opt=min(8, arguments.max_batch), max=arguments.max_batch)
    return EngineConfig(flavour=arguments.flavour, targets=tuple(arguments.target), profile=profile)


def _build(source: Path, target: Path, config: EngineConfig) -> None:
    from ddops.export.engines import build_engines
    from ddops.export.progress import phase_bar

    cache = Path(".ddops/state") / f"{config.flavour}.timing"
    with phase_bar("engine") as report:
        reports = build_engines(source, target, config, cache, report)
    for built in reports:
        print(f"{target}: engine for {built.target}, {built.bytes / 2**20:.0f} MiB, {built.seconds:.1f} s")
