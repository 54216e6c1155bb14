"""Shared by all tests."""

import pytest
import torch

# Two threads on tiny tensors cost more than they give, and far more when the machine is busy.
torch.set_num_threads(1)


@pytest.fixture
def raised(monkeypatch):
    """Makes this a ddops that computes a stage by the next recipe."""
    from ddops.workspace import recipes

    def raise_recipe(stage):
        newer = {**recipes.known_recipes(), stage: recipes.recipe(stage) + 1}
        monkeypatch.setattr(recipes, "known_recipes", lambda: newer)

    return raise_recipe


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    """A bundle of a tiny one-step student. Not to be changed."""
    from helpers.tiny_bundle import make_bundle  # loads ONNX, which few tests need

    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle")
