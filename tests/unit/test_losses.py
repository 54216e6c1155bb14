"""DD1's losses against float64 by hand, what carries a gradient, and what the student is shown in training."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddops.distill.dd1 import dd1_objective, perceptual_term
from ddops.losses.dd1 import cross_entropy, embedding_error
from ddops.losses.perceptual import classifier_distance
from ddops.models.classifier import DigitsClassifier
from ddops.models.interface import StudentOutput
from ddops.training.replicas import replicas
from ddops.trajectories.dataset import TrajectoryBatch
from helpers.tiny import tiny, untrained

B, L, V, C = 4, 6, 5, 3


@pytest.fixture
def problem():
    """Random heads and targets; the last sample has nothing to predict, the first everything."""
    generator = torch.Generator().manual_seed(0)
    return SimpleNamespace(
        logits_BLV=(3 * torch.randn(B, L, V, generator=generator)).requires_grad_(),
        embeddings_BLC=torch.randn(B, L, C, generator=generator).requires_grad_(),
        ids_BL=torch.randint(V, (B, L), generator=generator),
        target_BLC=torch.randn(B, L, C, generator=generator),
        predicted_BL=torch.arange(L) >= torch.tensor([0, 2, 5, 6])[:, None],
    )


def mean_by_hand(value, predicted_BL):
    """Mean of ``value(b, l)`` over each sample's predicted positions, in Python floats; 0 where there is none."""
    result = []
    for b in range(B):
        values = [value(b, position) for position in range(L) if predicted_BL[b, position]]
        result.append(sum(values) / len(values) if values else 0.0)
    return torch.tensor(result, dtype=torch.float64)


def test_cross_entropy_is_its_definition(problem):
    logits = problem.logits_BLV.detach().double().numpy()

    def surprise(b, position):
        return math.log(np.exp(logits[b, position]).sum()) - logits[b, position, problem.ids_BL[b, position]]

    losses_B = cross_entropy(problem.logits_BLV, problem.ids_BL, problem.predicted_BL)
    torch.testing.assert_close(losses_B.double(), mean_by_hand(surprise, problem.predicted_BL), atol=1e-6, rtol=1e-6)


def test_embedding_error_is_its_definition(problem):
    a, b = problem.embeddings_BLC.detach().double().numpy(), problem.target_BLC.double().numpy()

    def squared_distance(sample, position):
        return sum((x - y) ** 2 for x, y in zip(a[sample, position], b[sample, position], strict=True))

    losses_B = embedding_error(problem.embeddings_BLC, problem.target_BLC, problem.predicted_BL)
    expected_B = mean_by_hand(squared_distance, problem.predicted_BL)
    torch.testing.assert_close(losses_B.double(), expected_B, atol=1e-6, rtol=1e-6)


def test_given_positions_carry_no_gradient_and_predicted_ones_do(problem):
    ce_B = cross_entropy(problem.logits_BLV, problem.ids_BL, problem.predicted_BL)
    error_B = embedding_error(problem.embeddings_BLC, problem.target_BLC, problem.predicted_BL)
    (ce_B.sum() + error_B.sum()).backward()
    for gradient in (problem.logits_BLV.grad, problem.embeddings_BLC.grad):
        assert torch.equal(gradient.abs().sum(-1) > 0, problem.predicted_BL)


def test_a_wrong_value_at_a_given_position_changes_nothing(problem):
    """However large: what the heads say there means nothing."""
    with torch.no_grad():
        expected = cross_entropy(problem.logits_BLV, problem.ids_BL, problem.predicted_BL)
        problem.logits_BLV[~problem.predicted_BL] = 1e4
        assert torch.equal(cross_entropy(problem.logits_BLV, problem.ids_BL, problem.predicted_BL), expected)


# the perceptual distance


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    network = DigitsClassifier(channels=4, feature_dim=8, dropout=0.5)
    return network.eval().requires_grad_(False)


