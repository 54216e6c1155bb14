"""The guard of the recipes: a stage that computes something else has another number, and a comment changes nothing.

Each stage runs tiny on fixed inputs; a digest of what it computes is compared with tests/golden/recipes.json.
"""

import importlib
import json

import pytest
import torch

from ddops.flow import solvers
from ddops.workspace.recipes import known_recipes, recipe
from helpers.recipes import guard
from helpers.recipes.digest import moved, tokens


@pytest.fixture(scope="module")
def known():
    return guard.golden()


@pytest.mark.parametrize(("stage", "name"), guard.CASES)
def test_a_stage_computes_what_its_recipe_stands_for(stage, name, known, tmp_path):
    found = guard.computed(stage, name, tmp_path)
    assert guard.complaint(stage, name, found, known) is None


def test_every_stage_is_guarded_and_no_digest_is_left_over(known):
    assert set(guard.VARIANTS) == set(known_recipes())
    assert {stage: set(entry["digests"]) for stage, entry in known.items()} == {
        stage: set(cases) for stage, cases in guard.VARIANTS.items()
    }


# The guard itself


def say(stage, name, found, known):
    said = guard.complaint(stage, name, found, known)
    assert said is not None
    return said


def test_what_is_asked_where_a_digest_moved(known):
    """To raise the number in both files and renew, or to undo: nobody has to know the scheme by heart."""
    found = json.loads(json.dumps(known["gate"]["digests"]["refused"]))
    assert guard.complaint("gate", "refused", found, known) is None
    found["refused"] = False
    said = say("gate", "refused", found, known)
    now = recipe("gate")
    assert f"`gate: {now + 1}`" in said
    for words in ("recipes.yaml", "src/ddops/workspace/template/recipes.yaml", "--renew gate", "undo the change"):
        assert words in said


def test_what_is_asked_where_the_number_was_raised_alone(known, raised):
    raised("gate")
    said = say("gate", "refused", known["gate"]["digests"]["refused"], known)
    assert "--renew gate" in said
    assert "undo" not in said


def test_a_variant_without_a_digest_is_asked_for(known):
    without = {**known, "gate": {**known["gate"], "digests": {}}}
    assert "--renew gate" in say("gate", "refused", known["gate"]["digests"]["refused"], without)


@pytest.mark.parametrize(
    ("was", "now", "same"),
    [
        ({"losses": {"loss": [2.0]}}, {"losses": {"loss": [2.0001]}}, True),
        ({"losses": {"loss": [2.0]}}, {"losses": {"loss": [2.001]}}, False),
        ({"weights": {"norms": [2.0]}}, {"weights": {"norms": [2.0001]}}, True),
        ({"weights": {"norms": [2.0]}}, {"weights": {"norms": [2.001]}}, False),
        ({"weights": {"norms": [2.0]}}, {"weights": {"norms": [2.0, 1.0]}}, False),
        ({"a": 1}, {"a": 2}, False),
        ({"a": 1}, {"a": 1, "b": 1}, False),
        ({"a": "one"}, {"a": "two"}, False),
        ({"a": True}, {"a": False}, False),
    ],
)
def test_digests_agree_to_rounding_and_no_further(was, now, same):
    assert (not list(moved(was, now))) == same


@pytest.mark.parametrize(("flipped", "same"), [(0, True), (2, True), (6, False)])
def test_a_token_in_a_hundred_may_differ(flipped, same):
    ids = torch.arange(400).remainder(64).numpy()
    other = ids.copy()
    other[:flipped] += 1
    assert (not list(moved({"ids": tokens(ids)}, {"ids": tokens(other)}))) == same


CHANGES = {
    "a loss's weight": ("distill_dd1", "plain", "ddops.distill.dd1.cross_entropy", lambda was: scaled(was, 1.01)),
    "the learning rate's schedule": (
        "teacher",
        "var",
        "ddops.training.loop.learning_rate",
        lambda was: scaled(was, 1.1),
    ),
    "the average of the weights": (
        "ar_diffusion",
        "var",
        "ddops.training.loop.ema_decay",
        lambda was: scaled(was, 0.5),
    ),
    "the solver's steps": ("trajectories", "euler", "ddops.flow.solvers.LOG_SNR_RANGE", lambda was: (-1.5, 2.0)),
    "a figure": ("evaluate", "digits", "ddops.evaluation.metrics.INCEPTION_SPLITS", lambda was: 5),
    "Triton's patience": ("build_engine", "none", "ddops.export.triton.MAX_QUEUE_DELAY_US", lambda was: was + 1),
}
"""What is changed, the stage and variant that compute by it, where it is, and what becomes of it."""


def scaled(function, factor):
    return lambda *arguments: factor * function(*arguments)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_computation_is_noticed(change, known, tmp_path, monkeypatch):
    stage, name, where, becomes = CHANGES[change]
    module, _, attribute = where.rpartition(".")
    monkeypatch.setattr(where, becomes(getattr(importlib.import_module(module), attribute)))
    said = say(stage, name, guard.computed(stage, name, tmp_path), known)
    assert said.startswith(f"{stage}, {name}: computes something else")


def test_a_changed_docstring_is_none(known, tmp_path, monkeypatch):
    for function in (solvers.flow_map, solvers.solve_flow, solvers.grid_ratios):
        monkeypatch.setattr(function, "__doc__", "Other words.")
    assert guard.complaint("trajectories", "euler", guard.computed("trajectories", "euler", tmp_path), known) is None


def test_renewing_needs_a_raised_number(known, tmp_path, monkeypatch, raised):
    """Else a changed computation would pass under the old number: the digests would be those of the new one."""
    file = tmp_path / "recipes.json"
    monkeypatch.setattr(guard, "FILE", file)
    monkeypatch.setattr(guard, "VARIANTS", {"gate": {"only": lambda: {"value": 1}}})
    assert guard.renew(["gate"]) == []
    assert json.loads(file.read_text()) == {"gate": {"recipe": recipe("gate"), "digests": {"only": {"value": 1}}}}
    monkeypatch.setattr(guard, "VARIANTS", {"gate": {"only": lambda: {"value": 2}}})
    before = file.read_bytes()
    assert guard.renew(["gate"]) == ["gate"]
    assert file.read_bytes() == before
    raised("gate")
    assert guard.renew(["gate"]) == []
    assert json.loads(file.read_text()) == {"gate": {"recipe": recipe("gate"), "digests": {"only": {"value": 2}}}}
