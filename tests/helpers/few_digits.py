"""The digits, cut short: what is drawn and judged for each of 1,797 images is a quarter of the work for each of 450."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from ddops.data import digits

FEW = 450
"""More than a classifier's features, so that their covariance has full rank."""
CUT_SHORT = f"""
from ddops.data import digits
whole = digits.load()
few = digits.LabelledImages(whole.images_NIHW[:{FEW}], whole.labels_N[:{FEW}])
digits.load = lambda: few
"""
"""The same for a process of its own: what it runs first."""


@contextmanager
def few_digits(count: int = FEW) -> Iterator[None]:
    """In this process."""
    whole = digits.load()
    few = digits.LabelledImages(whole.images_NIHW[:count], whole.labels_N[:count])
    with mock.patch.object(digits, "load", return_value=few):
        yield
