"""`ddops serve` as a process, asked by real clients: right images, nothing lost, and limits that hold."""

import asyncio
import base64
import io
import json
import logging
import os
import signal
import socket
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import httpx2
import hypothesis
import numpy as np
import pytest
import schemathesis
from PIL import Image
from schemathesis.specs.openapi import checks
from starlette.exceptions import HTTPException

from ddops import OneStepPipeline
from ddops.cli import main
from ddops.export.manifest import read_manifest
from ddops.production import Registry
from ddops.serving.app import WEBP_SIDE, Service, encode
from ddops.serving.logs import JsonFormatter
from ddops.serving.schemas import ImageRequest
from ddops.serving.settings import ServeSettings
from helpers.tiny_bundle import make_bundle, serving

pytestmark = pytest.mark.xdist_group("serving")  # which shares a server

TOKEN = "s3cret-for-this-test-alone"
DESCRIBED = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def server(bundle, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(bundle, log, "--set", "max_count=8", "--set", "max_body_bytes=2000") as running:
        yield running


@pytest.fixture(scope="module")
def other_bundle(tmp_path_factory):
    """Of another model."""
    return make_bundle(tmp_path_factory.mktemp("other") / "bundle", scale=1.5)


@pytest.fixture(scope="module")
def client(server):
    with server.client() as one:
        yield one


def ask(client, **request):
    return client.post("/v1/images", json=request)


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content))).astype(int)


def reference(bundle, label, seed, count=1):
    """The images of a seed, drawn in this process."""
    images = OneStepPipeline(bundle)([label] * count, seed=seed).images
    return np.concatenate([np.asarray(image) for image in images], axis=1).astype(int)


# answers


@pytest.mark.parametrize("format", ["png", "webp"])
def test_a_picture_holds_the_images_of_the_seed_side_by_side(bundle, client, format):
    answer = ask(client, **{"class": 3, "seed": 5, "count": 3, "format": format})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == f"image/{format}"
    assert answer.headers["x-seed"] == "5"
    drawn = pixels(answer.content)
    drawn = drawn if drawn.ndim == 2 else drawn[..., 0]  # WebP has no grey
    assert drawn.shape == (8, 24)
    assert np.abs(drawn - reference(bundle, 3, 5, 3)).max() <= 1


def test_base64_holds_each_image(bundle, client):
    answer = ask(client, **{"class": "3", "seed": 5, "count": 2, "format": "base64"}).json()
    assert (answer["class_number"], answer["seed"]) == (3, 5)
    drawn = [pixels(base64.b64decode(image["data"])) for image in answer["images"]]
    assert [image["index"] for image in answer["images"]] == [0, 1]
    assert np.abs(np.concatenate(drawn, axis=1) - reference(bundle, 3, 5, 2)).max() <= 1


def test_without_a_seed_one_is_drawn_and_named(client):
    one, other = (ask(client, **{"class": 1}) for _ in range(2))
    assert one.headers["x-seed"] != other.headers["x-seed"]
    again = ask(client, **{"class": 1, "seed": int(one.headers["x-seed"])})
    assert np.abs(pixels(again.content) - pixels(one.content)).max() <= 1


def test_many_clients_at_once_each_get_their_own_images(bundle, server):
    """Batches mix requests; every image is compared with the one of its seed."""
    pipe = OneStepPipeline(bundle)

    def one(seed):
        with server.client() as client:
            answer = ask(client, **{"class": seed % 10, "seed": seed})
        assert answer.status_code == 200, answer.text
        return np.abs(pixels(answer.content) - np.asarray(pipe([seed % 10], seed=seed).images[0]).astype(int)).max()

    with ThreadPoolExecutor(16) as pool:
        assert max(pool.map(one, range(64))) <= 1


