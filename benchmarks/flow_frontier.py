"""Agreement of the flow map with a far finer solve, against evaluations of the posterior mean a token.

    python benchmarks/flow_frontier.py --output benchmarks/results/flow_frontier.json [--minutes 5] [--only VAR]

Codebooks and distributions are random: `flat` logits have standard deviation 1, `peaked` ones 4 (perplexities are in
the results). The fine solve is DPM-Solver++ (2M) on 300 points of a wide log-SNR grid in float64; in one dimension the
quantile map, which is exact. The tests of whether a code is decided count as evaluations, and so does the way beyond
the end of a fixed grid. Also: the total-variation distance of the frequencies to p beside that of as many ordinary
draws, each several times over, and the probability (Mann and Whitney) of so great a difference if there were none.

Tokens come in blocks, each with its own random numbers, and every block is written when it is done: run the command
again to go on (`--minutes` ends it after the block under way). The default seed is not the one that the solver's
constants were chosen on (0). A finished run draws the chart and prints the tables.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from scipy import stats
from torch import Tensor

from ddops.files import write_json
from ddops.flow import solvers
from ddops.flow.solvers import solve_flow

SHARPNESS = {"flat": 1.0, "peaked": 4.0}
FIXED = {"euler": (16, 32, 64), "heun": (17, 33, 65), "multistep": (16, 32, 64)}
TOLERANCES = (1e-2, 4e-3, 3e-3, 1e-3, 3e-4)
FINE_RANGE, FINE_POINTS = (-3.5, 6.0), 300
BLOCK = 500
"""Tokens with random numbers of their own."""
FIXED_BLOCKS = 2
"""The fixed grids err by per cents, not tenths of one: fewer tokens tell."""
DRAWS, REPEATS = 10_000, 6


class Shape(NamedTuple):
    """A codebook and how many tokens are mapped over it."""

    codes: int
    width: int
    unit_norm: bool
    top_k: int
    tokens: int


SHAPES = {
    "V 64, C 1": Shape(64, 1, False, 0, 10_000),
    "V 64, C 4 (digits)": Shape(64, 4, False, 0, 5_000),
    "V 1024, C 8, unit norm": Shape(1024, 8, True, 0, 3_000),
    "V 4096, C 32, top 900 (VAR)": Shape(4096, 32, False, 900, 5_000),
    "V 16384, C 8, unit norm (LlamaGen)": Shape(16384, 8, True, 0, 3_000),
}


class Problem(NamedTuple):
    """Float64."""

    noise_NC: Tensor
    log_p_NV: Tensor
    codebook_VC: Tensor


def problem(shape: Shape, sharpness: float, seed: int, block: int, tokens: int = BLOCK) -> Problem:
    """The same codebook in every block; other tokens."""
    generator = torch.Generator().manual_seed(seed)
    codebook_VC = torch.randn(shape.codes, shape.width, generator=generator, dtype=torch.float64)
    if shape.unit_norm:
        codebook_VC = torch.nn.functional.normalize(codebook_VC, dim=-1)
    if shape.width == 1:
        codebook_VC = codebook_VC.sort(dim=0).values
    generator.manual_seed(1_000_003 * (seed + 1) + block)
    logits_NV = sharpness * torch.randn(tokens, shape.codes, generator=generator, dtype=torch.float64)
    if shape.top_k:
        logits_NV.masked_fill_(logits_NV < logits_NV.topk(shape.top_k).values[:, -1:], -torch.inf)
    noise_NC = torch.randn(tokens, shape.width, generator=generator, dtype=torch.float64)
    return Problem(noise_NC, logits_NV.log_softmax(-1), codebook_VC)


def truth(noise_NC: Tensor, log_p_NV: Tensor, codebook_VC: Tensor) -> Tensor:
    """The ids to agree with."""
    if codebook_VC.shape[1] == 1:
        return (log_p_NV.exp().cumsum(-1) < torch.special.ndtr(noise_NC)).sum(-1).clamp_max(len(codebook_VC) - 1)
    usual, solvers.LOG_SNR_RANGE = solvers.LOG_SNR_RANGE, FINE_RANGE
    try:
        ids_N, _ = solve_flow(noise_NC, log_p_NV, codebook_VC, solver="multistep", evaluations=FINE_POINTS)
    finally:
        solvers.LOG_SNR_RANGE = usual
    return ids_N


def add_block(part: dict[str, Any], shape: Shape, sharpness: float, seed: int) -> None:
    """Add one block's counts to every solver's point."""
    block = part.setdefault("blocks", 0)
    given = problem(shape, sharpness, seed, block)
    expected_N = truth(*given)
    p_NV = given.log_p_NV.exp()
    perplexity = float((-torch.special.xlogy(p_NV, p_NV).sum(-1)).exp().mean())
    part["perplexity"] = (part.get("perplexity", 0.0) * block + perplexity) / (block + 1)
    single = [tensor.float() for tensor in given]
    settings: list[tuple[str, dict[str, Any]]] = [("adaptive", {"tolerance": tolerance}) for tolerance in TOLERANCES]
    if block < FIXED_BLOCKS:
        settings += [(name, {"evaluations": count}) for name, counts in FIXED.items() for count in counts]
    points = {(point["solver"], point["setting"]): point for point in part.setdefault("points", [])}
    for solver, setting in settings:
        key = solver, next(iter(setting.values()))
        point = points.get(key) or dict(
            zip(("solver", "setting"), key, strict=True), tokens=0, agreed=0, evaluations=0, most=0, cpu_seconds=0.0
        )
        started = time.process_time()
        ids_N, evaluations_N = solve_flow(*single, solver=solver, **setting)  # type: ignore[arg-type]
        point["cpu_seconds"] = round(point["cpu_seconds"] + time.process_time() - started, 2)
        point["tokens"] += len(ids_N)
        point["agreed"] += int((ids_N == expected_N).sum())
        point["evaluations"] += int(evaluations_N.sum())
        point["most"] = max(point["most"], int(evaluations_N.max()))
        points[key] = point
    part["points"] = [with_rates(point) for _, point in sorted(points.items(), key=str)]
    part["blocks"] = block + 1


def with_rates(point: dict[str, Any]) -> dict[str, Any]:
    """A point with what follows from its counts; the standard error is that of a share of so many tokens."""
    tokens = point["tokens"]
    # Agresti's and Coull's centre: an observed 100 % has an error too.
    centre = (point["agreed"] + 2) / (tokens + 4)
    rates = {
        "agreement": point["agreed"] / tokens,
        "standard_error": math.sqrt(centre * (1 - centre) / tokens),
        "mean_evaluations": point["evaluations"] / tokens,
    }
    return {**point, **{name: round(value, 5) for name, value in rates.items()}}


def frequencies(shape: Shape, sharpness: float, seed: int) -> dict[str, Any]:
    """Total-variation distances to one p: of the flow map's frequencies, and of ordinary sampling's."""
    _, log_p_NV, codebook_VC = problem(shape, sharpness, seed, block=-1, tokens=1)
    p_V = log_p_NV[0].exp()
    generator = torch.Generator().manual_seed(seed + 1)

    def mapped() -> Tensor:
        noise_NC = torch.randn(DRAWS, shape.width, generator=generator)
        return solve_flow(noise_NC, log_p_NV.float().expand(DRAWS, -1), codebook_VC.float()).ids_N

    def ordinary() -> Tensor:
        return torch.multinomial(p_V, DRAWS, True, generator=generator)

    def distances(draw: Callable[[], Tensor]) -> list[float]:
        counts = (draw().bincount(minlength=len(p_V)) for _ in range(REPEATS))
        return [round(float(0.5 * (count_V / DRAWS - p_V).abs().sum()), 6) for count_V in counts]

    by_map, by_drawing = distances(mapped), distances(ordinary)
    return {
        "draws": DRAWS,
        "tolerance": solvers.TOLERANCE,
        "flow_map": by_map,
        "ordinary": by_drawing,
        "p_value": float(stats.mannwhitneyu(by_map, by_drawing).pvalue),
    }


def draw_chart(frontier: dict[str, Any], path: Path) -> None:
    """Disagreement against evaluations, one panel a codebook and sharpness."""
    figure, axes = plt.subplots(len(SHARPNESS), len(SHAPES), figsize=(19, 7), sharex=True, sharey=True, squeeze=False)
    for row, kind in enumerate(SHARPNESS):
        for axis, shape in zip(axes[row], SHAPES, strict=True):
            axis.set_title(f"{shape}, {kind}", fontsize=9)
            for x, y in ((16, 1), (32, 0.2)):
                axis.plot([x, x], [0.003, y], ":", color="0.6", linewidth=1)
                axis.plot([6, x], [y, y], ":", color="0.6", linewidth=1)
            for solver in ("adaptive", *FIXED):
                points = [point for point in frontier[f"{shape}, {kind}"]["points"] if point["solver"] == solver]
                points.sort(key=lambda point: point["mean_evaluations"])
                x_values = [point["mean_evaluations"] for point in points]
                # A point without a single disagreement is drawn at half of one.
                y_values = [100 * max(1 - point["agreement"], 0.5 / point["tokens"]) for point in points]
                errors = [100 * point["standard_error"] for point in points]
                axis.errorbar(x_values, y_values, errors, fmt="o-", label=solver, ms=3, elinewidth=0.8)
            axis.set(xscale="log", yscale="log", xlim=(6, 80), ylim=(0.003, 60))
            axis.set_xticks([8, 16, 32, 64], labels=["8", "16", "32", "64"])
    axes[0][0].legend(fontsize=8)
    figure.supxlabel("evaluations of the posterior mean a token, mean (dotted: the targets)")
    figure.supylabel("disagreement with the fine solve, %")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def tables(result: dict[str, Any]) -> str:
    """Markdown: the adaptive solver's points and the frequencies; the fixed grids."""
    head = ["codes, p", "tokens", *(f"{tolerance:g}" for tolerance in TOLERANCES), "total variation: map / ordinary, p"]
    fixed = [(name, setting) for name, settings in FIXED.items() for setting in settings]
    rows, grids = [head], [["codes, p", *(f"{name} {setting}" for name, setting in fixed)]]
    for key, part in result["frontier"].items():
        points = {(point["solver"], point["setting"]): point for point in part["points"]}
        adaptive = [points["adaptive", tolerance] for tolerance in TOLERANCES]
        tv = result["frequencies"][key]
        means = " / ".join(f"{statistics.mean(tv[name]):.4f}" for name in ("flow_map", "ordinary"))
        tokens = f"{adaptive[0]['tokens']:,}"
        rows.append([key, tokens, *(cell(point, error=True) for point in adaptive), f"{means}, {tv['p_value']:.2f}"])
        grids.append([key, *(cell(points[point], error=False) for point in fixed)])
    return "\n\n".join(markdown(lines) for lines in (rows, grids))


