"""TensorRT engines from an ONNX graph: one builder for both flavours of the same API.

``tensorrt`` is the data-centre library and builds for the GPU of the machine it runs on. ``tensorrt_rtx`` builds ahead
of time, without a GPU, for a compute capability or for all that it supports ("portable"); the last compilation happens
where the engine is loaded. Precision is what the graph says in both.

The life of an engine: build here, record it in the manifest, check that it fits where it is to run, load, run
(:mod:`ddops.export.engine_session`).
"""

from __future__ import annotations

import importlib
import importlib.util
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from ddops.config.stages import ProfileConfig
from ddops.export.errors import BundleError, ExportError
from ddops.export.manifest import EngineFacts, Manifest, ModelFacts
from ddops.extras import EXTRA_OF, MissingExtra
from ddops.files import atomic_path, sha256_file

Flavour = Literal["tensorrt", "tensorrt_rtx"]
FLAVOURS: Final[tuple[Flavour, ...]] = ("tensorrt", "tensorrt_rtx")
PORTABLE: Final = "portable"
OLDEST_PORTABLE: Final = 80
"""Compute capability from which TensorRT-RTX's default build runs; an older one it builds for by name."""
CURRENT: Final = "current"
"""The GPU of this machine."""

Report = Callable[[str, int, int], None]
"""Progress: phase, steps done, steps in all."""


@dataclass(frozen=True)
class BuildReport:
    """What a build took."""

    target: str
    seconds: float
    bytes: int
    peak_rss_bytes: int
    """Of the process so far: the first build of a process is the one to read."""


@dataclass(frozen=True)
class Machine:
    """What an engine must fit."""

    flavour: Flavour
    version: str
    compute_capability: str | None
    """Without its dot; None without a GPU."""


def import_flavour(flavour: Flavour) -> Any:
    """The library's module; raises :class:`MissingExtra` where it is not installed."""
    try:
        return importlib.import_module(flavour)
    except ImportError as error:
        raise MissingExtra(f"engine.flavour {flavour}", EXTRA_OF[flavour], error) from None


def installed_flavour(wanted: Sequence[Flavour]) -> Flavour:
    """The first of the flavours ``wanted`` (all, where none is) that is installed; raises :class:`MissingExtra`."""
    candidates = list(dict.fromkeys(wanted)) or list(FLAVOURS)
    for flavour in candidates:
        if importlib.util.find_spec(flavour) is not None:
            return flavour
    extra = EXTRA_OF[candidates[0]]
    raise MissingExtra("backend tensorrt", extra, ImportError(f"no module {' or '.join(candidates)}"))


def targets(flavour: Flavour) -> list[str]:
    """What engines can be built for; raises :class:`MissingExtra`."""
    if flavour == "tensorrt":
        return [CURRENT]
    names = import_flavour(flavour).ComputeCapability.__members__
    return [PORTABLE, CURRENT, *sorted((name[2:] for name in names if name.startswith("SM")), key=int)]


def require_target(flavour: Flavour, target: str) -> None:
    """Raises:
    ExportError: the flavour does not build for ``target``; says for what it does. MissingExtra: it is not installed.
    """
    import_flavour(flavour)
    if target not in (known := targets(flavour)):
        raise ExportError(f"engine.targets: {flavour} builds for {', '.join(known)}, not for {target!r}")


def build_engine(
    onnx_path: Path,
    engine_path: Path,
    model: ModelFacts,
    profile: ProfileConfig,
    flavour: Flavour,
    target: str,
    timing_cache: Path | None = None,
    report: Report = lambda phase, done, total: None,
) -> BuildReport:
    """Write an engine atomically.

    ``timing_cache`` is read if it is there and written afterwards, so that a second build for the same GPU measures
    less; the RTX flavour measures nothing when it builds and leaves it out.

    Raises:
        ExportError: the target is not one of this flavour's, or the library refuses the graph; with its reasons.
        MissingExtra: the library is not installed.
    """
    require_target(flavour, target)
    trt = import_flavour(flavour)
    started = time.perf_counter()
    logger = _make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        reasons = "; ".join(str(parser.get_error(index).desc()) for index in range(parser.num_errors))
        raise ExportError(f"{onnx_path}: {flavour} cannot read this graph: {reasons}")
    config = builder.create_builder_config()
    config.progress_monitor = monitor = _make_monitor(trt, report)
    _choose_target(trt, config, flavour, target)
    _add_profile(builder, config, model, profile)
    cache = _attach_timing_cache(config, timing_cache) if flavour == "tensorrt" else None
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ExportError(f"{onnx_path}: {flavour} built no engine for {target}: {'; '.join(logger.errors)}")
    with atomic_path(engine_path) as temporary:
        temporary.write_bytes(memoryview(engine))
    if cache is not None and timing_cache is not None:
        with atomic_path(timing_cache) as temporary:
            temporary.write_bytes(memoryview(cache.serialize()))
    del monitor  # TensorRT asks that it outlives the build
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return BuildReport(target, time.perf_counter() - started, engine_path.stat().st_size, peak)


