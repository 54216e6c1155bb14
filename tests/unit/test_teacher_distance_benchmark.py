"""What the benchmark of distances to the teacher reads off a generator: oracles for its figures."""

import json

import numpy as np
import pytest
import torch

from benchmarks.teacher_distance import Ruler
from ddops.evaluation.judge import new_classifier, save_classifier
from ddops.models.weights import STUDENT, TOKENIZER, TRANSFORMER, save_weights
from ddops.models.weights_dd2 import save_generator
from ddops.stages import paths
from helpers.here import run_script_here
from helpers.tiny import tiny, untrained, write_tiny_params

COUNT = 700
"""Not a multiple of the batch."""


@pytest.fixture
def workspace(tmp_path):
    write_tiny_params(tmp_path)
    config, (teacher, student) = tiny(), untrained()
    parts = {paths.TOKENIZER: (teacher.tokenizer, TOKENIZER), paths.TRANSFORMER: (teacher.transformer, TRANSFORMER)}
    for path, (module, kind) in (parts | {paths.DD1_STUDENT: (student, STUDENT)}).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        save_weights(tmp_path / path, module.state_dict(), teacher.config, kind)
    (tmp_path / paths.DD2_GENERATOR).parent.mkdir(parents=True)
    save_generator(tmp_path / paths.DD2_GENERATOR, student.state_dict(), teacher.config, None)
    (tmp_path / paths.CLASSIFIER).parent.mkdir(parents=True)
    torch.manual_seed(0)
    classifier = new_classifier(config.features)
    for parameter in classifier.parameters():
        parameter.data *= 3  # so that its features tell images apart
    save_classifier(tmp_path / paths.CLASSIFIER, classifier, config.features)
    return tmp_path


def test_the_teachers_own_tokens_are_at_its_reference_and_cost_what_its_sessions_say(workspace):
    ruler = Ruler(workspace, COUNT)
    draw = ruler.teacher_ids(seed=5)
    ruler.teachers, nats = ruler.see(draw)
    other = ruler.row(ruler.teacher_ids(seed=6))["distance_to_teacher"]
    assert abs(ruler.row(draw)["distance_to_teacher"]) < 1e-3 * other, "the same samples; of another seed they differ"
    ids_BL = draw(np.arange(COUNT), ruler.labels_N)
    session, total = ruler.teacher.open(ruler.labels_N, ruler.config.sampling), 0.0
    for level in range(ruler.teacher.layout.num_levels):
        ids_Bl = ids_BL[:, ruler.teacher.layout.positions(level)]
        total -= session.next_log_probs().gather(-1, ids_Bl[..., None]).double().sum().item()
        session.append(ids_Bl)
    assert nats == pytest.approx(total / ids_BL.numel(), rel=1e-4)


@pytest.mark.slow
def test_each_generator_that_is_there_has_a_row(workspace, tmp_path):
    output = tmp_path / "distance.json"
    arguments = [str(workspace), str(workspace), "--another", f"again={workspace}", "--output", str(output)]
    ended = run_script_here("benchmarks/teacher_distance.py", *arguments, "--count", "200")
    assert ended.returncode == 0, ended.stderr
    result = json.loads(output.read_text())
    rows = result["rows"]
    assert list(rows) == ["teacher", "whole DD1", "short DD1", "short DD1, then DD2", "short DD1, then DD2, again"]
    assert all(row == rows["whole DD1"] for name, row in rows.items() if name != "teacher"), "the same weights"
    assert 0 < rows["teacher"]["distance_to_teacher"] < rows["whole DD1"]["distance_to_teacher"]
    assert result["command"].split()[1:5] == ["SHORT", "SHORT", "--another", "again=DIRECTORY"], (
        "of no machine's directories"
    )
