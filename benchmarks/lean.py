"""The fast path side by side with the plain one and with the teacher: full-size models, random weights.

    python benchmarks/lean.py run --output benchmarks/results/lean_cpu.json               # every part, then the report
    python benchmarks/lean.py measure var_d16 tokens 4 --rounds 2 --output FILE           # one part
    python benchmarks/lean.py launches var_d16 --output FILE                              # operations an image
    python benchmarks/lean.py report --output FILE                                        # table, chart
    python benchmarks/lean.py run --device cuda --output benchmarks/results/lean_gpu.json # on a GPU

Rounds are interleaved: each runs every contestant of the part once, after one that warms up. Each round is written when
it is done and a later call adds to what is there, so that a part may be measured in several sittings. Times are
wall-clock and, on a CPU with one thread, processor time, which other work on the machine disturbs less: ratios are of
medians of that. Memory is the most that a run needed beyond what was there before it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch
from cases import has_bfloat16
from lean_contestants import Contest, Run
from lean_report import write_report
from torch.utils._python_dispatch import TorchDispatchMode

from ddops.config.load import compose, validate
from ddops.costs.ledger import Ledger
from ddops.files import write_json

PRESETS: Final = ("var_d16", "llamagen_l")
KINDS: Final[dict[str, dict[str, dict[int, list[str]]]]] = {
    "cpu": {
        "tokens": {
            1: ["reference_1", "plain_1", "lean_1", "lean_1_bf16", "reference_2", "lean_2"],
            4: ["reference_1", "lean_1", "reference_2", "lean_2"],
        },
        "images": {1: ["reference_1", "lean_1", "lean_2", "lean_1_bf16", "onnx_1"]},
        "teacher": {
            1: ["teacher", "involved", "lean_1", "lean_2"],
            8: ["teacher_bf16", "lean_1_bf16", "lean_2_bf16"],
            64: ["teacher_bf16", "lean_1_bf16", "lean_2_bf16"],
        },
    },
    "cuda": {
        "images": {
            batch: [
                *("reference_1_bf16", "plain_1_bf16", "lean_1_bf16", "lean_2_bf16", "lean_1_bf16_compile"),
                *("lean_1_bf16_graph", "onnx_1", "onnx_1_fp16", "tensorrt_1_fp16", "teacher_bf16", "involved_bf16"),
            ]
            for batch in (1, 8, 64)
        },
    },
}
"""Contestants by device, kind of part and batch size. ``teacher`` parts are timed to tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "measure", "launches", "report"))
    parser.add_argument("part", nargs="*", help="measure: PRESET KIND BATCH [CONTESTANT ...]; launches: PRESET")
    parser.add_argument("--device", choices=tuple(KINDS), default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="no round that warms up: where it has been measured before")
    parser.add_argument("--params", type=Path, default=Path("params"))
    parser.add_argument("--work", type=Path, default=Path(".ddops/lean"), help="where exported graphs are kept")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(1)  # so that processor time is the work's own
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else new_results(arguments.device)
    if arguments.action != "report":
        for key, here in identity(arguments.device).items():
            if results[key] != here:
                parser.error(f"{arguments.output} holds figures of the {key} {results[key]}, and this is {here}")
    if arguments.action == "measure":
        preset, kind, batch, *names = arguments.part
        measure(results, arguments, preset, kind, int(batch), names or contestants(arguments.device, kind, int(batch)))
    elif arguments.action == "launches":
        count_launches(results, arguments, arguments.part[0])
    elif arguments.action == "run":
        for preset in PRESETS:
            count_launches(results, arguments, preset)
            for kind, batches in KINDS[arguments.device].items():
                for batch in batches:
                    measure(results, arguments, preset, kind, batch, contestants(arguments.device, kind, batch))
    if arguments.action in ("run", "report"):
        write_report(results, arguments.output.with_suffix(""))


def contestants(device: str, kind: str, batch: int) -> list[str]:
    """Whom a part times; on a processor that has no bfloat16, all in float32."""
    names = KINDS[device][kind][batch]
    if device == "cpu" and not has_bfloat16():
        names = list(dict.fromkeys(name.replace("_bf16", "") for name in names))
    return names


def new_results(device: str) -> dict[str, Any]:
    """An empty file, with what the figures are of."""
    about = {"cpus": os.cpu_count(), "python": platform.python_version()}
    return {**identity(device), **about, "commands": [], "parts": {}, "launches": {}}


