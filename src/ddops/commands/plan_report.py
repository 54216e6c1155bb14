"""The text of ``ddops plan``."""

from __future__ import annotations

from ddops.commands import estimates
from ddops.commands.arguments import CommandError
from ddops.commands.estimates import Measured, ModelSize
from ddops.config.captions import NoCaptionsConfig, SeededEncoderConfig
from ddops.config.dd2 import TrainedDD2Config
from ddops.config.evaluation import ImageNetEvaluateConfig, InceptionFeaturesConfig, RemoteFile
from ddops.config.stages import (
    Config,
    DownloadedTeacherConfig,
    DownloadSource,
    PublishedFile,
    ReleasedDD1Config,
    TrainedDD1Config,
)
from ddops.costs.devices import Device, UnknownDevice, find_device
from ddops.costs.stages import StageCost, predict, samples
from ddops.hub.records import LOCK, HubRecords

LPIPS_BYTES = 0.55e9
"""torchvision's VGG-16 weights."""
INCEPTION_BYTES = 0.1e9


def describe(config: Config, device_name: str) -> str:
    """The whole plan as text."""
    try:
        device = find_device(device_name)
    except UnknownDevice as error:
        raise CommandError(f"--device: {error}") from None
    measured = estimates.measure(config)
    sections = [
        _models(config, measured),
        _stages(config),
        _disk(config, measured),
        _costs(predict(config, device), device, device_name),
    ]
    return f"preset {config.preset}\n\n" + "\n\n".join("\n".join(lines) for lines in sections)


def _models(config: Config, measured: Measured) -> list[str]:
    rows = {"transformer": measured.transformer, "tokenizer": measured.tokenizer, "DD1 student": measured.student}
    lines = [_model(name, size) for name, size in rows.items()]
    levels, sampling = len(config.teacher.model.level_sizes), config.sampling
    settings = f"guidance {sampling.guidance:g}, top-k {sampling.top_k or 'off'}, top-p {sampling.top_p:g}"
    return [
        "Models (exact)",
        *lines,
        f"  {measured.length} tokens in {levels} levels; teacher: {settings}; student: starts "
        f"{', '.join(map(str, config.dd1.start_positions))}, logit prefix {config.dd1.logit_prefix}",
    ]


def _model(name: str, size: ModelSize) -> str:
    return f"  {name:<14}{size.parameters / 1e6:10.2f} M parameters{size.tensors:7d} tensors{_bytes(size.bytes):>12}"


def _stages(config: Config) -> list[str]:
    count, evaluate = config.trajectories.count, config.evaluate
    steps = {
        "features": _features(config),
        "captions": _captions(config),
        "teacher": _teacher(config),
        "trajectories": f"{count:,} by the flow map" if count else "none",
        "distill_dd1": _distill(config),
        "distill_dd2": _dd2(config),
        "sample": f"{samples(config):,} images x {len(evaluate.seeds)} seeds x {len(evaluate.rows)} rows",
        "evaluate": _evaluate(config),
        "gate": f"{len(config.gate.rules)} rules",
        "export_onnx": f"{config.export.steps} step, opset {config.export.opset}",
        "report": "one HTML page",
    }
    return ["Stages", *(f"  {name:<14}{text}" for name, text in steps.items())]


def _features(config: Config) -> str:
    features = config.features
    if isinstance(features, InceptionFeaturesConfig):
        return f"{_file(features.weights)}: Inception, layer {features.layer}"
    return "train the digits classifier"


def _captions(config: Config) -> str:
    captions = config.captions
    if isinstance(captions, NoCaptionsConfig):
        return "none: the teacher draws for classes"
    encoder = captions.encoder
    name = "a small T5 of random weights" if isinstance(encoder, SeededEncoderConfig) else encoder.repo
    shape = getattr(config.teacher.model, "captions", None)
    most = estimates.caption_bytes(captions, shape.width, 1_000_000) / 1e9 if shape else 0.0
    return f"{name}, {captions.length} tokens a prompt, at most {most:.0f} GB a million prompts"


def _evaluate(config: Config) -> str:
    evaluate = config.evaluate
    against = f", {_file(evaluate.statistics)}" if isinstance(evaluate, ImageNetEvaluateConfig) else ""
    return f"protocol {evaluate.protocol}{against}"


def _file(file: RemoteFile) -> str:
    return f"read {file.path}" if file.path else f"fetch {file.url.rpartition('/')[2]}"


def _teacher(config: Config) -> str:
    teacher = config.teacher
    if isinstance(teacher, DownloadedTeacherConfig):
        return _source(teacher.download, [teacher.download.tokenizer, teacher.download.transformer])
    return f"train: tokenizer {teacher.tokenizer_training.steps:,} steps, transformer {teacher.training.steps:,} steps"


