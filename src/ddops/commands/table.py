"""``ddops table``: every row of the papers' tables, judged and timed in one run, on whatever the workspace holds."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import TypeAdapter

from ddops.commands.arguments import CommandError, Subparsers
from ddops.config.load import load_config, validate
from ddops.config.stages import Config
from ddops.evaluation.papers import FIDS, SPEEDUPS, all_rows, ordering, paper_figure
from ddops.evaluation.provenance import provenance
from ddops.files import read_json, write_json, write_text
from ddops.reports import read_metrics
from ddops.stages import paths
from ddops.stages.common import drawing_of

if TYPE_CHECKING:
    from torch import Tensor

    from ddops.evaluation.rows import Models, Row
    from ddops.evaluation.ruler import Ruler
    from ddops.evaluation.smoothness import Distance

COLUMNS: Final = {
    "fid": "{:.2f}",
    "inception_score": "{:.2f}",
    "kid": "{:.4g}",
    "precision": "{:.3f}",
    "recall": "{:.3f}",
    "accuracy": "{:.1%}",
    "clip_score": "{:.2f}",
    "ppl": "{:.3g}",
}

HOW_CLEAR: Final = {True: "", False: ", within the spread of their difference", None: ", one seed: spread unknown"}


def register(commands: Subparsers) -> None:
    """Declare the arguments."""
    parser = commands.add_parser(
        "table",
        help="the papers' tables on the models of this workspace, with times",
        description="Draw, judge and time the rows that the pipeline leaves out too: teacher-involved, skip-n. Run it "
        "where the pipeline ran. What it judged by this protocol is taken over; a row that is judged already is kept "
        "when the command is given again.",
    )
    parser.add_argument("--rows", default="all", help="names with commas between them; default: all")
    parser.add_argument("--output", type=Path, default=Path("reports/table.json"), metavar="FILE")
    parser.add_argument("--timing-batch", type=int, default=64, metavar="N", help="images a timed draw; default: 64")
    parser.add_argument("--timing-rounds", type=int, default=5, metavar="N", help="draws a row, in turn; default: 5")
    parser.add_argument("--ppl-samples", type=int, default=2000, metavar="N", help="0: no PPL; default: 2000")
    parser.add_argument("--ppl-epsilon", type=float, default=1e-2, metavar="X", help="default: 0.01 (ours)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the JSON file and a Markdown table beside it."""
    config = load_config(paths.PARAMS)
    names = _names(arguments.rows, config)
    ruler, models, hashes = _open(config)
    from ddops.evaluation.rows import build_row

    rows = [build_row(name, models) for name in names]
    known = {
        "protocol": {**ruler.facts(), "drawing_sha256": drawing_of(config)},
        "models": hashes,
        "ppl": {"samples": arguments.ppl_samples, "epsilon": arguments.ppl_epsilon},
    }
    result = _begun(arguments.output, known) or {"preset": config.preset, **known, "rows": {}}
    result |= {"provenance": provenance(known), "date": datetime.now(UTC).date().isoformat()}
    judged = _judged_by_the_pipeline(known)
    # Before the long work: its network may be missing.
    distance = _distance(config, models) if arguments.ppl_samples else None
    for row in rows:
        if row.name not in result["rows"]:
            figures = judged.get(row.name) or _judge(row, ruler, config, models)
            lengths = {} if distance is None else _path_lengths(row, config, models, distance, arguments)
            result["rows"][row.name] = {**figures, **lengths, "commit": result["provenance"]["Git commit"]}
            write_json(arguments.output, result)
    for figures in result["rows"].values():  # times of another run do not compare with this one's
        figures.pop("seconds", None)
        figures.pop("seconds_range", None)
    for name, seconds in _time(rows, models, arguments.timing_batch, arguments.timing_rounds).items():
        result["rows"][name] |= {"seconds": statistics.median(seconds), "seconds_range": [min(seconds), max(seconds)]}
    result["timing"] = {
        "batch": arguments.timing_batch,
        "rounds": arguments.timing_rounds,
        "device": str(models.device),
    }
    result["ordering"] = [claim._asdict() for claim in ordering({name: result["rows"][name] for name in names})]
    write_json(arguments.output, result)
    text = markdown(result, names)
    write_text(arguments.output.with_suffix(".md"), text)
    print(text)


