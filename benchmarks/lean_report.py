"""The table and the chart of ``lean.py``'s figures."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from ddops.evaluation.papers import SPEEDUPS
from ddops.files import atomic_path, write_text

PAPER_ROWS = {
    "lean_1": "dd1_1step",
    "lean_2": "dd1_2step",
    "var_d16 involved": "teacher_involved_4_6",
    "llamagen_l involved": "teacher_involved_41_81",
}


def write_report(results: dict[str, Any], stem: Path) -> None:
    """``stem.md`` and ``stem.png``."""
    text = "\n".join([*machine(results), *tables(results), *launches(results)])
    write_text(stem.with_suffix(".md"), text + "\n")
    draw_chart(results, stem.with_suffix(".png"))
    print(text)


def machine(results: dict[str, Any]) -> list[str]:
    dates = sorted(note["date"][:10] for note in results["commands"])
    return [
        f"{results['name']}, {results['threads']} thread(s) of {results['cpus']} CPUs, torch {results['torch']}, "
        f"{dates[0]} to {dates[-1]}, random weights, seed 0."
        if dates
        else "",
        "",
    ]


def cost(figures: dict[str, Any]) -> list[float]:
    """The times that ratios are of: processor time where one thread's was measured."""
    values: list[float] = figures.get("cpu_seconds") or figures["seconds"]
    return values


def ratio(figures: dict[str, Any], other: dict[str, Any]) -> float:
    """How many times faster ``figures`` is than ``other``."""
    return statistics.median(cost(other)) / statistics.median(cost(figures))


def baseline(name: str, part: dict[str, Any]) -> str | None:
    """What a contestant is compared with: the teacher, or the released code's way with as many steps; of the same
    precision where that was timed too."""
    steps = name.split("_")[1] if "_" in name else "1"
    ways = [way for way in ("teacher", f"reference_{steps}", "reference_1") if way in part or f"{way}_bf16" in part]
    candidates = [f"{ways[0]}_bf16", ways[0]] if ways else []
    if "bf16" not in name:
        candidates.reverse()
    return next((candidate for candidate in candidates if candidate in part), None)


def tables(results: dict[str, Any]) -> list[str]:
    lines = []
    for title, part in results["parts"].items():
        part = {name: figures for name, figures in part.items() if "seconds" in figures}
        preset, kind, batch = title.split()
        lines += [f"**{preset}, batch {batch}, to {'images' if kind == 'images' else 'tokens'}**", ""]
        lines += ["| | GFLOP an image | median s a batch (min-max) | processor s | times faster | paper | peak MB |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for name, figures in part.items():
            base = baseline(name, part)
            seconds, processor = figures["seconds"], figures.get("cpu_seconds")
            row = PAPER_ROWS.get(name.removesuffix("_bf16")) or PAPER_ROWS.get(f"{preset} {name.removesuffix('_bf16')}")
            paper = SPEEDUPS.get(preset, {}).get(row or "") if base and base.startswith("teacher") else None
            cells = [
                name,
                f"{figures['gflop_an_image']:,.1f}" if "gflop_an_image" in figures else "",
                f"{statistics.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f})",
                f"{statistics.median(processor):.2f}" if processor else "",
                f"{ratio(figures, part[base]):.2f}" if base and base != name else "1",
                f"{paper:g}" if paper else "",
                f"{statistics.median(figures['peak_mb']):,.0f}" if figures.get("peak_mb") else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
        differences = {
            n: f["difference_to_lean"] for n, f in results["parts"][title].items() if "difference_to_lean" in f
        }
        if differences:
            lines += [
                "Largest difference to `lean_1`: " + ", ".join(f"{n} {d:.1e}" for n, d in differences.items()),
                "",
            ]
        if tflops := results.get("matmul_tflops"):
            lines += [*throughput(part, int(batch), tflops), ""]
    return lines


def throughput(part: dict[str, Any], batch: int, tflops: float) -> list[str]:
    """Images a second, and each time over its floor: the arithmetic at the rate of a large product in bfloat16. A pass
    that PyTorch cannot count (compiled, captured, exported) computes what the lean one of as many steps does."""
    lines = [f"Floor: {tflops:.0f} TFLOP/s in bfloat16.", ""]
    lines += ["| | images a second | ms a batch | floor, ms | times the floor |", "|---|---|---|---|---|"]
    for name, figures in part.items():
        _, *options = name.split("_")
        steps = options[0] if options and options[0].isdigit() else "1"
        counted = [each for each in (name, f"lean_{steps}_bf16") if "gflop_an_image" in part.get(each, {})]
        if not counted:
            continue
        seconds = statistics.median(figures["seconds"])
        floor = part[counted[0]]["gflop_an_image"] * batch / tflops / 1e3
        cells = f"{batch / seconds:,.1f}", f"{1e3 * seconds:.2f}", f"{1e3 * floor:.2f}", f"{seconds / floor:.2f}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def launches(results: dict[str, Any]) -> list[str]:
    lines = []
    for preset, found in results["launches"].items():
        teacher = found["teacher"]
        lines += [f"**{preset}: operations to be launched, batch 1, to tokens**", ""]
        lines += ["| | operations | the teacher's over these |", "|---|---|---|"]
        for name, operations in found.items():
            lines.append(f"| {name} | {operations:,} | {teacher / operations:.1f} |")
        lines.append("")
    return lines


def draw_chart(results: dict[str, Any], path: Path) -> None:
    """How many times faster than its baseline each contestant is, a panel a part; whiskers from the fastest and slowest
    round."""
    parts = {
        title: {name: figures for name, figures in part.items() if "seconds" in figures}
        for title, part in results["parts"].items()
    }
    parts = {title: part for title, part in parts.items() if part}
    columns = min(4, max(1, len(parts)))
    rows = max(1, -(-len(parts) // columns))
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 2.9 * rows), squeeze=False)
    for axis in axes.flat[len(parts) :]:
        axis.set_visible(False)
    for axis, (title, part) in zip(axes.flat[: len(parts)], parts.items(), strict=True):
        names = [name for name in part if baseline(name, part)]
        values = [ratio(part[name], part[baseline(name, part) or name]) for name in names]
        spread = [
            [
                value - statistics.median(cost(part[baseline(name, part) or name])) / max(cost(part[name])),
                statistics.median(cost(part[baseline(name, part) or name])) / min(cost(part[name])) - value,
            ]
            for name, value in zip(names, values, strict=True)
        ]
        bounds = [[max(0.0, low) for low, _ in spread], [max(0.0, high) for _, high in spread]]
        axis.barh(names, values, xerr=bounds, color=["0.7" if name == baseline(name, part) else "C0" for name in names])
        for place, value in enumerate(values):
            axis.annotate(f" {value:.2f}", (value, place), va="center", fontsize=8)
        axis.set_title(title.replace(" ", ", batch ", 2).replace("batch ", "", 1), fontsize=10)
        axis.set_xlabel("times faster than the grey bar", fontsize=8)
        axis.set_xlim(0, 1.18 * max(values))
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)
