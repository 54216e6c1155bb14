"""What can go wrong between a model and what serves it."""


class ExportError(RuntimeError):
    """An export that does not compute what the PyTorch model computes, or cannot be made."""


class BundleError(RuntimeError):
    """A bundle that is damaged, incomplete, or cannot run here. The message says which file and what to do."""


class MissingExtra(BundleError):
    """A feature whose packages are not installed. The message names the extra that brings them."""

    def __init__(self, what: str, extra: str, error: ImportError) -> None:
        super().__init__(f"{what} needs packages that are not installed ({error}): pip install 'ddops[{extra}]'")
