"""The cost model: its arithmetic is the cost study's and that of torch's own counter, its memory a real step's."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ddops.commands.arguments import load_preset
from ddops.costs import passes
from ddops.costs.devices import DEVICES, Device, UnknownDevice, find_device, probe
from ddops.costs.ledger import Ledger, Operator, kept_bytes, shapes_only, without_values
from ddops.costs.stages import predict
from ddops.distill.dd1 import dd1_objective
from ddops.losses.perceptual import classifier_distance
from ddops.models.classifier import DigitsClassifier
from ddops.models.lean import join_doublings
from ddops.models.registry import build_teacher
from ddops.training.loop import frozen_copy
from helpers.tiny import PARAMS, tiny, untrained

GFLOP = {
    "var_d16": {"decode": 393.7, "one step": 286.4, "two steps": 309.0, "teacher": 600.7, "reference": 336.3},
    "llamagen_l": {"decode": 252.7, "one step": 166.1, "two steps": 216.4, "teacher": 339.4, "reference": 173.6},
}
"""An image, of the project's cost study: measured and computed apart from this code."""


@pytest.mark.parametrize("preset", ["llamagen_l", pytest.param("var_d16", marks=pytest.mark.slow)])
def test_work_is_that_of_the_cost_study(preset):
    config = load_preset(preset, PARAMS).config
    with shapes_only():
        teacher, student = passes.teacher_and_student(config.teacher.model)
        found = {
            "decode": passes.decode_work(teacher, 1).flops,
            "one step": passes.student_work(teacher, student, config, 1, 1).flops,
            "two steps": passes.student_work(teacher, student, config, 2, 1).flops,
            "teacher": sum(work.flops for work in passes.teacher_work(teacher, config, 1)),
            "reference": passes.full_pass(teacher, student, 1).flops + reference_extras(config.teacher.model),
        }
    for name, expected in GFLOP[preset].items():
        assert found[name] / 1e9 == pytest.approx(expected, rel=0.01), name


@pytest.mark.parametrize(("preset", "gflop"), [("var_d16", 353.1), ("llamagen_l", 226.6)])
def test_a_lean_decoder_computes_a_tenth_less(preset, gflop):
    """Worked out by hand: a convolution after a doubling takes 16 products on (side + 1)^2 places, not 36 on side^2."""
    with shapes_only():
        teacher, _ = passes.teacher_and_student(load_preset(preset, PARAMS).config.teacher.model)
        join_doublings(teacher.tokenizer)
        assert passes.decode_work(teacher, 1).flops / 1e9 == pytest.approx(gflop, rel=0.001)


def reference_extras(model):
    """What the authors' pass computes beside ours: the noise/data layers at every position and distances to the
    codebook (VAR), masked pairs of a dense attention (LlamaGen)."""
    length, width = sum(model.level_sizes) + 1, model.width
    if model.family == "var":
        return (model.depth + 1) * 2.0 * length * width**2 + 4.0 * (length - 1) * model.codebook_size * model.code_dim
    return model.depth * 4.0 * width * length * (length - 1) / 2


