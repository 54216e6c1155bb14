"""The registry of production models: one JSON file, replaced atomically at every step, which is the step.

Beside it, a directory a version holds the bundle, tracked by DVC; nothing of a version is changed once it is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from ddops.files import read_json, write_json

REGISTRY: Final = "registry.json"
"""Its name, in the directory of the versions."""
_WAY_OUT: Final = "restore it from Git"


class RegistryError(ValueError):
    """A step that the registry does not allow. The message says which are possible."""


class Version(TypedDict, total=False):
    """What a version's readers go by, each by some of it."""

    files: dict[str, str] | list[str]
    metrics: dict[str, dict[str, Any]]
    row: str
    preset: str
    bundle: str


Step = TypedDict("Step", {"what": str, "version": str, "from": str | None, "at": str, "by": str, "reason": str})
"""What led from one version to another."""


class Contents(TypedDict):
    """The file."""

    current: str | None
    versions: dict[str, Version]
    history: list[Step]


_REGISTRY: Final[TypeAdapter[Any]] = TypeAdapter(Contents)


class _Facts(dict[str, Any]):
    """A version's facts; asking for one that is not there is an error of the registry's."""

    def __init__(self, where: str, facts: Mapping[str, Any]) -> None:
        super().__init__(facts)
        self._where = where

    def __missing__(self, key: str) -> Any:
        raise RegistryError(f"{self._where}: damaged (it has no {key}); {_WAY_OUT}")


@dataclass
class Registry:
    """What ``production/registry.json`` holds."""

    path: Path
    current: str | None = None
    versions: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Version -> bundle, file hashes, metrics and which row of them is its own, decision, source commit."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Every step, oldest first: what, version, when, by whom, why."""

    @classmethod
    def load(cls, path: Path) -> Registry:
        """The registry; an empty one where there is no file.

        Raises:
            RegistryError: the file is damaged.
        """
        if not path.exists():
            return cls(path)
        values = read_json(path, _REGISTRY, _WAY_OUT, RegistryError)
        versions: dict[str, dict[str, Any]] = {
            name: _Facts(f"{path}: {name}", facts) for name, facts in values["versions"].items()
        }
        registry = cls(path, values["current"], versions, values["history"])
        named = [step[end] for step in registry.history for end in ("version", "from")]
        if unknown := {registry.current, *named} - {None, *registry.versions}:
            raise RegistryError(f"{path}: damaged (it holds no version {', '.join(map(str, unknown))}); {_WAY_OUT}")
        if registry.history and registry.current != registry.history[-1]["version"]:
            raise RegistryError(f"{path}: damaged (the last step did not lead to {registry.current}); {_WAY_OUT}")
        return registry

    def next_version(self) -> str:
        """The name of the version to be promoted next."""
        return f"v{len(self.versions) + 1}.0.0"

    def promote(self, version: str, facts: Mapping[str, Any], *, by: str, reason: str) -> None:
        """Enter a new version and make it the current one, in one write.

        Raises:
            RegistryError: the version is there already, or its files are those of the current one.
        """
        if version in self.versions:
            raise RegistryError(f"{version} is in the registry already")
        if self.current is not None and self.versions[self.current]["files"] == facts["files"]:
            raise RegistryError(f"this model is in production already, as {self.current}")
        self.versions[version] = dict(facts)
        self._step("promote", version, by, reason)

    def rollback(self, version: str, *, by: str, reason: str) -> None:
        """Make a version that :meth:`earlier` found the current one again."""
        self._step("rollback", version, by, reason)

    def earlier(self, version: str | None) -> str:
        """What a rollback leads to: ``version``, or the one that was entered before the current one.

        Raises:
            RegistryError: there is no such version, or it is the current one.
        """
        found = version or self._previous()
        if found not in self.versions:
            raise RegistryError(f"no version {found}; there are: {', '.join(self.versions) or 'none'}")
        if found == self.current:
            raise RegistryError(f"{found} is in production already")
        return found

    def _previous(self) -> str:
        """Going back twice goes back two."""
        names = list(self.versions)
        if self.current is None or names.index(self.current) == 0:
            raise RegistryError("there is no earlier version to return to")
        return names[names.index(self.current) - 1]

    def _step(self, what: str, version: str, by: str, reason: str) -> None:
        at = datetime.now(UTC).isoformat(timespec="seconds")
        self.history.append(
            {"what": what, "version": version, "from": self.current, "at": at, "by": by, "reason": reason}
        )
        self.current = version
        write_json(self.path, {"current": self.current, "versions": self.versions, "history": self.history})


def metrics_in_production(path: Path) -> dict[str, Any] | None:
    """The metrics of the model in production, its own row under ``student`` too; None while there is none.

    Raises:
        RegistryError: the file is damaged.
    """
    registry = Registry.load(path)
    if registry.current is None:
        return None
    facts = registry.versions[registry.current]
    if facts["row"] not in facts["metrics"]:
        raise RegistryError(f"{path}: damaged ({registry.current} has no figures of {facts['row']}); {_WAY_OUT}")
    return {**facts["metrics"], "student": facts["metrics"][facts["row"]]}
