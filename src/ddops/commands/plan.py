"""``ddops plan``: what a preset would run, store and compute. Downloads nothing; allocates no weights."""

from __future__ import annotations

import argparse

from ddops.commands.arguments import Subparsers, add_preset, load_preset

DEFAULT_DEVICE = "h200"


def register(commands: Subparsers) -> None:
    """Declare the arguments."""
    parser = commands.add_parser(
        "plan",
        help="a preset's stages, sizes and an estimate of its work, without running or downloading anything",
        description="Look before you run: `ddops plan var_d16`, or `ddops plan var_d16 trajectories.count=600000`.",
    )
    add_preset(parser)
    parser.add_argument(
        "--device",
        default=DEFAULT_DEVICE,
        help=f"h200, h100, a100, 4090, cpu2, or `this` machine's CPU, probed; default: {DEFAULT_DEVICE}",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the plan."""
    config = load_preset(arguments.preset, arguments.params, arguments.overrides).config

    from ddops.commands.plan_report import describe

    print(describe(config, arguments.device))
