"""Downloads against a local server and the hub's real client: what arrives is right, or it is said what is wrong."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from ddops.config.evaluation import RemoteFile
from ddops.hub import transfer
from ddops.hub.content import content_problem
from ddops.hub.download import HubFile, fetch, local
from ddops.hub.files import obtain_file
from ddops.hub.records import DownloadError, HubRecords
from helpers.hub_server import FIRST_COMMIT, OTHER_COMMIT, Hub, serve


def archive() -> bytes:
    """A zip archive of about a megabyte, as PyTorch's files are."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as members:
        members.writestr("model/data/0", bytes(range(256)) * 4000)
    return file.getvalue()


CONTENT = archive()
NAME = "weights/model.pth"
FILE = HubFile("owner/repo", "main", NAME)
LOGIN = b"<!DOCTYPE html><title>Log in</title>"
CHUNK = 100_000
KEY = f"owner/repo/{NAME}"


class Place(NamedTuple):
    hub: Hub
    lock: Path
    cache: Path

    def fetch(self) -> Path:
        return fetch([FILE], self.lock)[0].path

    def partials(self) -> list[Path]:
        return list(self.cache.rglob("*.ddops-partial"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A server with one file, an empty cache, no lock file, and no waiting."""
    hub, server = serve()
    hub.files[KEY] = CONTENT
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    # The client writes whole chunks: what it has of the last one when a connection breaks is lost.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    yield Place(hub, tmp_path / "hub.lock.json", tmp_path / "cache")
    server.shutdown()
    server.server_close()


def refusal(place: Place) -> str:
    with pytest.raises(DownloadError) as error:
        place.fetch()
    assert NAME in str(error.value)
    return str(error.value)


def test_the_first_download_is_trusted_recorded_and_said(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    assert place.fetch().read_bytes() == CONTENT
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    assert "Trusted on first use" in caplog.text
    assert json.loads(place.lock.read_text()) == {
        "owner/repo": {
            "commits": {"main": FIRST_COMMIT},
            "files": {NAME: {"size": len(CONTENT), "sha256": sha256}},
        }
    }
    caplog.clear()
    requests = len(place.hub.requests)
    assert place.fetch().read_bytes() == CONTENT
    assert "Trusted" not in caplog.text
    assert len(place.hub.requests) == requests, "what is in the cache and known is not asked for again"


def test_the_file_lies_in_the_hubs_own_cache(place: Place) -> None:
    path = place.fetch()
    assert path == place.cache / "models--owner--repo" / "snapshots" / FIRST_COMMIT / NAME
    assert place.partials() == []


def test_bodies_under_another_path_are_followed(place: Place) -> None:
    place.hub.redirect = True
    assert place.fetch().read_bytes() == CONTENT
    assert any(path.startswith("/storage/") for _, path, _ in place.hub.requests)


def test_a_cut_connection_is_resumed_where_it_broke(place: Place) -> None:
    place.hub.cut_after = [300_000, 400_000]
    assert place.fetch().read_bytes() == CONTENT
    assert place.hub.ranges() == ["bytes=300000-", "bytes=700000-"]


def test_a_killed_download_goes_on_in_the_next_run(place: Place) -> None:
    """The hub's client would begin again at the first byte."""
    place.hub.cut_after = [300_000] + [0] * 100
    assert "the connection failed" in refusal(place)
    assert [path.stat().st_size for path in place.partials()] == [300_000]
    place.hub.cut_after = []
    assert place.fetch().read_bytes() == CONTENT
    assert place.hub.ranges()[-1] == "bytes=300000-"


def test_a_truncated_body_is_refused(place: Place) -> None:
    """The server believes that what it has is all there is."""
    place.hub.stated[KEY] = CONTENT
    place.hub.files[KEY] = CONTENT[:-1000]
    assert "ended early" in refusal(place)
    assert not place.lock.exists()


def test_wrong_bytes_are_refused_and_not_kept(place: Place) -> None:
    place.hub.stated[KEY] = CONTENT
    place.hub.files[KEY] = bytes(len(CONTENT))
    message = refusal(place)
    assert hashlib.sha256(CONTENT).hexdigest() in message
    assert place.partials() == []
    assert not place.lock.exists()


def test_a_file_that_changed_on_the_hub_is_refused_before_it_is_downloaded(place: Place) -> None:
    place.fetch()
    shutil.rmtree(place.cache)
    place.hub.files[KEY] = CONTENT[::-1]
    gets = place.hub.count("GET")
    assert "changed: its sha256" in refusal(place)
    assert place.hub.count("GET") == gets


def test_a_branch_that_moved_leaves_us_at_the_pinned_commit(place: Place) -> None:
    place.fetch()
    shutil.rmtree(place.cache)
    place.hub.heads["main"] = OTHER_COMMIT
    assert FIRST_COMMIT in str(place.fetch())


def test_a_commit_that_the_hub_answers_with_another_is_refused(place: Place) -> None:
    place.fetch()
    shutil.rmtree(place.cache)
    place.hub.heads[FIRST_COMMIT] = OTHER_COMMIT
    message = refusal(place)
    assert "the revision changed" in message
    assert OTHER_COMMIT in message


def test_a_damaged_file_in_the_cache_is_found(place: Place) -> None:
    path = place.fetch()
    blob = path.resolve()
    blob.write_bytes(CONTENT[:-1] + b"x")
    assert "sha256" in refusal(place)


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "answered 401: log in"), (403, "answered 403: log in"), (404, "answered 404"), (410, "answered 410")],
)
def test_an_answer_that_stays_is_not_asked_for_again(place: Place, status: int, message: str) -> None:
    place.hub.status["HEAD"] = [status]
    assert message in refusal(place)
    assert len(place.hub.requests) == 1