def random_images(count, seed):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_perceptual_distance_is_lpips_formula(classifier):
    """Channel vectors of unit length at every pixel of every layer; squared differences, summed over the channels,
    averaged over the pixels, summed over the layers (arXiv 1801.03924, equation 1, with w = 1). By loops."""
    a, b = random_images(3, 1), random_images(3, 2)
    expected = np.zeros(3)
    layers = [[layer.double().numpy() for layer in classifier.feature_maps(images)] for images in (a, b)]
    assert [layer.shape[2:] for layer in layers[0]] == [(8, 8), (4, 4), (2, 2)]
    for layer_a, layer_b in zip(*layers, strict=True):
        for sample in range(3):
            pixels = list(np.ndindex(layer_a.shape[2:]))
            for pixel in pixels:
                vector_a, vector_b = (layer[(sample, slice(None), *pixel)] for layer in (layer_a, layer_b))
                unit_a, unit_b = vector_a / np.linalg.norm(vector_a), vector_b / np.linalg.norm(vector_b)
                expected[sample] += ((unit_a - unit_b) ** 2).sum() / len(pixels)
    distance_B = classifier_distance(classifier)(a, b)
    np.testing.assert_allclose(distance_B.numpy(), expected, rtol=1e-4)


def test_perceptual_distance_is_zero_for_equal_images_and_symmetric(classifier):
    distance = classifier_distance(classifier)
    a, b = random_images(3, 1), random_images(3, 2)
    assert torch.equal(distance(a, a.clone()), torch.zeros(3))
    assert torch.equal(distance(a, b), distance(b, a))
    assert (distance(a, b) > 0.01).all()


def test_perceptual_distance_grows_with_the_disturbance(classifier):
    distance, a, noise = classifier_distance(classifier), random_images(3, 1), random_images(3, 2)
    distances = torch.stack([distance(a, a + strength * noise) for strength in (0.01, 0.1, 0.5)])
    assert (distances.diff(dim=0) > 0).all()


def test_an_image_without_activation_gives_a_finite_gradient(classifier):
    """A vector of zeros has no direction; the formula must not divide by its length."""
    blank = torch.zeros(1, 1, 8, 8, requires_grad=True)
    network = DigitsClassifier(channels=4, feature_dim=8, dropout=0.0)
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)
    classifier_distance(network)(blank, torch.zeros(1, 1, 8, 8)).sum().backward()
    assert blank.grad.isfinite().all()


@pytest.mark.parametrize("family", ["llamagen", "var"])
def test_the_gradient_reaches_the_prediction_and_not_the_target(family, classifier):
    teacher, _ = untrained(family)
    shape = (2, teacher.layout.length, teacher.codebook_VC.shape[1])
    predicted, target = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(2))
    predicted.requires_grad_()
    target.requires_grad_()
    perceptual_term(teacher, classifier_distance(classifier), predicted, target).sum().backward()
    # Every token of the prediction is seen: the decoder's receptive field is the image.
    assert (predicted.grad.abs().sum(-1) > 0).all()
    assert target.grad is None


# the objective


class RecordingStudent(torch.nn.Module):
    """Keeps what it was shown, and answers with fixed random heads."""

    def __init__(self, layout, codes):
        super().__init__()
        self.layout, self.codes, self.seen = layout, codes, None
        generator = torch.Generator().manual_seed(5)
        self.logits = torch.nn.Parameter(torch.randn(layout.length, codes, generator=generator))
        self.embeddings = torch.nn.Parameter(torch.randn(layout.length, 8, generator=generator))

    def forward(self, x_BLC, labels_B, start_B):
        self.seen = SimpleNamespace(x_BLC=x_BLC, labels_B=labels_B, start_B=start_B)
        shape = (len(x_BLC), -1, -1)
        return StudentOutput(self.logits.expand(*shape), self.embeddings.expand(*shape))


class FakeTrajectories:
    """Twelve trajectories of random labels, noise and ids."""

    def __init__(self, length):
        generator = torch.Generator().manual_seed(6)
        self.labels_N = torch.randint(10, (12,), generator=generator)
        self.noise_NLC = torch.randn(12, length, 8, generator=generator)
        self.ids_NL = torch.randint(64, (12, length), generator=generator)

    def batch(self, indices_B, step):
        return TrajectoryBatch(self.labels_N[indices_B], self.noise_NLC[indices_B], self.ids_NL[indices_B])