@pytest.mark.parametrize("family", ["llamagen", "var"])
def test_a_real_step_of_dd1_counts_and_keeps_the_same(family):
    """On real tensors: torch's own counter of operations (which leaves attention out on a CPU), and what autograd
    keeps."""
    config = tiny(family)
    teacher, student = untrained(family)
    teacher, student = frozen_copy(teacher), frozen_copy(student).requires_grad_(True)
    # An export that another test made of this teacher has stored the decoder's weights otherwise.
    teacher.to(memory_format=torch.contiguous_format)
    distance = classifier_distance(DigitsClassifier(channels=32, feature_dim=8, dropout=0.0))
    batch = config.dd1.training.batch_size
    objective = dd1_objective(teacher, passes.Shapes(teacher), config.dd1, distance)
    with FlopCounterMode(display=False) as counter, Ledger() as ledger:
        loss, kept = kept_bytes(lambda: objective(student, torch.arange(batch), 0)["loss"])
        loss.backward()
    with shapes_only():
        fake_teacher, fake_student = passes.teacher_and_student(config.teacher.model)
        fake_distance = classifier_distance(
            without_values(lambda: DigitsClassifier(channels=32, feature_dim=8, dropout=0.0))
        )
        fake_objective = dd1_objective(fake_teacher, passes.Shapes(fake_teacher), config.dd1, fake_distance)
        with Ledger() as fake:
            value, fake_kept = kept_bytes(lambda: fake_objective(fake_student, torch.arange(batch), 0)["loss"])
            value.backward()
    assert fake.flops == pytest.approx(ledger.flops, rel=1e-6)
    assert fake.bytes == pytest.approx(ledger.bytes, rel=0.02)
    assert fake_kept == pytest.approx(kept, rel=0.02)
    attention = ledger.flops - counter.get_total_flops()
    assert 0 <= attention < 0.5 * ledger.flops


def test_attention_counts_its_products_and_half_of_a_causal_one():
    q, k, v = (torch.randn(2, 3, length, 8, requires_grad=True) for length in (5, 7, 7))
    with Ledger() as ledger:
        torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()
    assert ledger.flops == (2 + 5) * 2 * 2 * 3 * 5 * 7 * 8
    with Ledger() as ledger:
        torch.nn.functional.scaled_dot_product_attention(k.detach(), k.detach(), v.detach(), is_causal=True)
    assert ledger.flops == 2 * 2 * 2 * 3 * (7 * 8 / 2) * 8


