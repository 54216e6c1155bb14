"""Classes as people write them: numbers, or ImageNet's names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

IMAGENET_CLASSES = 1000


class UnknownClass(ValueError):
    """No such class. The message says which there are, and names that are close."""


def class_names(num_classes: int) -> Sequence[str]:
    """Names of the classes where they have some: a thousand classes are ImageNet's."""
    return imagenet_names() if num_classes == IMAGENET_CLASSES else []


def imagenet_names() -> Sequence[str]:
    """The names of ImageNet's thousand classes, as torchvision has them."""
    from ddops.torchvision_compat import define_missing_operators

    define_missing_operators()
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    names: Sequence[str] = _IMAGENET_CATEGORIES
    return names


def class_number(text: str, num_classes: int, names: Sequence[str]) -> int:
    """The class that a number or a name means.

    Raises:
        UnknownClass: no such number or name.
    """
    if text.isdecimal():
        if int(text) < num_classes:
            return int(text)
        raise UnknownClass(f"no class {text}; there are {num_classes}, 0 to {num_classes - 1}")
    if not names:
        raise UnknownClass(f"no class {text!r}; these classes have no names: give numbers, 0 to {num_classes - 1}")
    # Case tells two of them apart: Cardigan, a dog, from a cardigan.
    same = [number for number, name in enumerate(names) if name.lower() == text.lower()]
    exact = [number for number in same if names[number] == text]
    if exact or len(same) == 1:
        return (exact or same)[0]
    raise UnknownClass(f"no ImageNet class {text!r}; close are: {_close(text, names)}")


def _close(text: str, names: Sequence[str]) -> str:
    """The names, with their numbers, that ``text`` may have meant."""
    lower = [name.lower() for name in names]
    close = difflib.get_close_matches(text.lower(), lower, n=3, cutoff=0.5)
    close += [name for name in lower if text and text.lower() in name][:3]
    numbers = [number for number, name in enumerate(lower) if name in close]
    return ", ".join(f"{names[number]} ({number})" for number in numbers) or "none; give a number, 0 to 999"
