"""The extras of the package: which one brings what, and the one line that names it where something is missing.

``pip install ddops`` composes and checks configurations; what draws, trains, serves or orchestrates is an extra.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import TracebackType
from typing import Final

_BRINGS: Final = {
    "train": (
        *("torch", "torchvision", "safetensors", "dvc", "dvclive", "gto", "sklearn", "huggingface_hub", "httpx2"),
        *("lpips", "torch_fidelity", "onnx", "onnxscript", "tqdm", "matplotlib", "jinja2"),
    ),
    "serve": ("onnxruntime", "PIL", "fastapi", "starlette", "uvicorn", "prometheus_client"),
    "prefect": ("prefect", "prefect_dask", "psutil"),
    "dask": ("distributed",),
    "s3": ("dvc_s3",),
    "gpu": ("tensorrt",),
    "rtx": ("tensorrt_rtx",),
    "t2i": ("transformers", "tokenizers", "pyarrow"),
}
EXTRA_OF: Final = {module: extra for extra, modules in _BRINGS.items() for module in modules}
"""Top-level module -> the extra that brings it; the smallest one, where several do."""


class MissingExtra(ImportError):
    """A feature whose packages are not installed. The message names the extra that brings them."""

    def __init__(self, what: str, extra: str, error: ImportError) -> None:
        super().__init__(f"{what} needs packages that are not installed ({error}): pip install 'ddops[{extra}]'")


def explained(error: ImportError, what: str) -> ImportError:
    """A :class:`MissingExtra` that says what ``what`` lacks, where an extra brings it; else the error as it is."""
    extra = EXTRA_OF.get(error.name or "")
    return error if extra is None else MissingExtra(what, extra, error)


def require(module: str, what: str) -> None:
    """For a tool that is run as a process of its own; raises :class:`MissingExtra` where it is not installed."""
    if importlib.util.find_spec(module) is None:
        raise MissingExtra(what, EXTRA_OF[module], ImportError(f"No module named {module!r}"))


def explain_at_the_top() -> None:
    """For packages whose modules are run as ``python -m package.module`` and import what they need first: a missing
    extra is then one line on stderr, and no traceback. Does nothing where the package is imported otherwise."""
    if sys.argv[0] == "-m":  # as long as the module that is to be run is being looked for
        sys.excepthook = _print_explained


def _print_explained(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    said = explained(error, Path(sys.argv[0]).stem) if isinstance(error, ImportError) else error
    if isinstance(said, MissingExtra):
        print(said, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
