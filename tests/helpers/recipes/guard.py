"""Does a stage compute what its recipe stands for? The digests are compared with ``tests/golden/recipes.json``."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ddops.files import write_text
from ddops.workspace.recipes import recipe
from helpers.recipes import drawing, training
from helpers.recipes.digest import Digest, moved, rounded
from helpers.recipes.inputs import GOLDEN

FILE = GOLDEN / "recipes.json"
VARIANTS = {**training.VARIANTS, **drawing.VARIANTS}
CASES = [(stage, name) for stage, cases in VARIANTS.items() for name in cases]


@contextmanager
def empty_directory(directory: Path) -> Iterator[None]:
    """As the working directory, one thread, and random numbers that nothing before has moved."""
    before, threads = Path.cwd(), torch.get_num_threads()
    os.chdir(directory)
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(threads)
        os.chdir(before)


def computed(stage: str, name: str, directory: Path) -> Digest:
    """The digest of one variant, run in ``directory``."""
    with empty_directory(directory):
        found: Digest = json.loads(json.dumps(rounded(VARIANTS[stage][name]())))
    return found


def golden() -> dict[str, Any]:
    return dict(json.loads(FILE.read_text())) if FILE.exists() else {}


def complaint(stage: str, name: str, found: Digest, known: Mapping[str, Any]) -> str | None:
    """What is wrong with a digest, and what to do; None where it is its recipe's."""
    now, renew = recipe(stage), f"cd tests && PYTHONPATH=../src:. python -m helpers.recipes --renew {stage}"
    entry = known.get(stage, {"recipe": now, "digests": {}})
    if entry["recipe"] != now:
        return (
            f"recipes.yaml says {stage}: {now}, and its digests are of recipe {entry['recipe']}: renew them with\n"
            f"  {renew}"
        )
    if name not in entry["digests"]:
        return f"{stage}, {name}: has no digest yet: make one with\n  {renew}"
    lines = list(moved(entry["digests"][name], found, half="16" in name))
    if not lines:
        return None
    told = "\n  ".join(lines[:8] + ["..."] * (len(lines) > 8))
    return (
        f"{stage}, {name}: computes something else than recipe {now} stands for:\n  {told}\n"
        f"Either it is meant to: then set `{stage}: {now + 1}` in recipes.yaml and in "
        f"src/ddops/workspace/template/recipes.yaml, and renew the digests with\n  {renew}\n"
        f"or it is not: then undo the change. (docs/RECIPES.md)"
    )


def renew(stages: Iterable[str]) -> list[str]:
    """Write the digests of these stages anew; the stages whose digests moved while their recipe did not, of which
    nothing is written: raise it first."""
    known, refused = golden(), []
    for stage in stages:
        entry = known.get(stage, {"recipe": recipe(stage), "digests": {}})
        digests = {}
        for name in VARIANTS[stage]:
            with tempfile.TemporaryDirectory() as directory:
                digests[name] = computed(stage, name, Path(directory))
        kept = {} if entry["recipe"] != recipe(stage) else entry["digests"]
        half = {name: "16" in name for name in digests}
        changed = [
            name for name in kept.keys() & digests.keys() if [*moved(kept[name], digests[name], half=half[name])]
        ]
        if changed:
            refused.append(stage)
            continue
        # Digests that agree stay as they are: rounding on another machine is no news.
        known[stage] = {"recipe": recipe(stage), "digests": {name: kept.get(name, digests[name]) for name in digests}}
    write_text(FILE, _text({stage: known[stage] for stage in VARIANTS if stage in known}))
    return refused


def _text(known: Mapping[str, Any]) -> str:
    """JSON with a line a variant."""
    stages = []
    for stage, entry in known.items():
        lines = [f"{json.dumps(name)}: {json.dumps(found)}" for name, found in entry["digests"].items()]
        digests = ",\n".join(lines)
        stages.append(f'{json.dumps(stage)}: {{"recipe": {entry["recipe"]}, "digests": {{\n{digests}\n}}}}')
    return "{\n" + ",\n".join(stages) + "\n}\n"
