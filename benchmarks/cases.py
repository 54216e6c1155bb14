"""The command line of a benchmark that measures some cases, each in a process of its own, so that none pays for
another's memory. What was measured before of the other cases is kept.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ddops.files import write_json


def has_bfloat16() -> bool:
    """Whether PyTorch has products in bfloat16 for this processor that are not float32's in disguise."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def run_cases(description: str | None, cases: Iterable[str], measure: Callable[[str, Path], dict[str, Any]]) -> None:
    """Measure the cases that the command line names, or all; ``measure(case, params)`` gives the figures."""
    known = list(cases)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--params", type=Path, default=Path("params"))
    parser.add_argument("--cases", nargs="+", choices=known, default=known)
    parser.add_argument("--one", choices=known, help="measure one case in this process and print it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.params)))
        return
    result: dict[str, Any] = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    result["command"] = " ".join(["python", *sys.argv])
    result["date"] = datetime.now(UTC).date().isoformat()
    result["machine"] = f"{platform.system()} {platform.machine()}, 1 thread, no GPU"
    result["torch"] = torch.__version__
    result["seed"] = 0
    for case in arguments.cases:
        command = [sys.executable, sys.argv[0], "--output", str(arguments.output), "--params", str(arguments.params)]
        done = subprocess.run([*command, "--one", case], check=True, stdout=subprocess.PIPE, text=True)
        result[case] = json.loads(done.stdout.splitlines()[-1])
        print(case, json.dumps(result[case], indent=2), flush=True)
        write_json(arguments.output, result)
