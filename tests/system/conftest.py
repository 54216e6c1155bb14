"""Shared by the tests of whole runs."""

import pytest

from helpers.pipeline_world import clone, run


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A workspace whose pipeline ran to the end on preset smoke, and what that printed; not to be changed."""
    workspace = clone(tmp_path_factory.mktemp("pipeline") / "first")
    return workspace, run(workspace, "dvc", "repro")