# refusals


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"class": 10}, "no class 10; there are 10, 0 to 9"),
        ({"class": "otter"}, "these classes have no names"),
        ({"class": 1, "count": 9}, "at most 8 images a request"),
        ({"class": 1, "count": 0}, "count: Input should be greater than or equal to 1"),
        ({"class": 1, "seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"class": 1, "seed": 2**64}, "seed: Input should be less than or equal to"),
        ({"class": 1, "format": "gif"}, "format: Input should be 'png', 'webp' or 'base64'"),
        ({"class": 1, "colour": "red"}, "colour: Extra inputs are not permitted"),
        ({"class": True}, "class"),
        ({}, "class: this model draws for a class"),
    ],
)
def test_an_impossible_request_is_refused_with_its_reason(client, request_, message):
    answer = ask(client, **request_)
    assert answer.status_code == 422
    assert message in answer.json()["error"]
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"class": NaN}', b'{"class": "\\ud800"}', b"\xff\xfe", b"[]", b'{"class":1e999}']
)
def test_a_body_that_is_no_request_is_refused(client, body):
    answer = client.post("/v1/images", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422


def test_a_picture_wider_than_its_format_allows_is_refused(bundle):
    """Which needs larger images than a test's server draws: 256 of 64 pixels."""
    manifest = read_manifest(bundle)
    large = replace(manifest, model=replace(manifest.model, image_size=64))
    service = Service(bundle, ServeSettings(max_count=512, queue_limit=512), None)
    service.slot.current = SimpleNamespace(manifest=large, batcher=None)
    request = ImageRequest.model_validate({"class": 1, "count": 256, "format": "webp"})
    with pytest.raises(HTTPException, match=f"256 .* webp.* {WEBP_SIDE}") as refused:
        asyncio.run(service.draw(request))
    assert refused.value.status_code == 422
    with pytest.raises(ValueError, match="encoding error"):
        encode([np.zeros((1, WEBP_SIDE + 1, 1), np.uint8)], "webp")
    assert pixels(encode([np.zeros((1, WEBP_SIDE, 1), np.uint8)], "webp")).shape[1] == WEBP_SIDE


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_beyond_the_limit_is_refused_before_it_is_read(client, chunked):
    content = b'{"class": 1, "format": "' + b"x" * 5000
    answer = client.post("/v1/images", content=iter([content]) if chunked else content)
    assert answer.status_code == 413
    assert "2000 bytes" in answer.json()["error"]


def test_the_request_id_is_the_clients_where_it_is_harmless(server, client):
    answer = client.get("/healthz", headers={"x-request-id": "abc-123"})
    assert answer.headers["x-request-id"] == "abc-123"
    answer = client.get("/healthz", headers={"x-request-id": 'a"b{} c'})
    assert len(answer.headers["x-request-id"]) == 32
    records = [record for record in server.records() if record.get("request_id") == "abc-123"]
    assert [(record["path"], record["status"], record["level"]) for record in records] == [("/healthz", 200, "info")]


def test_health_metrics_page_and_openapi(client, bundle):
    assert client.get("/healthz").json() == {"status": "alive", "model": None}
    ready = client.get("/readyz").json()
    assert ready["status"] == "ready"
    ask(client, **{"class": 1, "seed": 1})
    metrics = client.get("/metrics").text
    assert 'ddops_requests_total{path="/v1/images",status="200"}' in metrics
    assert f'ddops_model_info{{id="{ready["model"]}",preset="tiny"}} 1.0' in metrics
    for _ in range(3):
        client.get("/no/such/path")
    assert 'path="other",status="404"' in client.get("/metrics").text
    page = client.get("/")
    assert "<form>" in page.text
    assert "http" not in page.text.replace("<!doctype html>", "").replace("<html", "")  # nothing is fetched elsewhere
    operation = client.get("/openapi.json").json()["paths"]["/v1/images"]["post"]
    assert {"200", "401", "413", "422", "429", "503", "504"} <= set(operation["responses"])
    assert set(operation["responses"]["200"]["content"]) == {"application/json", "image/png", "image/webp"}


def test_it_listens_on_this_machine_only(server):
    port = int(server.url.rpartition(":")[2])
    with open("/proc/net/tcp") as table:
        listening = [line.split()[1] for line in table if line.split()[3] == "0A"]
    assert f"0100007F:{port:04X}" in listening
    assert f"00000000:{port:04X}" not in listening


# fuzz


@pytest.mark.slow
@pytest.mark.parametrize("examples", [8, pytest.param(40, marks=pytest.mark.rare)])
def test_no_request_that_its_own_description_suggests_fails_it(server, examples):
    """Schemathesis on the server's OpenAPI, with requests that fit it and requests that do not: no 5xx, no hang, and no
    answer that is not described."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    tried = []
    positive, negative = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
    asked = [("/v1/images", "POST", positive), ("/v1/images", "POST", negative)]
    asked += [(path, "GET", positive) for path in ("/healthz", "/readyz", "/metrics")]
    assert {path for path, _, _ in asked} == set(schema)
    for path, method, mode in asked:

        @hypothesis.given(case=schema[path][method].as_strategy(generation_mode=mode))
        @hypothesis.settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        def fuzz(case):
            answer = case.call(timeout=30)
            tried.append(answer.status_code)
            # A deadline that the request sets itself may pass.
            assert answer.status_code < 500 or (answer.status_code == 504 and "timeout_s" in case.body), answer.text
            case.validate_response(answer, checks=DESCRIBED)

        fuzz()
    assert {200, 422} <= set(tried)


# the process


@pytest.mark.slow
def test_a_token_is_asked_for_and_never_logged(bundle, tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(stat.S_IRUSR)
    options = ["--token-file", str(tmp_path / "token")]
    with serving(bundle, tmp_path / "log", *options) as server, server.client() as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"}):
            answer = client.post("/v1/images", json={"class": 1}, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        answer = client.post("/v1/images", json={"class": 1}, headers={"authorization": f"Bearer {TOKEN}"})
        assert answer.status_code == 200
        assert client.get("/readyz").status_code == 200
    assert TOKEN not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_full_queue_turns_away_and_says_when_to_come_again(bundle, tmp_path):
    """Every request is answered: with its image, or with 429."""
    options = ["--set", "max_batch=1", "--set", "max_count=4", "--set", "queue_limit=4"]
    with serving(bundle, tmp_path / "log", *options) as server:

        def one(seed):
            with server.client() as client:
                return ask(client, **{"class": 1, "seed": seed, "count": 4})

        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(one, range(48)))
    statuses = {answer.status_code for answer in answers}
    assert statuses == {200, 429}
    full = next(answer for answer in answers if answer.status_code == 429)
    assert int(full.headers["retry-after"]) >= 1
    assert "too many images are waiting" in full.json()["error"]


def test_a_deadline_that_passes_is_an_answer(server):
    with server.client() as client:
        answer = ask(client, **{"class": 1, "count": 8, "timeout_s": 1e-9})
    assert answer.status_code == 504
    assert "not drawn within" in answer.json()["error"]


@pytest.mark.slow
def test_sigterm_finishes_what_was_accepted(bundle, tmp_path):
    """/readyz says no at once, then the door closes. Every request that the server took in was answered to its client:
    what clients received is what the server's log says it took in."""
    options = ["--set", "max_batch=1", "--set", "queue_limit=1000", "--set", "drain_delay_s=0.5"]
    with serving(bundle, tmp_path / "log", *options) as server, server.client() as watcher:
        answers = []

        def until_the_door_closes():
            while True:
                try:
                    # A connection of its own: a request is answered, or its connection was never taken.
                    answers.append(httpx2.post(f"{server.url}/v1/images", json={"class": 1, "count": 16}, timeout=60))
                except httpx2.TransportError:
                    return

        threads = [threading.Thread(target=until_the_door_closes) for _ in range(8)]
        for thread in threads:
            thread.start()
        server.wait_until(lambda: len(answers) > 8, "traffic")
        server.process.send_signal(signal.SIGTERM)
        server.wait_until(lambda: watcher.get("/readyz").json()["status"] == "draining", "no readiness")
        for thread in threads:
            thread.join()
        server.process.wait(60)
        taken = [record for record in server.records() if record.get("path") == "/v1/images"]
        assert {record["status"] for record in taken} == {200}
        assert [answer.status_code for answer in answers] == [200] * len(taken)
        assert server.records()[-1]["message"].startswith("Finished server process")


@pytest.mark.slow
def test_a_second_sigterm_does_not_wait(bundle, tmp_path):
    """Not for the rest of a request, which the server gives ten seconds to come, either."""
    head = b"POST /v1/images HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    with serving(bundle, tmp_path / "log", "--set", "drain_timeout_s=3600") as server:
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.sendall(head)
            server.process.send_signal(signal.SIGTERM)
            server.wait_until(lambda: "Waiting for connections to close" in server.log.read_text(), "the wait")
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(60)
        assert not [record for record in server.records() if record.get("status") == 408]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["registry", *(pytest.param(kind, marks=pytest.mark.rare) for kind in ("link", "file"))]
)
def test_a_newly_promoted_model_takes_over_without_losing_a_request(bundle, other_bundle, tmp_path, kind):
    """Clients ask all the while; each answer is the old model's image or the new one's, as it says itself."""
    other = other_bundle
    place = tmp_path / "production"
    promote(place, bundle, kind)
    with serving(place, tmp_path / "log", "--set", "reload_every_s=0.1") as server, server.client() as watcher:
        old = watcher.get("/readyz").json()["model"]
        wanted = {
            model: [reference(path, 1, seed) for seed in range(8)] for model, path in ((old, bundle), ("new", other))
        }
        stop, wrong, seen = threading.Event(), [], set()

        def client_loop():
            with server.client() as client:
                while not stop.is_set():
                    for seed in range(8):
                        answer = ask(client, **{"class": 1, "seed": seed})
                        model = old if answer.headers.get("x-model") == old else "new"
                        seen.add(answer.headers.get("x-model"))
                        if answer.status_code != 200 or np.abs(pixels(answer.content) - wanted[model][seed]).max() > 1:
                            wrong.append(answer)

        threads = [threading.Thread(target=client_loop) for _ in range(4)]
        for thread in threads:
            thread.start()
        promote(place, other, kind)
        server.wait_until(lambda: watcher.get("/readyz").json()["model"] != old, "the new model")
        time.sleep(0.5)
        stop.set()
        for thread in threads:
            thread.join()
        assert not wrong
        assert len(seen) == 2

        # A bundle that cannot be served does not take over.
        broken = tmp_path / "broken"
        broken.mkdir()
        (broken / "manifest.json").write_text("{}")
        promote(place, broken, kind)
        server.wait_until(lambda: "ddops_reload_failures_total 1.0" in watcher.get("/metrics").text, "the refusal")
        assert ask(watcher, **{"class": 1}).status_code == 200
        assert any("not a bundle's manifest" in record.get("error", "") for record in server.records())