def engine_name(flavour: Flavour, target: str) -> str:
    """Path of an engine in its bundle."""
    return f"engines/{flavour}-{target if not target.isdecimal() else f'sm{target}'}.engine"


def describe_engine(
    directory: Path, manifest: Manifest, flavour: Flavour, target: str, profile: ProfileConfig
) -> EngineFacts:
    """The manifest's entry for an engine that was just built; ``current`` becomes the GPU's compute capability."""
    name = engine_name(flavour, target)
    if target == CURRENT:
        target = this_machine(flavour).compute_capability or CURRENT
    return EngineFacts(
        file=name,
        sha256=sha256_file(directory / name),
        flavour=flavour,
        version=library_version(flavour),
        target=target,
        precision=manifest.onnx.precision,
        profile=profile,
        onnx_sha256=manifest.onnx.sha256,
    )


def this_machine(flavour: Flavour) -> Machine:
    """The library and the GPU that are here; raises :class:`MissingExtra`."""
    import torch

    version = library_version(flavour)
    if not torch.cuda.is_available():
        return Machine(flavour, version, None)
    major, minor = torch.cuda.get_device_capability()
    return Machine(flavour, version, f"{major}{minor}")


def library_version(flavour: Flavour) -> str:
    """The installed version; raises :class:`MissingExtra`."""
    return str(import_flavour(flavour).__version__)


def choose_engine(manifest: Manifest, machine: Machine) -> EngineFacts:
    """The bundle's engine that fits a machine: one for just its GPU before a portable one.

    Raises:
        BundleError: none fits; says for each why not, and how to build one that does.
    """
    if machine.compute_capability is None:
        raise BundleError(f"{machine.flavour}: no GPU is visible here, and engines run on one only; use backend onnx")
    known = targets(machine.flavour)
    target = next(each for each in (machine.compute_capability, PORTABLE, CURRENT) if each in known)
    rebuild = f"ddops engine BUNDLE --flavour {machine.flavour} --target {target}"
    engines = [engine for engine in manifest.engines if engine.flavour == machine.flavour]
    if not engines:
        raise BundleError(f"the bundle has no engine for {machine.flavour}; build one: {rebuild}")
    misfits = {engine: why_not(engine, machine, manifest) for engine in engines}
    fitting = sorted((engine.target == PORTABLE, engine.file) for engine, reason in misfits.items() if reason is None)
    if not fitting:
        reasons = "; ".join(f"{engine.file}: {reason}" for engine, reason in misfits.items())
        raise BundleError(f"no engine fits this machine: {reasons}. Build one that does: {rebuild}")
    return next(engine for engine in engines if engine.file == fitting[0][1])


def why_not(engine: EngineFacts, machine: Machine, manifest: Manifest) -> str | None:
    """What of an engine does not fit; None where it does."""
    if engine.onnx_sha256 != manifest.onnx.sha256:
        return (
            f"built from another graph (ONNX sha256 {engine.onnx_sha256[:12]}..., "
            f"the bundle's is {manifest.onnx.sha256[:12]}...)"
        )
    if engine.version != machine.version:
        return f"built by {engine.flavour} {engine.version}, here is {machine.version}"
    capability = int(machine.compute_capability or 0)
    if engine.target == PORTABLE and capability < OLDEST_PORTABLE:
        return f"portable engines need compute capability {OLDEST_PORTABLE} or newer, this GPU has {capability}"
    if engine.target not in (PORTABLE, machine.compute_capability):
        return f"built for compute capability {engine.target}, this GPU has {machine.compute_capability}"
    return None


def _network_flags(trt: Any) -> int:
    """Strong typing, where it is not the only kind of network anyway (TensorRT 11)."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _choose_target(trt: Any, config: Any, flavour: Flavour, target: str) -> None:
    if flavour == "tensorrt" or target == PORTABLE:
        return
    config.num_compute_capabilities = 1
    name = "CURRENT" if target == CURRENT else f"SM{target}"
    config.set_compute_capability(getattr(trt.ComputeCapability, name), 0)


def _add_profile(builder: Any, config: Any, model: ModelFacts, profile: ProfileConfig) -> None:
    optimisation = builder.create_optimization_profile()
    for name, (shape, _) in model.inputs.items():
        optimisation.set_shape(name, *((batch, *shape) for batch in (profile.min, profile.opt, profile.max)))
    config.add_optimization_profile(optimisation)


def _attach_timing_cache(config: Any, path: Path | None) -> Any:
    """The cache of ``path``; an empty one where there is none, or one of another GPU or version, which is no use."""
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _make_logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps errors, for the exception that they lead to; the rest is not shown."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(msg)

    return Logger()


def _make_monitor(trt: Any, report: Report) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Passes TensorRT's phases on. Called from its own threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.totals[phase_name] = num_steps
            report(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            report(phase_name, step + 1, self.totals[phase_name])
            return True

        def phase_finish(self, phase_name: str) -> None:
            report(phase_name, self.totals[phase_name], self.totals[phase_name])

    return Monitor()
