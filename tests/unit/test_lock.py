"""The lock: it says who holds it, and what to set where the file system keeps none."""

import errno
import fcntl
import os
import threading

import pytest

from ddops.lock import HeldError, NoLocksError, held


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_with_what_to_set(tmp_path, monkeypatch, number):
    def refuse(descriptor, operation):
        if os.fstat(descriptor).st_ino == (tmp_path / "net" / "run.lock").stat().st_ino:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(NoLocksError, match=r"net/run\.lock: .*DDOPS_LOCK_DIR"),
        held(tmp_path / "net" / "run.lock", "me"),
    ):
        pass
    monkeypatch.setenv("DDOPS_LOCK_DIR", str(tmp_path / "local"))
    with held(tmp_path / "net" / "run.lock", "me"):
        pass


def test_locks_elsewhere_are_as_good(tmp_path, monkeypatch):
    """The same lock by whatever path, another one for another workspace."""
    monkeypatch.setenv("DDOPS_LOCK_DIR", str(tmp_path / "local"))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "a").mkdir()
    with held(tmp_path / "a" / "run.lock", "me"):
        with pytest.raises(HeldError, match="held by me"), held(tmp_path / "link" / "run.lock", "you"):
            pass
        with held(tmp_path / "b" / "run.lock", "you"):
            pass
    assert [path.name for path in (tmp_path / "a").iterdir()] == []


@pytest.mark.parametrize("content", ["", "[]", "{}", "\x00", '{"holder": 1}', "7"])
def test_a_damaged_lock_file_still_says_that_it_is_held(tmp_path, content):
    path = tmp_path / "run.lock"
    with held(path, "me"):
        path.write_text(content)
        with pytest.raises(HeldError, match="somebody who is starting or ending"), held(path, "you"):
            pass


def test_whoever_waits_gets_it_when_it_is_free(tmp_path):
    order = []

    def second():
        with held(tmp_path / "run.lock", "second", wait=True):
            order.append("second")

    thread = threading.Thread(target=second)
    with held(tmp_path / "run.lock", "first"):
        thread.start()
        thread.join(0.1)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
