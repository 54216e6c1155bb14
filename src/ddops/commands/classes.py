"""Classes as people write them: numbers, or ImageNet's names."""

from __future__ import annotations

from ddops.class_names import UnknownClass, class_names, class_number
from ddops.commands.arguments import CommandError


def parse_classes(text: str, num_classes: int) -> list[int]:
    """Class labels from a comma-separated list, e.g. ``207,otter`` where there are a thousand classes.

    Raises:
        CommandError: no such number or name; with the names that are close.
    """
    names = class_names(num_classes)
    try:
        return [class_number(part.strip(), num_classes, names) for part in text.split(",")]
    except UnknownClass as error:
        raise CommandError(f"--classes: {error}") from None
