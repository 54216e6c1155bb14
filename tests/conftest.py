"""Shared by all tests."""

import fcntl
import os
import re
from functools import cache
from pathlib import Path

import hypothesis
import pytest
import torch

# Two threads on tiny tensors cost more than they give, and far more when the machine is busy.
torch.set_num_threads(1)

# The same examples everywhere and every time, and as long as they take on a machine that is busy.
hypothesis.settings.register_profile("ddops", derandomize=True, deadline=None, max_examples=20, database=None)
hypothesis.settings.load_profile("ddops")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """The tests of an ``xdist_group`` in one process, all others wherever there is room. That is what xdist's own
    ``--dist loadgroup`` is for, which with pytest 9.2 heeds no group: a node's id cannot be changed any more."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    @cache
    def group_of(file):
        found = re.search(r'xdist_group\("([^"]+)"\)', (Path(config.rootpath) / file).read_text(encoding="utf-8"))
        return found and found[1]

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return group_of(nodeid.partition("::")[0]) or nodeid

    return ByGroup(config, log)


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
    """A bundle of a tiny one-step student, one for all of xdist's processes. Not to be changed."""
    from helpers.tiny_bundle import make_bundle  # loads ONNX, which few tests need

    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "one-bundle"
    directory.mkdir(exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "made").exists():
            make_bundle(directory / "bundle")
            (directory / "made").touch()
    return directory / "bundle"


@pytest.fixture(scope="session")
def encoder_directory(tmp_path_factory):
    """A small seeded T5. Not to be changed."""
    from ddops.captions.pretrained import write_seeded_encoder  # loads transformers, which few tests need
    from helpers.tiny_captions import ENCODER, PROMPTS

    directory = tmp_path_factory.mktemp("encoder")
    write_seeded_encoder(directory, ENCODER, PROMPTS)
    return directory


@pytest.fixture(scope="session")
def encoder(encoder_directory):
    from ddops.captions.pretrained import TextEncoder

    return TextEncoder(encoder_directory, length=5)
