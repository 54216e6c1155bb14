"""Full-size (or digits) students with random weights, exported and built into TensorRT-RTX engines without a GPU.

    python benchmarks/engines.py --preset var_d16 --work /tmp/engines --output benchmarks/results/engines_var_d16.json

One process a build, so that its peak memory is its own. Run it again to go on: what is finished is kept. On a busy
machine read the processor time, that of the whole process; `seconds` are by the clock and of the build alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from untrained import with_weights

from ddops.config.load import compose, validate
from ddops.export.provenance import git_commit
from ddops.files import write_json

EXPORT, BUILD = "export", "build"


def export(arguments: argparse.Namespace) -> dict[str, Any]:
    """A bundle of an untrained student; its parity on two images."""
    import torch

    from ddops.export.bundle import Sources, write_bundle
    from ddops.export.manifest import MODEL
    from ddops.models.registry import build_student, build_tokenizer
    from ddops.models.weights import STUDENT, TOKENIZER, save_weights

    config = validate(compose(arguments.params, [f"preset={arguments.preset}"]), arguments.preset)
    torch.manual_seed(arguments.seed)
    model = config.teacher.model
    student, tokenizer = with_weights(build_student(model)), with_weights(build_tokenizer(model))
    files = {name: arguments.work / f"{name}.safetensors" for name in (STUDENT, TOKENIZER)}
    save_weights(files[STUDENT], student.state_dict(), config.teacher.model, STUDENT)
    save_weights(files[TOKENIZER], tokenizer.state_dict(), config.teacher.model, TOKENIZER)
    parameters = {
        name: sum(p.numel() for p in m.parameters()) for name, m in ((STUDENT, student), (TOKENIZER, tokenizer))
    }
    del student, tokenizer
    settings = replace(
        config.export,
        precision=arguments.precision,
        steps=arguments.steps,
        parity_count=2,
        tolerance=None,
        min_psnr=20.0,
        min_equal_tokens=0.5,
    )
    sources = Sources(files[STUDENT], files[TOKENIZER], config.dd1.start_positions, config.dd1.logit_prefix)
    started = time.perf_counter()
    parity = write_bundle(arguments.work / "bundle", sources, settings, {"ddops.preset": arguments.preset})
    size = sum(file.stat().st_size for file in (arguments.work / "bundle").glob(f"{MODEL}*"))
    return {"seconds": time.perf_counter() - started, "bytes": size, "parameters": parameters, "parity": asdict(parity)}


def build(arguments: argparse.Namespace) -> dict[str, Any]:
    """One engine into the bundle."""
    from ddops.config.stages import EngineConfig, ProfileConfig
    from ddops.export.engines import build_engines
    from ddops.export.tensorrt import library_version

    profile = ProfileConfig(min=1, opt=8, max=arguments.max_batch)
    config = EngineConfig(flavour="tensorrt_rtx", targets=(arguments.target,), profile=profile)
    bundle = arguments.work / "bundle"
    (report,) = build_engines(bundle, bundle, config, None, lambda phase, done, total: None)
    return {**asdict(report), "version": library_version("tensorrt_rtx")}


def run_alone(arguments: list[str]) -> dict[str, Any]:
    """A part of this benchmark in a process of its own: what it prints, and its peak memory."""
    process = subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed")
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=(EXPORT, BUILD), help=argparse.SUPPRESS)
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--precision", default="float16", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--targets", nargs="+", default=["80", "89", "120", "portable"])
    parser.add_argument("--target", help=argparse.SUPPRESS)
    parser.add_argument("--max-batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--params", type=Path, default=Path("params"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.part:
        import resource

        result = {EXPORT: export, BUILD: build}[arguments.part](arguments)
        used = resource.getrusage(resource.RUSAGE_SELF)
        result["peak_rss_bytes"] = used.ru_maxrss * 1024
        result["processor_seconds"] = used.ru_utime + used.ru_stime
        result |= {"date": datetime.now(UTC).date().isoformat(), "commit": git_commit(Path(__file__).parent)}
        print(json.dumps(result))
        return
    shared = [
        f"--{name.replace('_', '-')}={getattr(arguments, name)}"
        for name in ("preset", "precision", "steps", "max_batch", "seed", "params", "work")
    ]
    results: dict[str, Any] = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    results.setdefault(EXPORT, None)
    results.setdefault(BUILD, {})
    command = " ".join(sys.argv).replace(str(arguments.work), "WORK")
    results |= {"command": command, "cpus": os.cpu_count(), "max_batch": arguments.max_batch}
    results |= {"preset": arguments.preset, "precision": arguments.precision, "steps": arguments.steps}
    if results[EXPORT] is None:
        results[EXPORT] = run_alone([EXPORT, *shared])
        write_json(arguments.output, results)
    for target in arguments.targets:
        if target not in results[BUILD]:
            results[BUILD][target] = run_alone([BUILD, *shared, f"--target={target}"])
            write_json(arguments.output, results)
            print(target, results[BUILD][target], file=sys.stderr)


if __name__ == "__main__":
    main()