def _distill(config: Config) -> str:
    dd1 = config.dd1
    if isinstance(dd1, ReleasedDD1Config):
        return _source(dd1.download, [dd1.download.student])
    epochs = dd1.training.steps * dd1.training.batch_size / config.trajectories.count
    return f"train: {dd1.training.steps:,} steps of {dd1.training.batch_size}, {epochs:.3g} epochs of the trajectories"


def _dd2(config: Config) -> str:
    dd2 = config.dd2
    if not isinstance(dd2, TrainedDD2Config):
        return "not trained"
    steps = f"{dd2.training.steps:,} steps of {dd2.training.batch_size}"
    return f"train: {steps}, each with {dd2.guidance.updates} of the guidance network"


def _source(source: DownloadSource, files: list[PublishedFile]) -> str:
    names = ", ".join(file.name for file in files)
    if source.path is not None:
        return f"read {names} in {source.path}"
    records = HubRecords.load(LOCK)
    known = all(records.expected(source.repo, file.name).sha256 for file in files)
    trust = "hashes known" if known else "a hash not known yet is trusted on first use"
    return f"fetch {names} from {source.repo} ({records.license(source.repo) or 'licence not known'}; {trust})"


def _disk(config: Config, measured: Measured) -> list[str]:
    teacher = measured.tokenizer.bytes + measured.transformer.bytes
    download = _download_bytes(config, measured)
    each, count = estimates.trajectory_bytes(measured), config.trajectories.count
    noise = estimates.noise_bytes(config, measured)
    lines = [
        f"  download      {_bytes(download):>10}  into the hub's cache" if download else "",
        f"  weights       {_bytes(teacher + measured.student.bytes):>10}  teacher {_bytes(teacher)}, student "
        f"{_bytes(measured.student.bytes)}; DVC's cache may hold them once more",
        f"  trajectories  {_bytes(each * count):>10}  {each:,} bytes each; storing the noise would add "
        f"{noise:,} bytes each, {_bytes(noise * count)}" if count else "",
        f"  samples       {_bytes(estimates.image_bytes(config)):>10}",
        f"  checkpoint    {_bytes(estimates.checkpoint_bytes(measured, dd2=config.dd2.source == 'train')):>10}  "
        "while a network is trained" if config.dd1.source == "train" else "",
    ]  # fmt: skip
    return ["Disk (estimate)", *filter(None, lines)]


def _download_bytes(config: Config, measured: Measured) -> float:
    """Sizes that are known, else those of our float32 files."""
    wanted: list[tuple[str, PublishedFile, int]] = []
    if isinstance(config.teacher, DownloadedTeacherConfig) and config.teacher.download.path is None:
        source = config.teacher.download
        wanted.append((source.repo, source.tokenizer, measured.tokenizer.bytes))
        wanted.append((source.repo, source.transformer, measured.transformer.bytes))
    if isinstance(config.dd1, ReleasedDD1Config) and config.dd1.download.path is None:
        wanted.append((config.dd1.download.repo, config.dd1.download.student, measured.student.bytes))
    records = HubRecords.load(LOCK)
    sizes = [records.expected(repo, file.name).size or ours for repo, file, ours in wanted]
    lpips = isinstance(config.dd1, TrainedDD1Config) and config.dd1.perceptual.network == "lpips_vgg"
    inception = isinstance(config.features, InceptionFeaturesConfig) and config.features.weights.path is None
    return sum(sizes) + (LPIPS_BYTES if lpips else 0) + (INCEPTION_BYTES if inception else 0)


def _costs(costs: dict[str, StageCost], device: Device, name: str) -> list[str]:
    lines = []
    for stage, cost in costs.items():
        fits = "" if cost.memory <= device.memory else f"  more than the {name} has: lower the batch size"
        lines.append(
            f"  {stage:<14}{_duration(cost.seconds):>10}{_bytes(cost.memory):>12}{cost.batch:>7}"
            f"{cost.flops / 1e15:12.4g} PFLOP{_share(cost, device)}{fits}"
        )
    total = sum(cost.seconds for cost in costs.values())
    rates = f"{device.flops / 1e12:.3g} TFLOP/s in float32, {device.half_flops / 1e12:.3g} in bfloat16"
    return [
        f"Time and memory (predicted, one {name}: {device.source})",
        f"  {'stage':<14}{'time':>10}{'memory':>12}{'batch':>7}{'work':>18}  share of the float32 rate",
        *lines,
        f"  {'together':<14}{_duration(total):>10}",
        f"  {name}: {_bytes(device.memory)}; {rates}, {device.bandwidth / 1e12:.3g} TB/s, "
        f"{device.launch * 1e6:.2g} us an operator",
        "  An operator takes what its arithmetic, its bytes or its launch takes; docs/COST.md: how far that carries",
    ]


def _share(cost: StageCost, device: Device) -> str:
    """How much of the time is arithmetic at the float32 rate."""
    return f"{cost.flops / device.flops / cost.seconds:8.0%}" if cost.seconds else ""


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"
