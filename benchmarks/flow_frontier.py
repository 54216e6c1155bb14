"""Agreement of the flow map with a far finer solve, against evaluations of the posterior mean a token.

    python benchmarks/flow_frontier.py --output benchmarks/results/flow_frontier.json

Codebooks and distributions are random: `flat` logits have standard deviation 1, `peaked` ones 4 (perplexities are in
the results). The fine solve is DPM-Solver++ (2M) on 200 points of a wide log-SNR grid in float64; in one dimension the
quantile map, which is exact. The tests of whether a code is decided count as evaluations. Also: the total-variation
distance of the frequencies to p beside that of as many ordinary draws. Run it again to go on: finished parts are kept.
The chart is written beside the results.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from ddops.files import write_json
from ddops.flow import solvers
from ddops.flow.solvers import solve_flow

SHARPNESS = {"flat": 1.0, "peaked": 4.0}
FIXED = {"euler": (16, 32, 64), "heun": (9, 17, 33, 65), "multistep": (8, 16, 32, 64)}
TOLERANCES = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4)
FINE_RANGE, FINE_POINTS = (-3.0, 3.5), 200
SEED = 0


class Shape(NamedTuple):
    """A codebook and how many tokens are mapped over it."""

    codes: int
    width: int
    unit_norm: bool
    top_k: int
    tokens: int


SHAPES = {
    "V 8, C 1": Shape(8, 1, False, 0, 4000),
    "V 64, C 4 (digits)": Shape(64, 4, False, 0, 4000),
    "V 1024, C 8, unit norm": Shape(1024, 8, True, 0, 4000),
    "V 4096, C 32, top 900 (VAR)": Shape(4096, 32, False, 900, 2000),
    "V 16384, C 8, unit norm (LlamaGen)": Shape(16384, 8, True, 0, 2000),
}


def problem(shape: Shape, sharpness: float) -> tuple[Tensor, Tensor, Tensor]:
    """Noise (N, C), log-probabilities (N, V) and a codebook (V, C), float64."""
    generator = torch.Generator().manual_seed(SEED)
    codebook_VC = torch.randn(shape.codes, shape.width, generator=generator, dtype=torch.float64)
    if shape.unit_norm:
        codebook_VC = torch.nn.functional.normalize(codebook_VC, dim=-1)
    if shape.width == 1:
        codebook_VC = codebook_VC.sort(dim=0).values
    logits_NV = sharpness * torch.randn(shape.tokens, shape.codes, generator=generator, dtype=torch.float64)
    if shape.top_k:
        logits_NV.masked_fill_(logits_NV < logits_NV.topk(shape.top_k).values[:, -1:], -torch.inf)
    noise_NC = torch.randn(shape.tokens, shape.width, generator=generator, dtype=torch.float64)
    return noise_NC, logits_NV.log_softmax(-1), codebook_VC


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


def measure(shape: Shape, sharpness: float) -> dict[str, Any]:
    """Every solver's points over one codebook, in float32."""
    noise_NC, log_p_NV, codebook_VC = problem(shape, sharpness)
    expected_N = truth(noise_NC, log_p_NV, codebook_VC)
    entropy = -torch.special.xlogy(log_p_NV.exp(), log_p_NV.exp()).sum(-1)
    single = noise_NC.float(), log_p_NV.float(), codebook_VC.float()
    points = []
    settings = [(name, {"evaluations": count}) for name, counts in FIXED.items() for count in counts]
    settings += [("adaptive", {"tolerance": tolerance}) for tolerance in TOLERANCES]
    for solver, setting in settings:
        started = time.process_time()
        ids_N, evaluations_N = solve_flow(*single, solver=solver, **setting)  # type: ignore[arg-type]
        points.append(
            {
                "solver": solver,
                **setting,
                "mean_evaluations": float(evaluations_N.double().mean()),
                "most_evaluations": int(evaluations_N.max()),
                "agreement": float((ids_N == expected_N).double().mean()),
                "cpu_seconds": round(time.process_time() - started, 2),
            }
        )
    return {"tokens": shape.tokens, "perplexity": float(entropy.exp().mean()), "points": points}


def frequencies(shape: Shape, sharpness: float, draws: int = 20_000, repeats: int = 20) -> dict[str, Any]:
    """Total-variation distance to one p: of the flow map's frequencies, and of ordinary sampling's."""
    _, log_p_NV, codebook_VC = problem(shape._replace(tokens=1), sharpness)
    p_V = log_p_NV[0].exp()
    generator = torch.Generator().manual_seed(SEED + 1)

    def distance(ids_N: Tensor) -> float:
        return float(0.5 * (ids_N.bincount(minlength=len(p_V)) / draws - p_V).abs().sum())

    noise_NC = torch.randn(draws, shape.width, generator=generator)
    ids_N, _ = solve_flow(noise_NC, log_p_NV.float().expand(draws, -1), codebook_VC.float())
    ordinary = torch.tensor(
        [distance(torch.multinomial(p_V, draws, replacement=True, generator=generator)) for _ in range(repeats)]
    )
    return {
        "draws": draws,
        "flow_map": distance(ids_N),
        "ordinary_mean": float(ordinary.mean()),
        "ordinary_deviation": float(ordinary.std()),
    }


def draw_chart(result: dict[str, Any], path: Path) -> None:
    """Disagreement against evaluations, one panel a codebook and sharpness."""
    parts = result["frontier"]
    figure, axes = plt.subplots(len(SHARPNESS), len(SHAPES), figsize=(19, 7), sharex=True, squeeze=False)
    for row, kind in enumerate(SHARPNESS):
        for axis, shape in zip(axes[row], SHAPES, strict=True):
            axis.set_title(f"{shape}, {kind}", fontsize=9)
            axis.axhline(1, color="0.8", linewidth=0.8)
            axis.axhline(0.2, color="0.8", linewidth=0.8)
            for solver in (*FIXED, "adaptive"):
                points = [point for point in parts[f"{shape}, {kind}"]["points"] if point["solver"] == solver]
                x = [point["mean_evaluations"] for point in points]
                # A point without a single disagreement is drawn at half of one.
                floor = 0.5 / parts[f"{shape}, {kind}"]["tokens"]
                axis.plot(x, [100 * max(1 - point["agreement"], floor) for point in points], "o-", label=solver, ms=3)
            axis.set(xscale="log", yscale="log")
            axis.set_xticks([8, 16, 32, 64], labels=["8", "16", "32", "64"])
    axes[0][0].legend(fontsize=8)
    figure.supxlabel("evaluations of the posterior mean a token, mean")
    figure.supylabel("disagreement with the fine solve, %")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"frontier": {}, "frequencies": {}}
    if arguments.output.exists():
        result = json.loads(arguments.output.read_text())
    result["command"] = " ".join(["python", *sys.argv])
    result["date"] = datetime.now(UTC).date().isoformat()
    result["machine"] = f"{platform.system()} {platform.machine()}, 1 thread"
    result["seed"] = SEED
    for kind, sharpness in SHARPNESS.items():
        for name, shape in SHAPES.items():
            key = f"{name}, {kind}"
            if key not in result["frontier"]:
                result["frontier"][key] = measure(shape, sharpness)
                write_json(arguments.output, result)
            if key not in result["frequencies"]:
                result["frequencies"][key] = frequencies(shape, sharpness)
                write_json(arguments.output, result)
            print(key, json.dumps(result["frontier"][key]["points"][-5:]), result["frequencies"][key], flush=True)
    draw_chart(result, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