def test_inference_counts_as_much_as_training():
    """Without autograd composite operators reach the ledger whole."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 6 * 6, 5))
    x = torch.randn(2, 3, 8, 8)
    q = torch.randn(2, 3, 7, 8)
    counts = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), Ledger() as ledger:
            model(x)
            torch.nn.functional.scaled_dot_product_attention(q, q, q)
        counts.append(ledger.flops)
    assert counts[0] == counts[1] == 2 * 2 * (4 * 36 * 27 + 144 * 5) + 2 * 2 * 2 * 3 * 7 * 7 * 8


def test_views_are_free_and_expanded_tensors_are_read_once():
    x, row = torch.randn(100, 10), torch.randn(10)
    with Ledger() as ledger:
        x.view(10, 100).T[3:]
        assert ledger.operators == []
        x + row.expand(100, 10)
    assert ledger.bytes == 4 * (1000 + 10 + 1000)


def test_a_product_of_few_rows_takes_what_reading_its_matrix_takes():
    """A teacher that draws token by token reads all of its weights each time; more rows, or a matrix that a cache
    holds, go at the usual rates."""
    layer, small = torch.nn.Linear(1024, 2048, bias=False), torch.nn.Linear(64, 64)
    with torch.no_grad(), Ledger() as ledger:
        for x, module in ((torch.randn(2, 1024), layer), (torch.randn(512, 1024), layer), (torch.randn(2, 64), small)):
            module(x)
    assert [operator.streamed for operator in ledger.operators if operator.flops] == [True, False, False]
    device = Device(flops=1e9, half_flops=1e9, bandwidth=10.0, launch=0.0, memory=0.0, source="", streaming=2.0)
    assert device.seconds([Operator(1.0, 40.0, streamed=True)]) == 20.0
    assert device.seconds([Operator(1.0, 40.0)]) == 4.0
    assert replace(device, streaming=None).seconds([Operator(1.0, 40.0, streamed=True)]) == 4.0


def test_an_operator_takes_what_takes_longest():
    device = Device(flops=100.0, half_flops=1000.0, bandwidth=10.0, launch=1.0, memory=0.0, source="")
    operators = [Operator(500.0, 10.0), Operator(0.0, 40.0), Operator(1.0, 1.0)]
    assert device.seconds(operators) == 5.0 + 4.0 + 1.0
    assert device.seconds([each._replace(half=True) for each in operators]) == 1.0 + 4.0 + 1.0
    one_at_a_time = replace(device, overlaps=False)
    assert one_at_a_time.seconds(operators) == pytest.approx((5.0 + 1.0 + 1.0) + (4.0 + 1.0) + (0.01 + 0.1 + 1.0))


def test_this_machine_is_probed_and_others_are_named():
    here = probe()
    assert 1e9 < here.flops < 1e14
    assert 1e8 < here.bandwidth < 1e12
    assert here.streaming is not None
    assert 1e8 < here.streaming < 1e12
    assert 1e-7 < here.launch < 1e-2
    assert find_device("H200") is DEVICES["h200"]
    with pytest.raises(UnknownDevice, match="valid: h200, h100, a100, 4090, cpu2, this"):
        find_device("abacus")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llamagen", "var"])
def test_every_long_stage_of_a_trained_preset_is_predicted(family):
    config = tiny(family)
    costs = predict(config, DEVICES["cpu2"])
    trained = {"ar_diffusion"} if config.ar_diffusion.source == "train" else set()
    assert set(costs) == {"teacher", "trajectories", "distill_dd1", "distill_dd2", "sample"} | trained
    for cost in costs.values():
        assert cost.seconds > cost.flops / DEVICES["cpu2"].flops > 0
        assert cost.memory > 0


def test_an_average_of_the_guidance_network_takes_a_copy_of_its_weights():
    def state(decay):
        config = tiny("llamagen", f"dd2.guidance.ema_decay={decay}")
        with shapes_only():
            teacher, student = passes.teacher_and_student(config.teacher.model)
            guidance, generator = passes.dd2_steps(teacher, student, config)
        return guidance.state, generator.state

    transformer = build_teacher(tiny("llamagen").teacher.model).get_submodule("transformer")
    copy = 4 * sum(weight.numel() for weight in transformer.parameters())
    (averaged, with_one), (plain, without) = state(0.8), state(0.0)
    assert averaged - plain == copy
    assert with_one == without


@pytest.mark.slow
def test_the_same_preset_is_predicted_the_same():
    """A storage that DD2 lets go on the way may leave its address to another: each counts once all the same."""
    config = tiny("llamagen")
    with shapes_only():
        teacher, student = passes.teacher_and_student(config.teacher.model)
        kept = {tuple(step.kept for step in passes.dd2_steps(teacher, student, config)) for _ in range(4)}
    assert len(kept) == 1


@pytest.mark.slow
def test_twice_the_steps_take_twice_the_time_and_a_larger_batch_more_memory():
    stage = "distill_dd1"
    alone = ("ar_diffusion=none", "dd2=none", "export.student=dd1", "evaluate.rows=[dd1_1step]")
    plain, longer, wider = (
        predict(tiny("llamagen", *alone, *overrides), DEVICES["h200"])[stage]
        for overrides in (
            (),
            ("dd1.training.steps=80", "dd1.training.warmup_steps=0"),
            ("dd1.training.batch_size=64",),
        )
    )
    steps, batch = tiny("llamagen").dd1.training.steps, tiny("llamagen").dd1.training.batch_size
    assert longer.seconds / plain.seconds == pytest.approx(80 / steps)
    assert longer.memory == plain.memory
    assert (wider.memory > plain.memory) == (batch < 64)


@pytest.mark.parametrize(("device", "chunks"), [("h200", 8), ("cpu2", 1024)])
def test_the_flow_map_is_launched_as_often_as_its_chunks_on_that_device(device, chunks):
    """Worked out by hand: 512 images of 256 tokens over 4,096 codes are 2^29 pairs, in chunks of 2^26 or 2^19."""
    config = load_preset("var_d16", PARAMS).config
    step, _ = passes.map_work(config.teacher.model, config.trajectories, 512, find_device(device).kind)[-2:]
    assert step.times == passes.ADAPTIVE_EVALUATIONS * chunks