def identity(device: str) -> dict[str, Any]:
    """What all rounds of a file share: figures of another machine or other code do not belong beside these."""
    return {
        "device": device,
        "source": source(),
        "name": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def source() -> str:
    """Git's hash of the package's code."""
    command = ["git", "rev-parse", "HEAD:src"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()


def processor() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found.group(1) if found else platform.machine()


def measure(
    results: dict[str, Any], arguments: argparse.Namespace, preset: str, kind: str, batch: int, names: list[str]
) -> None:
    """Add rounds to one part; the file is written after each."""
    config = validate(compose(arguments.params, [f"preset={preset}"]), preset)
    contest = Contest(config, batch, arguments.device, kind == "images", arguments.work, results["source"])
    runs = {name: contest.build(name) for name in names}
    part = results["parts"].setdefault(f"{preset} {kind} {batch}", {})
    outputs = {}
    for name, run in runs.items() if not arguments.cold else ():  # the round that warms up
        with Ledger() if counts_flops(name) else nullcontext() as ledger:
            outputs[name] = run()
        if ledger is not None:
            part.setdefault(name, {})["gflop_an_image"] = round(ledger.flops / batch / 1e9, 1)
    if "lean_1" in outputs:
        for name in {"reference_1", "onnx_1", "plain_1"} & {*outputs}:
            difference = (torch.as_tensor(outputs[name]).cpu() - outputs["lean_1"].cpu()).abs()
            part.setdefault(name, {})["difference_to_lean"] = float(difference.max())
    del outputs
    write_json(arguments.output, results)
    if arguments.device == "cuda":
        results["matmul_tflops"] = matmul_tflops()
    results["commands"].append(stamp())
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            figures = part.setdefault(name, {})
            for key, value in timed(run, arguments.device).items():
                figures.setdefault(key, []).append(value)
        write_json(arguments.output, results)
        medians = {name: round(statistics.median(part[name]["seconds"]), 3) for name in runs}
        print(f"{preset} {kind} {batch}:", medians, flush=True)


def counts_flops(name: str) -> bool:
    """The ledger sees what PyTorch dispatches one by one."""
    return not {"onnx", "tensorrt", "compile", "graph"} & {*name.split("_")}


def matmul_tflops() -> float:
    """What the device reaches in a large product in bfloat16: the floor of a pass is its FLOPs over this."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(20):
        torch.cuda.synchronize()
        started = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * 8192**3 / best / 1e12


def timed(run: Run, device: str) -> dict[str, float]:
    """One run: seconds, processor seconds and peak memory in MB."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "peak_mb": (torch.cuda.max_memory_allocated() - before) / 1e6}
    # Linux with glibc: what earlier runs left is given back, and the peak is counted from here.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    started, started_cpu = time.perf_counter(), time.process_time()
    run()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": (status("VmHWM") - before) / 1e3}


def status(key: str) -> int:
    """A figure of this process, in kB."""
    return int(re.search(rf"{key}:\s*(\d+)", Path("/proc/self/status").read_text()).group(1))  # type: ignore[union-attr]


class Counter(TorchDispatchMode):
    """Counts operations that compute: what would be at least one kernel each. Views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def count_launches(results: dict[str, Any], arguments: argparse.Namespace, preset: str) -> None:
    """Operations an image, counted in the same passes at a sixteenth of the width and with 64 codes. The comparison
    with the codebook is left out."""
    full = validate(compose(arguments.params, [f"preset={preset}"]), preset)
    model = full.teacher.model
    sizes = [f"teacher.model.width={model.width // 16}", "teacher.model.codebook_size=64"]
    sizes += [f"teacher.model.ffn_hidden={model.ffn_hidden // 16}"] if model.family == "llamagen" else []
    sizes += ["sampling.top_k=32"] if full.sampling.top_k else []
    narrow = validate(compose(arguments.params, [f"preset={preset}", *sizes]), preset)
    found = {}
    for name in ("teacher", "involved", "plain_1", "lean_1", "plain_2", "lean_2"):
        run = Contest(narrow, 1, "cpu", False, arguments.work, results["source"]).build(name)
        run()
        with Counter() as counter:
            run()
        found[name] = counter.count
    results["launches"][preset] = found
    results["commands"].append(stamp())
    write_json(arguments.output, results)
    print(preset, json.dumps(found))


def stamp() -> dict[str, str]:
    return {"command": " ".join(sys.argv), "date": datetime.now(UTC).isoformat(timespec="minutes")}


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
