"""Writing: the whole file or none of it, and a disk that is full is named whatever library writes."""

import errno
import os
import resource

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ddops.files import atomic_path, write_json


def torch_save(path):
    with path.open("wb") as file:
        torch.save({"a": torch.ones(100_000)}, file)


WRITERS = {
    "torch": torch_save,
    "numpy": lambda path: np.savez(path.open("wb"), a=np.ones(100_000)),
    "text": lambda path: path.write_text("a" * 100_000),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, writer):
    """/dev/full answers to every byte what a full disk does."""
    target = tmp_path / "file.bin"
    target.write_text("what was there")
    (tmp_path / f".file.bin.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as error, atomic_path(target) as temporary:
        WRITERS[writer](temporary)
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename == str(target)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file.bin": "what was there"}


def test_a_library_that_only_quotes_the_disks_error_is_understood(tmp_path):
    """safetensors writes a file of its own and says "(os error 27)": here for one that grows too large."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
        with pytest.raises(OSError, match="File too large") as error, atomic_path(tmp_path / "file.bin") as temporary:
            save_file({"a": torch.ones(100_000)}, temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert error.value.filename == str(tmp_path / "file.bin")
    assert list(tmp_path.iterdir()) == []


def test_errors_of_other_kinds_are_left_as_they_are(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", float("nan"))
    try:
        (tmp_path / "missing").read_text()
    except FileNotFoundError:
        with pytest.raises(KeyError, match="mine"), atomic_path(tmp_path / "a.json"):
            raise KeyError("mine") from None
    assert list(tmp_path.iterdir()) == []