@pytest.fixture(params=["llamagen", "var"])
def objective_run(request, classifier):
    """One call of the objective on the whole fake data set."""
    weights = ["dd1.cross_entropy_weight=0.7", "dd1.embedding_weight=0.3", "dd1.perceptual.weight=2.0"]
    config = tiny(request.param, *weights, "dd1.perceptual.batch_size=6", "dd1.start_positions=[0,2]").dd1
    teacher, _ = untrained(request.param)
    student, data = RecordingStudent(teacher.layout, 64), FakeTrajectories(teacher.layout.length)
    distance = classifier_distance(classifier)
    torch.manual_seed(0)
    values = dd1_objective(teacher, data, config, distance)(student, torch.arange(12), 0)
    return SimpleNamespace(teacher=teacher, student=student, data=data, values=values, distance=distance)


def test_the_student_sees_given_levels_as_data_and_the_rest_as_the_trajectorys_noise(objective_run):
    seen, data, teacher = objective_run.student.seen, objective_run.data, objective_run.teacher
    assert set(seen.start_B.tolist()) == {0, 2}
    assert torch.equal(seen.labels_B, data.labels_N)
    for sample, start in enumerate(seen.start_B.tolist()):
        given = teacher.layout.offsets[start]
        assert torch.equal(seen.x_BLC[sample, :given], teacher.codebook_VC[data.ids_NL[sample, :given]])
        assert torch.equal(seen.x_BLC[sample, given:], data.noise_NLC[sample, given:])


def test_the_loss_is_the_weighted_sum_of_its_terms(objective_run):
    values, data, student = objective_run.values, objective_run.data, objective_run.student
    total = 0.7 * values["cross_entropy"] + 0.3 * values["embedding_error"] + 2.0 * values["perceptual"]
    torch.testing.assert_close(values["loss"], total)
    predicted_BL = ~objective_run.teacher.layout.given_mask(student.seen.start_B)
    logits_BLV, embeddings_BLC = student(student.seen.x_BLC, data.labels_N, student.seen.start_B)
    target_BLC = objective_run.teacher.codebook_VC[data.ids_NL]
    expected = {
        "cross_entropy": cross_entropy(logits_BLV, data.ids_NL, predicted_BL).mean(),
        "embedding_error": embedding_error(embeddings_BLC, target_BLC, predicted_BL).mean(),
        "accuracy": (logits_BLV.argmax(-1) == data.ids_NL)[predicted_BL].float().mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value)


def test_the_perceptual_term_decodes_the_prediction_with_its_given_tokens_in_place(objective_run):
    """On the first six samples alone: perceptual.batch_size."""
    data, student, teacher = objective_run.data, objective_run.student, objective_run.teacher
    target_BLC = teacher.codebook_VC[data.ids_NL[:6]]
    mixed_BLC = student.embeddings.detach().expand(6, -1, -1).clone()
    for sample, start in enumerate(student.seen.start_B[:6].tolist()):
        given = teacher.layout.offsets[start]
        mixed_BLC[sample, :given] = target_BLC[sample, :given]
    expected = objective_run.distance(teacher.decode(mixed_BLC), teacher.decode(target_BLC)).mean()
    torch.testing.assert_close(objective_run.values["perceptual"].detach(), expected)


def test_processes_decode_together_what_one_decodes(classifier):
    """The term is of perceptual.batch_size samples of a batch, however many processes share it."""
    settings = ["dd1.perceptual.batch_size=6", "dd1.start_positions=[0]", "evaluate.rows=[dd1_1step,dd2_1step]"]
    config = tiny("llamagen", *settings, "dd1.training.processes=2").dd1
    teacher, _ = untrained("llamagen")
    student, data, indices_B = RecordingStudent(teacher.layout, 64), FakeTrajectories(16), torch.arange(12)
    objective = dd1_objective(teacher, data, config, classifier_distance(classifier))
    alone = objective(student, indices_B, 0)
    with replicas(2) as group:
        shared = objective(student, indices_B[group.rank :: group.size], 0)
        means = [shared[name].detach() for name in ("perceptual", "loss")]
        group.average(means)
    torch.testing.assert_close(means, [alone["perceptual"].detach(), alone["loss"].detach()])


def test_both_heads_learn(objective_run):
    objective_run.values["loss"].backward()
    assert (objective_run.student.logits.grad.abs().sum(-1) > 0).all()
    assert (objective_run.student.embeddings.grad.abs().sum(-1) > 0).all()