def test_a_missing_file_and_a_missing_revision_are_told_apart(place: Place) -> None:
    with pytest.raises(DownloadError, match=r"nothing\.pth.*no such file"):
        fetch([HubFile("owner/repo", "main", "nothing.pth")], place.lock)
    with pytest.raises(DownloadError, match=r"no such revision"):
        fetch([HubFile("owner/repo", "v9", NAME)], place.lock)


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_errors_that_pass_are_waited_out(place: Place, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    place.hub.status[method] = [503, 503]
    assert place.fetch().read_bytes() == CONTENT
    assert waits[:2] == [1, 2]


def test_errors_that_do_not_pass_are_given_up(place: Place) -> None:
    place.hub.status["HEAD"] = [503] * 100
    assert "the hub answered 503" in refusal(place)
    assert place.hub.count("HEAD") == len(transfer.BACKOFF_SECONDS) + 1


def test_a_page_of_a_proxy_is_not_taken_for_a_hub(place: Place) -> None:
    """Any server answers 200; the hub alone says which commit it answers for."""
    place.hub.status["HEAD"] = [200]
    assert "was not answered by a Hugging Face hub" in refusal(place)


def test_an_html_page_instead_of_the_file_is_called_one(place: Place) -> None:
    page = LOGIN
    place.hub.stated[KEY] = CONTENT[: len(page)]
    place.hub.files[KEY] = page
    assert "HTML page" in refusal(place)


def test_the_disk_is_looked_at_before_anything_is_downloaded(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": len(CONTENT)})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DownloadError, match=r"needed .* free.* HF_HOME"):
        place.fetch()
    assert place.hub.count("GET") == 0


def test_a_disk_that_fills_up_meanwhile_is_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(transfer, "http_get", full)
    assert "the disk is full" in refusal(place)


def test_offline_the_cache_is_used_and_nothing_else(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE" in refusal(place)
    place.fetch()
    requests = len(place.hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert place.fetch().read_bytes() == CONTENT
    place.lock.unlink()
    branch = place.cache / "models--owner--repo" / "refs" / "main"
    assert branch.read_text() == FIRST_COMMIT, "as other tools of the hub leave it"
    assert place.fetch().read_bytes() == CONTENT
    assert json.loads(place.lock.read_text())["owner/repo"]["commits"] == {"main": FIRST_COMMIT}
    assert len(place.hub.requests) == requests


def test_the_environment_of_the_hub_is_respected(place: Place, tmp_path: Path) -> None:
    """HF_ENDPOINT and HF_HOME, in a process of its own, as a user sets them."""
    code = (
        "import sys; from pathlib import Path; from ddops.hub.download import HubFile, fetch\n"
        f"print(fetch([HubFile('owner/repo', 'main', {NAME!r})], Path('lock.json'))[0].path)"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": place.hub.url}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert Path(result.stdout.strip()).is_relative_to(tmp_path / "home" / "hub")
    offline = environment | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    again = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True, check=True)
    assert again.stdout == result.stdout


def test_a_damaged_lock_file_is_named(place: Place) -> None:
    place.lock.write_text("{")
    with pytest.raises(DownloadError, match=r"hub\.lock\.json: damaged"):
        place.fetch()


def test_a_manifests_hash_needs_no_trust(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"
    monkeypatch.setattr("ddops.hub.records.MANIFEST", manifest)
    entry = {"size": len(CONTENT), "sha256": "0" * 64}
    manifest.write_text(json.dumps({"owner/repo": {"license": "MIT", "files": {NAME: entry}}}))
    assert "ddops' own manifest" in refusal(place)


def test_local_files_are_taken_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "model.pth").write_bytes(CONTENT)
    for path in (tmp_path, tmp_path / "model.pth"):
        found = local(path, NAME, "owner/repo")
        assert found.path.read_bytes() == CONTENT
        assert found.sha256 == hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(DownloadError, match=r"holds no other\.pth"):
        local(tmp_path, "other.pth", "owner/repo")
    (tmp_path / "vae_ch160v4096z32.pth").write_bytes(b"mine")
    local(tmp_path, "vae_ch160v4096z32.pth", "FoundationVision/var")
    assert "is not the published vae_ch160v4096z32.pth" in caplog.text


def test_the_manifest_lists_files_with_licence_and_wellformed_hashes() -> None:
    records = HubRecords.load(None)
    for repo, entry in records.manifest.items():
        assert (records.license(repo) or "").startswith(("MIT", "Apache-2.0"))
        for record in entry["files"].values():
            assert record.keys() <= {"size", "sha256"}
            assert len(record.get("sha256", "0" * 64)) == 64


# Any other URL


def remote(place: Place) -> RemoteFile:
    return RemoteFile(url=f"{place.hub.url}/owner/repo/resolve/main/{NAME}")


@pytest.fixture
def anywhere(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return place


def test_a_file_from_any_url_is_trusted_once_and_checked_ever_after(
    anywhere: Place, caplog: pytest.LogCaptureFixture
) -> None:
    fetched = obtain_file(remote(anywhere), "some.key", anywhere.lock)
    assert fetched.path.read_bytes() == CONTENT
    assert "Trusted on first use" in caplog.text
    requests = len(anywhere.hub.requests)
    assert obtain_file(remote(anywhere), "some.key", anywhere.lock) == fetched
    assert len(anywhere.hub.requests) == requests, "it is in the cache"
    fetched.path.write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(DownloadError, match=r"sha256 .*, expected .*fetch again"):
        obtain_file(remote(anywhere), "some.key", anywhere.lock)


def test_a_broken_download_from_any_url_is_continued(anywhere: Place) -> None:
    anywhere.hub.cut_after = [3 * CHUNK]
    assert obtain_file(remote(anywhere), "some.key", anywhere.lock).path.read_bytes() == CONTENT
    assert anywhere.hub.ranges()


def test_another_file_than_the_known_one_is_refused(anywhere: Place) -> None:
    directory, _, name = remote(anywhere).url.rpartition("/")
    wrong = {"size": len(CONTENT), "sha256": "0" * 64}
    anywhere.lock.write_text(json.dumps({directory: {"commits": {}, "files": {name: wrong}}}))
    with pytest.raises(DownloadError, match=r"expected 0{64}[\s\S]*set some\.key\.path=FILE"):
        obtain_file(remote(anywhere), "some.key", anywhere.lock)
    assert not [*(anywhere.cache.parent / "home").rglob("*.pth"), *anywhere.cache.parent.rglob("*-partial")]


def test_hub_urls_go_through_the_hub_and_paths_ask_nobody(anywhere: Place, tmp_path: Path) -> None:
    on_the_hub = RemoteFile(url=f"hf://owner/repo@main/{NAME}")
    assert obtain_file(on_the_hub, "some.key", anywhere.lock).path.read_bytes() == CONTENT
    assert json.loads(anywhere.lock.read_text())["owner/repo"]["commits"] == {"main": FIRST_COMMIT}
    requests = len(anywhere.hub.requests)
    mine = tmp_path / "mine.pth"
    mine.write_bytes(b"mine")
    assert obtain_file(RemoteFile(url=on_the_hub.url, path=str(mine)), "k", anywhere.lock).path == mine
    with pytest.raises(DownloadError, match=r"holds no weights/model\.pth"):
        obtain_file(RemoteFile(url=on_the_hub.url, path=str(tmp_path / "gone")), "k", anywhere.lock)
    assert len(anywhere.hub.requests) == requests


# What cannot be the file is not trusted


IMPOSTORS = {
    "page": LOGIN,
    "page with a byte order mark": b"\xef\xbb\xbf\r\n<html><body>Log in",
    "page in UTF-16": "<html>Log in</html>".encode("utf-16"),
    "storage": b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code></Error>',
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "message": b'{"error": "Invalid username or password."}',
    "plain text": b"upstream request timeout",
    "nothing": b" " * 20,
    "cut archive": CONTENT[:-30],
    "shifted archive": CONTENT[100:],
}


@pytest.mark.parametrize("kind", IMPOSTORS)
def test_what_cannot_be_the_file_is_not_trusted_on_first_use(anywhere: Place, kind: str) -> None:
    """A login page once, the file afterwards: nothing of the page is remembered."""
    anywhere.hub.instead = [IMPOSTORS[kind]]
    with pytest.raises(DownloadError, match=r"model\.pth: what was received is"):
        obtain_file(remote(anywhere), "some.key", anywhere.lock)
    assert not anywhere.lock.exists()
    assert obtain_file(remote(anywhere), "some.key", anywhere.lock).path.read_bytes() == CONTENT


def test_a_page_from_the_hub_is_not_trusted_either(place: Place) -> None:
    place.hub.size_unknown = True
    place.hub.instead = [LOGIN]
    assert "HTML page" in refusal(place)
    assert not place.lock.exists()
    assert place.fetch().read_bytes() == CONTENT


def of_type(kind: str) -> bytes:
    """A small file of a type, whole."""
    file = io.BytesIO()
    if kind == "npy":
        np.save(file, np.arange(100))
    elif kind == "npz":
        np.savez(file, a=np.arange(100))
    elif kind == "legacy.pth":
        torch.save({"a": torch.arange(100)}, file, _use_new_zipfile_serialization=False)
    elif kind == "pth":
        torch.save({"a": torch.arange(100)}, file)
    elif kind == "safetensors":
        file.write(save({"a": torch.arange(100)}))
    elif kind == "gz":
        file.write(gzip.compress(bytes(100)))
    elif kind == "json":
        file.write(json.dumps({"a": list(range(100))}).encode())
    return file.getvalue()


@pytest.mark.parametrize("kind", ["npy", "npz", "pth", "legacy.pth", "safetensors", "gz", "json"])
def test_whole_files_pass_and_cut_ones_do_not(kind: str, tmp_path: Path) -> None:
    path, content = tmp_path / "file", of_type(kind)
    path.write_bytes(content)
    assert content_problem(path, f"some.{kind}") is None
    cuts = range(1) if kind == "legacy.pth" else [1, len(content) // 2, len(content) - 1]
    for length in cuts:
        path.write_bytes(content[:length])
        assert content_problem(path, f"some.{kind}"), length
    path.write_bytes(LOGIN)
    assert "HTML page" in str(content_problem(path, f"some.{kind}"))


def test_plain_files_are_not_taken_for_messages(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for name, content in {
        "vocab.txt": b"<unk>\n<s>\n",
        "config.json": b'{"model_type": "t5"}',
        "list.json": b"[]",
    }.items():
        path.write_bytes(content)
        assert content_problem(path, name) is None


def test_a_local_pointer_of_git_lfs_is_not_converted(tmp_path: Path) -> None:
    """What a clone without Git LFS holds."""
    (tmp_path / "model.pth").write_bytes(IMPOSTORS["pointer"])
    with pytest.raises(DownloadError, match=r"model\.pth: is a Git LFS pointer"):
        local(tmp_path, NAME, "owner/repo")


def test_a_wrong_hash_in_the_lock_file_says_where_to_delete_it(place: Place) -> None:
    wrong = {"size": None, "sha256": "0" * 64}
    place.lock.write_text(json.dumps({"owner/repo": {"commits": {}, "files": {NAME: wrong}}}))
    assert "delete the file's entry there" in refusal(place)


# What an earlier run left


def url_partial(place: Place, content: bytes) -> Path:
    """Download from a URL, then as a kill before the last step leaves it, with ``content``."""
    path = obtain_file(remote(place), "k", place.lock).path
    path.unlink()
    partial = path.with_name(f"{path.name}.ddops-partial")
    partial.write_bytes(content)
    return partial


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("size_unknown", [True, False])
@pytest.mark.parametrize("left", ["all", "part", "another file", "part of another file"])
def test_a_download_that_was_killed_is_finished_or_started_over(
    anywhere: Place, known: bool, size_unknown: bool, left: str
) -> None:
    """Also killed between the last byte and the renaming, when a server answers 416 to whoever asks for the rest."""
    other = CONTENT.replace(b"model", b"MODEL")
    found = {"all": CONTENT, "part": CONTENT[:CHUNK], "another file": other, "part of another file": other[:CHUNK]}
    partial = url_partial(anywhere, found[left])
    if not known:
        anywhere.lock.unlink()
    anywhere.hub.size_unknown = size_unknown
    gets = anywhere.hub.count("GET")
    assert obtain_file(remote(anywhere), "k", anywhere.lock).path.read_bytes() == CONTENT
    assert not partial.exists()
    if known and left == "all":
        assert anywhere.hub.count("GET") == gets, "it is there: nothing is asked"


@pytest.mark.parametrize("left", ["all", "part", "rubbish", "more"])
def test_so_it_is_in_the_hubs_cache(place: Place, left: str) -> None:
    place.hub.size_unknown = True
    blob = place.fetch().resolve()
    shutil.rmtree(place.cache)
    place.lock.unlink()
    blob.parent.mkdir(parents=True)
    found = {"all": CONTENT, "part": CONTENT[:CHUNK], "rubbish": bytes(len(CONTENT)), "more": CONTENT + b"x"}
    blob.with_name(f"{blob.name}.ddops-partial").write_bytes(found[left])
    assert place.fetch().read_bytes() == CONTENT
    assert place.partials() == []


# Caches that several share


@pytest.fixture
def shared(place: Place) -> Place:
    """A cache that somebody else filled, and a workspace that knows nothing of it yet."""
    place.fetch()
    place.lock.unlink()
    place.hub.requests.clear()
    return place


def test_a_shared_cache_is_used_offline(shared: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert shared.fetch().read_bytes() == CONTENT
    assert json.loads(shared.lock.read_text())["owner/repo"]["commits"] == {"main": FIRST_COMMIT}
    assert shared.hub.requests == []


def test_a_cache_that_does_not_say_its_branches_is_used_where_there_is_no_choice(
    shared: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    repository = shared.cache / "models--owner--repo"
    shutil.rmtree(repository / "refs")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert shared.fetch().read_bytes() == CONTENT
    assert FIRST_COMMIT in caplog.text
    shared.lock.unlink()
    shutil.copytree(repository / "snapshots" / FIRST_COMMIT, repository / "snapshots" / OTHER_COMMIT)
    message = refusal(shared)
    assert FIRST_COMMIT in message
    assert OTHER_COMMIT in message


def test_a_shared_cache_needs_no_room(shared: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 0}))
    assert shared.fetch().read_bytes() == CONTENT
    assert shared.hub.count("GET") == 0


def test_nothing_is_written_into_a_shared_cache(shared: Place) -> None:
    """It may be read-only, which the mode of files does not make it for root, as whom tests may run."""
    before = {path: path.lstat().st_mtime_ns for path in shared.cache.rglob("*")}
    assert shared.fetch().read_bytes() == CONTENT
    assert {path: path.lstat().st_mtime_ns for path in shared.cache.rglob("*")} == before


def test_a_cache_that_cannot_be_written_is_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refused)
    message = refusal(place)
    assert str(place.cache) in message
    assert "HF_HOME" in message


def test_a_small_file_needs_little_room(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte is fetched with a hundred of them free."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100_000_000}))
    assert place.fetch().read_bytes() == CONTENT


def test_two_directories_of_urls_do_not_share_a_file(anywhere: Place) -> None:
    other = CONTENT.replace(b"model", b"MODEL")
    anywhere.hub.files["owner/repo/weights-a/x.pth"] = CONTENT
    anywhere.hub.files["owner/repo/weights/a/x.pth"] = other
    root = f"{anywhere.hub.url}/owner/repo/resolve/main"
    assert obtain_file(RemoteFile(url=f"{root}/weights-a/x.pth"), "k", anywhere.lock).path.read_bytes() == CONTENT
    assert obtain_file(RemoteFile(url=f"{root}/weights/a/x.pth"), "k", anywhere.lock).path.read_bytes() == other