def cell(point: dict[str, Any], *, error: bool) -> str:
    """Agreement in per cent, its standard error, and the evaluations it took."""
    spread = f" ± {100 * point['standard_error']:.2f}" if error else ""
    return f"{100 * point['agreement']:.2f}{spread} at {point['mean_evaluations']:.1f}"


def markdown(rows: list[list[str]]) -> str:
    """A table whose first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long; run again to go on")
    parser.add_argument("--only", default="", help="parts whose name holds this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.monotonic()
    settings = {
        "seed": arguments.seed,
        "shapes": {name: list(shape) for name, shape in SHAPES.items()},
        "adaptive": list(TOLERANCES),
        **{name: list(counts) for name, counts in FIXED.items()},
        "fine": [*FINE_RANGE, FINE_POINTS],
        "draws": [DRAWS, REPEATS],
    }
    result: dict[str, Any] = {"frontier": {}, "frequencies": {}}
    if arguments.output.exists():
        result = json.loads(arguments.output.read_text())
        if result.get("settings") != settings:
            parser.error(
                f"{arguments.output} was measured with {result.get('settings')}, not {settings}: another output"
            )
    result["command"] = " ".join(["python", *sys.argv])
    result["date"] = datetime.now(UTC).date().isoformat()
    result["machine"] = f"{platform.system()} {platform.machine()}, 1 thread"
    result["settings"] = settings
    complete = True
    for kind, sharpness in SHARPNESS.items():
        for name, shape in SHAPES.items():
            key = f"{name}, {kind}"
            part = result["frontier"].setdefault(key, {})
            while part.get("blocks", 0) * BLOCK < shape.tokens or key not in result["frequencies"]:
                if arguments.only not in key or time.monotonic() - begun > 60 * arguments.minutes:
                    complete = False
                    break
                if key not in result["frequencies"]:
                    result["frequencies"][key] = frequencies(shape, sharpness, arguments.seed)
                else:
                    add_block(part, shape, sharpness, arguments.seed)
                write_json(arguments.output, result)
                print(key, part.get("blocks", 0), f"{time.monotonic() - begun:.0f} s", flush=True)
    if complete:
        draw_chart(result["frontier"], arguments.output.with_suffix(".png"))
        print(tables(result))


if __name__ == "__main__":
    main()
