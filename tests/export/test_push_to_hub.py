"""A bundle that goes to the hub and comes back: the real client against a server on this machine."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ddops import OneStepPipeline
from ddops.export.manifest import read_manifest
from helpers.hub_upload import LARGE, TOKEN, serve_uploads
from helpers.tiny import ROOT, contents

PUSH = """
import sys
from ddops import OneStepPipeline
print(OneStepPipeline.from_pretrained(sys.argv[1]).push_to_hub("me/digits", private=True, message="a bundle"))
"""
PULL = """
import sys
from ddops import OneStepPipeline
pipe = OneStepPipeline.from_pretrained("me/digits")
pipe([3, 7], seed=5).images[1].save(sys.argv[1])
print(pipe.directory)
"""


@pytest.fixture
def hub():
    hub, server = serve_uploads()
    yield hub
    server.shutdown()


def client(hub, home, code, *arguments, token=TOKEN):
    """A process of its own: the client reads its settings when it is imported."""
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": token,
        # Its newer upload protocol is a library's with servers of its own.
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
    }
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_a_bundle_goes_to_the_hub_and_comes_back(hub, bundle, tmp_path):
    pushed = client(hub, tmp_path / "one", PUSH, bundle)
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.strip() == f"{hub.url}/me/digits/commit/{hub.heads['main']}"
    assert hub.repos == {"me/digits": "private"}
    assert hub.messages == ["a bundle"]
    stored = {name.removeprefix("me/digits/"): content for name, content in hub.files.items()}
    assert stored.pop("README.md").startswith(b"---\nlibrary_name: ddops")
    vouched = {name: content for name, content in contents(bundle).items() if name in stored}
    assert stored == vouched
    assert set(stored) == {"manifest.json", "model.onnx", *read_manifest(bundle).files}
    assert len(hub.objects) == sum(name.endswith(LARGE) for name in stored)

    pulled = client(hub, tmp_path / "two", PULL, tmp_path / "seven.png")
    assert pulled.returncode == 0, pulled.stderr
    assert str(tmp_path / "two") in pulled.stdout
    expected = OneStepPipeline.from_pretrained(bundle)([3, 7], seed=5).images[1]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "seven.png")), np.asarray(expected))


@pytest.mark.slow
def test_without_the_right_token_nothing_is_stored(hub, bundle, tmp_path):
    refused = client(hub, tmp_path, PUSH, bundle, token="hf_wrong")
    assert refused.returncode != 0
    assert "401" in refused.stderr
    assert not hub.files
    assert not hub.objects