def test_before_the_first_promotion_there_is_nothing_to_serve(tmp_path, capsys):
    (tmp_path / "registry.json").write_text('{"current": null, "versions": {}, "history": []}')
    assert main(["serve", str(tmp_path)]) == 1
    assert "ddops promote --reason WHY" in capsys.readouterr().err
    (tmp_path / "registry.json").write_text("{")
    assert main(["serve", str(tmp_path)]) == 1
    assert "registry.json: damaged" in capsys.readouterr().err


def promote(place, bundle, kind):
    """As a promotion does it: the new one takes the old one's place at once."""
    draft = place.with_name("draft")
    if kind == "registry":
        place.mkdir(exist_ok=True)
        registry = Registry.load(place / "registry.json")
        version = registry.next_version()
        (place / version).symlink_to(bundle)
        registry.promote(version, {"files": [str(bundle)]}, by="Ada", reason="it is better")
        return
    if kind == "link":
        draft.symlink_to(bundle)
    else:
        draft.write_text(f"{bundle}\n")
    os.replace(draft, place)


# before the process


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "max_bach=3"], "--set max_bach=3: expected NAME=VALUE with one of backend"),
        (["--set", "max_batch=0"], "--set max_batch: Input should be greater than 0"),
        (["--set", "queue_limit=2"], "queue_limit 2 is less than max_count 16"),
        (["--set", "backend=tf"], "Input should be 'torch', 'onnx' or 'tensorrt'"),
        ([], "no bundle there"),
    ],
)
def test_a_mistake_shows_before_a_socket_is_opened(tmp_path, capsys, arguments, message):
    assert main(["serve", str(tmp_path), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_an_empty_token_is_refused(tmp_path, capsys, monkeypatch):
    """It would look like protection."""
    monkeypatch.setenv("DDOPS_SERVE_TOKEN", "")
    assert main(["serve", str(tmp_path)]) == 1
    assert "the token is empty" in capsys.readouterr().err


@pytest.mark.slow
def test_a_bundle_that_cannot_be_served_ends_the_process(bundle, tmp_path):
    with serving(bundle, tmp_path / "log", "--set", "backend=tensorrt", wait=False) as server:
        assert server.process.wait(240) == 1
    assert "no GPU is visible here" in (tmp_path / "log").read_text()


def test_a_log_line_is_json_whatever_is_in_it():
    record = logging.makeLogRecord({"msg": "a %s", "args": ("\ud800\n",), "levelname": "INFO", "name": "x", "key": {1}})
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert json.loads(line)["key"] == "{1}"
    assert ServeSettings().max_count <= ServeSettings().queue_limit
