"""``ddops presets``: what there is to choose from, a line each."""

from __future__ import annotations

import argparse
from pathlib import Path

from ddops.commands.arguments import Subparsers, add_params
from ddops.config.load import group_files


def register(commands: Subparsers) -> None:
    """Declare the arguments."""
    parser = commands.add_parser("presets", help="the presets, a line each")
    add_params(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print those of ddops, then the workspace's own."""
    files = group_files(arguments.params, "preset")
    width = max(map(len, files))
    for name, file in files.items():
        print(f"{name:<{width}}  {summary(file)}")


def summary(file: Path) -> str:
    """The first sentence of a preset's opening comment; empty where it has none."""
    words: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            words.append(line.lstrip("# ").strip())
    sentence = " ".join(words).partition(". ")[0].rstrip(".")
    return f"{sentence}." if sentence else ""
