"""Files of a bundle, from one directory to another."""

import errno
import os

import pytest

from ddops.export.copying import place_file


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP])
def test_where_hard_links_are_impossible_the_file_is_copied(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "source").write_bytes(b"weights")
    place_file(tmp_path / "source", tmp_path / "there" / "target")
    assert (tmp_path / "there" / "target").read_bytes() == b"weights"
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["target"]
