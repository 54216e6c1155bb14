"""``ddops run``: the flow in this terminal, with no server (or with the one at PREFECT_API_URL, if that is set)."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ddops.flows.environment import settings

LOG = {
    # One column says which stage speaks.
    "PREFECT_LOGGING_FORMATTERS_STANDARD_FORMAT": "%(asctime)s  %(message)s",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_FLOW_RUN_FMT": "%(asctime)s  %(message)s",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_TASK_RUN_FMT": "%(asctime)s  %(task_run_name)-14s %(message)s",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_DATEFMT": "%H:%M:%S",
}


def main() -> int:
    """Run; the exit code is 0 only if everything ended well."""
    parser = argparse.ArgumentParser(prog="ddops run", description="Run the pipeline, stage by stage.")
    parser.add_argument("preset", nargs="?", default="digits")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--target", help="the last stage to run (default: all)")
    parser.add_argument("--force", action="store_true", help="run stages even if they are up to date")
    parser.add_argument("--remote", help="a DVC remote to fetch from before, and to push to after")
    parser.add_argument("--promote", metavar="REASON", help="make the model that passes the production model")
    arguments = parser.parse_args()
    env = settings(Path.cwd()) | {name: os.environ.get(name, value) for name, value in LOG.items()}
    os.environ |= env
    if "PREFECT_API_URL" not in os.environ:
        os.environ["PREFECT_SERVER_EPHEMERAL_ENABLED"] = "true"
    # After the environment: Prefect reads it when it is imported.
    from ddops.flows.retrain import retrain

    state = retrain(
        preset=arguments.preset,
        overrides=arguments.overrides,
        target=arguments.target,
        force=arguments.force,
        remote=arguments.remote,
        promote=arguments.promote,
        return_state=True,
    )
    good = state.is_completed()
    print(f"\n{state.name}: {state.message}", file=sys.stdout if good else sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