def markdown(result: Mapping[str, Any], names: Sequence[str]) -> str:
    """The table, the papers' figures beside it where there are any, and where their order does not hold."""
    from ddops.evaluation.report import title

    rows, protocol = {name: result["rows"][name] for name in names}, result["protocol"]
    figures = [name for name in COLUMNS if any(name in row for row in rows.values())]
    head = ["row", "passes", "parameters", *figures, "ms an image", "speed-up", "paper's FID", "paper's speed-up"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, row in rows.items():
        base = rows["teacher"]["seconds"] if "teacher" in rows else None
        papers = [paper_figure(table, result["preset"], protocol, name) for table in (FIDS, SPEEDUPS)]
        cells = [
            title(name),
            str(row["passes"]),
            f"{row['parameters'] / 1e6:.2f} M",
            *(_cell(figure, row) for figure in figures),
            f"{1e3 * row['seconds']:.3g}",
            f"{base / row['seconds']:.1f}x" if base else "-",
            *("-" if figure is None else f"{figure:g}" for figure in papers),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    order = [
        f"- {entry['claim']}: {'holds' if entry['holds'] else '**does not hold**'}"
        + {True: "", False: ", within the spread of their difference", None: ", one seed: spread unknown"}[
            entry["clear"]
        ]
        for entry in result["ordering"]
    ]
    return "\n".join([*lines, "", "The papers' order:", "", *order, ""])


def _cell(figure: str, row: Mapping[str, Any]) -> str:
    if figure not in row:
        return "-"
    text = COLUMNS[figure].format(row[figure])
    spread = row.get(f"{figure}_spread")
    return text if spread is None or row["runs"] < 2 else f"{text} ± {COLUMNS[figure].format(spread)}"


def _names(asked: str, config: Config) -> list[str]:
    """The rows, checked against the models as those of the pipeline are."""
    import yaml

    if asked == "all":
        names = all_rows(
            config.teacher.model.level_sizes,
            config.dd1.start_positions,
            trajectories=config.trajectories.count > 0,
            marginals=config.captions.source == "none" or config.captions.sets.train == config.captions.sets.evaluate,
            dd2=config.dd2.source == "train",
            ar_diffusion=config.ar_diffusion.source == "train",
        )
    else:
        names = [name.strip() for name in asked.split(",")]
    values = yaml.safe_load(paths.PARAMS.read_text())
    values["evaluate"]["rows"] = list(dict.fromkeys([config.export.row, *names]))
    validate(values, "--rows")
    return names


def _open(config: Config) -> tuple[Ruler, Models, dict[str, str]]:
    from ddops.captions.conditions import open_conditions
    from ddops.evaluation.rows import open_models
    from ddops.evaluation.ruler import open_ruler
    from ddops.files import sha256_file
    from ddops.stages.statistics import asked, statistics_file

    files = {"tokenizer": paths.TOKENIZER, "teacher": paths.TRANSFORMER, "dd1": paths.DD1_STUDENT}
    if config.dd2.source == "train":
        files["dd2"] = paths.DD2_GENERATOR
    if config.ar_diffusion.source == "train":
        files["ar_diffusion"] = paths.AR_DIFFUSION
    for path in (*files.values(), paths.CLASSIFIER):
        if not path.exists():
            raise CommandError(f"{path}: missing; run dvc repro evaluate first")
    ruler = open_ruler(
        config.evaluate,
        paths.CLASSIFIER,
        statistics_file(config.evaluate),
        asked(config.evaluate, paths.EVALUATE_CAPTIONS),
    )
    models = open_models(
        files, config.sampling, config.trajectories, config.dd1, config.ar_diffusion, config.dd2, paths.TRAJECTORIES
    )
    open_conditions(paths.EVALUATE_CAPTIONS, models.teacher, *models.students)
    return ruler, models, {name: sha256_file(path) for name, path in files.items()}


def _begun(output: Path, known: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an earlier run left, of the same models and protocol; figures of others do not go on here."""
    if not output.exists():
        return None
    found = read_json(output, TypeAdapter(dict[str, Any]), "remove it, or name another --output", CommandError)
    if other := [name for name, value in known.items() if found.get(name) != value]:
        print(f"{output}: is of other {', '.join(other)}: begun anew", file=sys.stderr)
        return None
    return found


def _judged_by_the_pipeline(known: Mapping[str, Any]) -> dict[str, Any]:
    """Rows that the stage ``evaluate`` judged: those of the same models by the same protocol."""
    if not paths.METRICS.exists():
        return {}
    metrics = read_metrics(paths.METRICS)
    protocol, models = metrics.pop("protocol", None), metrics.pop("models", {})
    same = protocol == known["protocol"] and models.items() <= known["models"].items()
    return metrics if same else {}


def _judge(row: Row, ruler: Ruler, config: Config, models: Models) -> dict[str, float | int]:
    """Mean and spread of every figure over the protocol's seeds. The images are judged as they are drawn."""
    from ddops.captions.conditions import open_conditions
    from ddops.evaluation.drawing import Request, draw_batches
    from ddops.evaluation.protocols import open_protocol
    from ddops.stages.evaluate import summary

    protocol, runs = open_protocol(config.evaluate), []
    conditions = open_conditions(paths.EVALUATE_CAPTIONS, models.teacher)
    for seed in config.evaluate.seeds:
        labels_N = protocol.labels(seed, conditions)
        request = Request(labels_N, config.evaluate.batch_size)
        batches = draw_batches(row.draw, request, seed, f"{row.name}, seed {seed}", protocol.image_size)
        runs.append(ruler.figures(batches, conditions.classes_K[labels_N]))
    counts = {"samples": len(labels_N), "runs": len(runs), "passes": row.passes, "parameters": row.parameters}
    return {**summary(runs), **counts}


def _distance(config: Config, models: Models) -> Distance:
    """Of two batches of images; raises CheckpointError where its network cannot be had."""
    from ddops.config.evaluation import DigitsEvaluateConfig
    from ddops.evaluation.judge import load_classifier
    from ddops.losses.perceptual import classifier_distance, lpips_distance

    if isinstance(config.evaluate, DigitsEvaluateConfig):
        return classifier_distance(load_classifier(paths.CLASSIFIER).to(models.device))
    return lpips_distance(models.device)


def _path_lengths(
    row: Row, config: Config, models: Models, distance: Distance, arguments: argparse.Namespace
) -> dict[str, float]:
    """PPL over the protocol's seeds, of a row that is a function of its noise; nothing of others."""
    import torch

    from ddops.evaluation.drawing import Request
    from ddops.evaluation.smoothness import path_lengths
    from ddops.stages.evaluate import summary

    if row.generator is None:
        return {}
    labels_N = torch.arange(arguments.ppl_samples) % models.teacher.num_conditions
    shape = (models.teacher.layout.length, models.teacher.codebook_VC.shape[1])
    request, runs = Request(labels_N, config.evaluate.batch_size), []
    for seed in config.evaluate.seeds:
        lengths = path_lengths(row.generator, distance, request, seed, shape, arguments.ppl_epsilon)
        runs.append({"ppl": float(torch.cat(list(lengths)).mean())})
    return summary(runs)


def _time(rows: Sequence[Row], models: Models, batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds an image of every row, a value a draw, in turn so that a busy machine is as busy for all."""
    import torch

    taken: dict[str, list[float]] = {row.name: [] for row in rows}
    for number in range(rounds + 1):
        for row in rows:
            draw = _prepared(row, models, batch, number)
            with torch.inference_mode():
                started = time.perf_counter()
                draw().cpu()  # so that a GPU has really finished
            if number:  # the first round warms up
                taken[row.name].append((time.perf_counter() - started) / batch)
    return taken


def _prepared(row: Row, models: Models, batch: int, seed: int) -> Callable[[], Tensor]:
    """A draw of which the clock sees no noise being made, where noise is all that a row needs: it comes from the
    processor, and the teacher beside it has a number a token where a student has a vector."""
    import numpy as np
    import torch

    from ddops.evaluation.drawing import sample_noise

    indices_B, labels_B = np.arange(batch, dtype=np.int64), torch.arange(batch) % models.teacher.num_conditions
    generator = row.generator
    if generator is None:
        return lambda: row.draw(seed, indices_B, labels_B)
    noise_BLC = sample_noise(seed, indices_B, models.teacher, models.teacher.codebook_VC.shape[1]).to(models.device)
    return lambda: generator(noise_BLC, labels_B.to(models.device))
