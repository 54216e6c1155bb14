"""What can go wrong between a model and what serves it."""


class ExportError(RuntimeError):
    """An export that does not compute what the PyTorch model computes, or cannot be made."""


class BundleError(RuntimeError):
    """A bundle that is damaged, incomplete, or cannot run here. The message says which file and what to do."""
