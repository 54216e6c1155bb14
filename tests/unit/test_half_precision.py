"""Training in bfloat16: which numbers are half as wide, and which must not be."""

import dataclasses

import pytest
import torch
from safetensors.torch import save

from ddops.config.models import HeadConfig
from ddops.losses.dd2 import straight_through_codes
from ddops.models.ar_diffusion import codebook_mean, new_ar_diffusion
from ddops.models.quantization import nearest_code
from ddops.models.weights_dd2 import as_backbone
from ddops.training.checkpoint import CheckpointFile
from ddops.training.loop import train
from helpers import toy_alternating, toy_training
from helpers.tiny import FAMILIES, tiny, untrained
from helpers.toy_alternating import Pursuit
from helpers.toy_training import Killed, dying_at


def half(**changes):
    return toy_training.training(precision="bfloat16", **changes)


def test_products_are_half_as_wide_and_what_is_kept_is_not(tmp_path):
    """A product's output is bfloat16; weights, their gradients, the EMA and the curves are float32; the weights agree
    with float32's to what bfloat16's eight bits leave over of a short training."""
    seen = set()

    def watched(model, indices_B, step):
        hook = model[0].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
        values = toy_training.objective(model, indices_B, step)
        hook.remove()
        return values

    options = {"seed": 7, "dataset_size": toy_training.DATASET_SIZE, "description": "toy"}
    states = []
    for name, config in (("half", half()), ("full", toy_training.training())):
        checkpoint = CheckpointFile(tmp_path / f"{name}.pt", name)
        model = toy_training.new_model()
        states.append(
            train(model, watched, config=config, checkpoint=checkpoint, curves_dir=tmp_path / name, **options)
        )
        assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
        assert {value.dtype for value in states[-1].values()} <= {torch.float32, torch.int64}
        assert seen == ({torch.bfloat16} if name == "half" else {torch.float32})
        seen.clear()
    half_state, full_state = states
    assert save(half_state) != save(full_state)
    for name in ("0.weight", "4.weight"):
        difference = (half_state[name] - full_state[name]).norm() / full_state[name].norm()
        assert difference < 0.05, name


def test_resumed_equals_uninterrupted_in_half_precision_too(tmp_path):
    whole = toy_training.run(tmp_path / "whole", config=half())
    with pytest.raises(Killed):
        toy_training.run(tmp_path / "part", dying_at(11), config=half())
    assert toy_training.run(tmp_path / "part", config=half()) == whole


def test_both_networks_of_the_alternating_updates_run_in_half_precision(tmp_path, monkeypatch):
    seen = {}

    class Watched(Pursuit):
        def guidance(self, generator, guidance, count):
            seen["guidance"] = torch.is_autocast_enabled("cpu")
            return super().guidance(generator, guidance, count)

        def generator(self, generator, guidance, indices_B, step):
            x = generator(torch.randn(2, 2))
            seen["generator"] = x.dtype
            return super().generator(generator, guidance, indices_B, step)

    plain_training = toy_alternating.training
    monkeypatch.setattr(
        toy_alternating, "training", lambda processes: dataclasses.replace(plain_training(1), precision="bfloat16")
    )
    toy_alternating.run(tmp_path, Watched())
    assert seen == {"guidance": True, "generator": torch.bfloat16}


def test_closed_forms_and_distances_stay_exact():
    """Near the data a posterior's logits are in the thousands, where bfloat16 counts in steps of eight."""
    teacher = untrained("llamagen")[0]
    codebook_VC = teacher.codebook_VC
    torch.manual_seed(0)
    q_BLC = codebook_VC[torch.randint(len(codebook_VC), (8, 16))]
    t_BL = torch.full((8, 16), 0.97)
    x_BLC = t_BL[..., None] * q_BLC + (1 - t_BL[..., None]) * torch.randn_like(q_BLC)
    log_p_BLV = torch.randn(8, 16, len(codebook_VC)).log_softmax(-1)
    arguments = {
        codebook_mean: (x_BLC, t_BL, log_p_BLV, codebook_VC),
        nearest_code: (x_BLC, codebook_VC),
        straight_through_codes: (log_p_BLV, log_p_BLV.argmax(-1), codebook_VC),
    }
    for function, given in arguments.items():
        expected = function(*given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(function(*given), expected), function.__name__
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert codebook_mean(x_BLC, t_BL, log_p_BLV.bfloat16(), codebook_VC).dtype == torch.float32


def test_a_student_runs_in_half_precision():
    """DD1's and DD2's network under the loop's autocast: finite, and near float32's."""
    teacher, student = untrained("llamagen")
    noise_BLC = torch.randn(4, teacher.layout.length, teacher.codebook_VC.shape[1])
    labels_B = torch.arange(4)
    with torch.no_grad():
        expected = student(noise_BLC, labels_B, torch.zeros(4, dtype=torch.long)).logits_BLV
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits_BLV = student(noise_BLC, labels_B, torch.zeros(4, dtype=torch.long)).logits_BLV
    assert (logits_BLV.float() - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_stay_exact(family):
    """Logits of half precision tie, so that another token is the largest; and a teacher's exact score is of its logits.
    The transformers before them do run in half precision, so the heads are asked for what they make of their input."""
    teacher, student = untrained(family)
    config = HeadConfig(predicts="embedding", width=16, blocks=1)
    head = new_ar_diffusion(as_backbone(teacher), config).head
    heads = [(student, name) for name in student.head_modules]
    heads += [(teacher.get_submodule("transformer"), name) for name in teacher.head_modules]
    seen = []

    def compare(module, inputs, output):
        with torch.autocast("cpu", enabled=False):
            expected = type(module).forward(module, *(x.float() for x in inputs))
        seen.append(type(module).__name__)
        assert output.dtype == torch.float32
        assert torch.equal(output, expected)

    hooks = [model.get_submodule(name).register_forward_hook(compare) for model, name in heads]
    hooks.append(head.register_forward_hook(compare))
    x_BLC, labels_B = torch.randn(2, teacher.layout.length, teacher.codebook_VC.shape[1]), torch.arange(2)
    ids_BL = torch.randint(len(teacher.codebook_VC), x_BLC.shape[:2])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        student(x_BLC, labels_B, torch.zeros_like(labels_B))
        hidden_BLD = as_backbone(teacher).hidden(labels_B, as_backbone(teacher).embed_prefix(ids_BL))
        teacher.logits(labels_B, ids_BL)
        head(x_BLC, torch.rand(x_BLC.shape[:2]), hidden_BLD)
    for hook in hooks:
        hook.remove()
    assert len(seen) >= len(heads), "each was asked"


def test_what_vars_transformer_reads_is_summed_exactly():
    """The tokenizer's sums over scales, for the model that reads all of them at once as for the one that samples."""
    teacher = untrained("var")[0]
    q_BLC = torch.randn(2, teacher.layout.length, teacher.codebook_VC.shape[1])
    expected = teacher.prefix_inputs(q_BLC)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(teacher.prefix_inputs(q_BLC), expected)


def test_the_precision_is_a_choice_of_two():
    assert tiny("llamagen", "+dd2.training.precision=bfloat16").dd2.training.precision == "bfloat16"
    with pytest.raises(ValueError, match="precision"):
        tiny("llamagen", "+dd2.training.precision=float16")
