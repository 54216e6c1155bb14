"""``ddops serve``: a bundle over HTTP."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ddops.commands.arguments import CommandError, Subparsers

TOKEN = "DDOPS_SERVE_TOKEN"


def register(commands: Subparsers) -> None:
    """Declare the arguments. Those of the settings' names are checked by the settings."""
    parser = commands.add_parser(
        "serve",
        help="serve a bundle over HTTP",
        description="Serve a bundle: `ddops serve artifacts/bundle`. A directory, a link to one, a file that names "
        "one, or `production`, where ddops promote says which; it is watched, and a newer bundle takes over without "
        f"losing a request. The environment's {TOKEN}, or --token-file, makes /v1/images ask for a bearer token. Needs "
        "ddops[serve].",
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--token-file", type=Path, metavar="FILE")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting, e.g. --set max_batch=8 --set backend=torch; see docs/SERVING.md",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT."""
    from ddops.serving.settings import ServeSettings

    settings = _settings(ServeSettings, arguments.set)
    token = _token(arguments.token_file)
    from ddops.serving.server import serve

    serve(arguments.bundle, settings, host=arguments.host, port=arguments.port, token=token)


def _settings(kind: Any, pairs: list[str]) -> Any:
    known = [field.name for field in dataclasses.fields(kind)]
    values: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or name not in known:
            raise CommandError(f"--set {pair}: expected NAME=VALUE with one of {', '.join(known)}")
        values[name] = value
    try:
        return TypeAdapter(kind).validate_strings(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "settings"
        raise CommandError(f"--set {where}: {first['msg'].removeprefix('Value error, ')}") from None


def _token(file: Path | None) -> str | None:
    token = file.read_text().strip() if file is not None else os.environ.get(TOKEN)
    if token == "":
        raise CommandError(f"{file or TOKEN}: the token is empty; leave it out to serve without one")
    return token
