"""LlamaGen's tokenizer against the released code's outputs (tests/golden), and what training asks of it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from ddops.models.checkpoints_tokenizers import llamagen_tokenizer_state
from ddops.models.errors import CheckpointError
from ddops.models.llamagen_tokenizer import LlamaGenTokenizer
from ddops.models.quantization import to_sequence
from helpers.llamagen_helpers import PUBLISHED, SMALL, TINY
from helpers.var_helpers import TOLERANCE, golden, with_prefix


@pytest.fixture(scope="module")
def tensors():
    return golden("llamagen_tokenizer")


@pytest.fixture
def published(tensors):
    return with_prefix(tensors, "sd.")


@pytest.fixture
def tokenizer(published):
    model = LlamaGenTokenizer(TINY)
    model.load_state_dict(llamagen_tokenizer_state(published, TINY))
    return model.eval().requires_grad_(False)


def test_encoder_features(tokenizer, tensors):
    assert_close(tokenizer.features(tensors["in.img"]), to_sequence(tensors["out.enc_h"]), **TOLERANCE)


def test_encode(tokenizer, tensors):
    assert torch.equal(tokenizer.encode(tensors["in.img"]), tensors["out.enc_indices"])


def test_reconstruction(tokenizer, tensors):
    output = tokenizer(tensors["in.img"])
    assert torch.equal(output.ids_BL, tensors["out.enc_indices"])
    assert_close(output.reconstruction_BIHW, tensors["out.rec_image"], **TOLERANCE)


def test_codes_are_of_unit_norm(tokenizer, tensors):
    assert not torch.allclose(tokenizer.codebook.norm(dim=1), torch.ones(64))
    q_BLC = F.embedding(tensors["in.indices"], tokenizer.codebook_VC)
    assert_close(q_BLC, to_sequence(tensors["out.codebook_entry"]), **TOLERANCE)
    q_BLC = F.embedding(tensors["out.enc_indices"], tokenizer.codebook_VC)
    assert_close(q_BLC, to_sequence(tensors["out.enc_quant"]), **TOLERANCE)


def test_decode_of_ids_is_not_clamped(tokenizer, tensors):
    images_BIHW = tokenizer.decode(F.embedding(tensors["in.indices"], tokenizer.codebook_VC))
    assert images_BIHW.abs().max() > 1
    assert_close(images_BIHW, tensors["out.decode_code_image"], **TOLERANCE)


def test_decode_of_embeddings_off_the_codebook(tokenizer, tensors):
    images_BIHW = tokenizer.decode(to_sequence(tensors["in.z_cont"]))
    assert_close(images_BIHW, tensors["out.decode_cont_image"], **TOLERANCE)


def test_published_size():
    """The decoder of VQ-16 has 42.5 M parameters."""
    with torch.device("meta"):
        model = LlamaGenTokenizer(PUBLISHED)
    decoder = [*model.decoder.parameters(), *model.post_quant_conv.parameters()]
    assert round(sum(weight.numel() for weight in decoder) / 1e6, 1) == 42.5


def test_a_missing_part_of_the_fused_attention_is_named(published):
    del published["encoder.mid.1.k.weight"]
    with pytest.raises(CheckpointError, match=r"lacks encoder\.mid\.1\.k\.weight .*\(128, 128, 1, 1\)"):
        llamagen_tokenizer_state(published, TINY)


def test_an_unexpected_key_is_named(published):
    published["decoder.conv_blocks.9.res.0.conv1.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"unexpected decoder\.conv_blocks\.9\.res\.0\.conv1\.bias \(3,\)"):
        llamagen_tokenizer_state(published, TINY)


def test_a_misshapen_key_is_named_with_both_shapes(published):
    with pytest.raises(CheckpointError, match=r"quantize\.embedding\.weight \(64, 8\), expected \(128, 8\)"):
        llamagen_tokenizer_state(published, replace(TINY, codebook_size=128))


def test_the_usage_counts_of_training_may_be_absent(published):
    del published["quantize.codebook_used"]
    assert llamagen_tokenizer_state(published, TINY)


def test_the_training_pass_reaches_every_weight():
    torch.manual_seed(0)
    model = LlamaGenTokenizer(SMALL)
    images_BIHW = torch.randn(16, 1, 8, 8).clamp(-1, 1)
    output = model(images_BIHW)
    (F.mse_loss(output.reconstruction_BIHW, images_BIHW) + output.codebook_loss).backward()
    assert output.reconstruction_BIHW.shape == images_BIHW.shape
    assert torch.equal(output.ids_BL, model.encode(images_BIHW))
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name


def test_a_patch_encoders_token_depends_on_its_own_patch_alone():
    torch.manual_seed(0)
    model = LlamaGenTokenizer(replace(SMALL, autoencoder=replace(SMALL.autoencoder, encoder="patch")))
    images_BIHW = torch.randn(2, 1, 8, 8)
    images_BIHW[1] = images_BIHW[0]
    images_BIHW[1, 0, 2:4, 6:8] += 1
    features_BLC = model.features(images_BIHW)
    assert (features_BLC[0] != features_BLC[1]).any(-1).nonzero().flatten().tolist() == [1 * SMALL.grid + 3]


def test_codebook_loss_compares_unit_vectors(tokenizer, tensors):
    x_BLC = F.normalize(to_sequence(tensors["out.enc_h"]), dim=-1)
    expected = 1.25 * F.mse_loss(x_BLC, to_sequence(tensors["out.enc_quant"]))
    assert_close(tokenizer(tensors["in.img"]).codebook_loss, expected, **TOLERANCE)


def test_reconstruction_gradients_pass_straight_through_the_quantiser():
    torch.manual_seed(0)
    model = LlamaGenTokenizer(SMALL)
    model(torch.randn(2, 1, 8, 8)).reconstruction_BIHW.square().mean().backward()
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0
    assert model.codebook.grad is None


def test_reseeding_moves_unused_codes_only_and_is_reproducible():
    torch.manual_seed(0)
    images_BIHW = torch.randn(64, 1, 8, 8).clamp(-1, 1)
    model = LlamaGenTokenizer(SMALL)
    before = model.codebook.detach().clone()
    used = torch.bincount(model.encode(images_BIHW).flatten(), minlength=SMALL.codebook_size) > 0
    moved = model.reseed_unused_codes(images_BIHW, torch.Generator().manual_seed(3))
    first = model.codebook.detach().clone()
    assert moved == int((~used).sum()) > 0
    assert torch.equal(first[used], before[used])
    assert (first != before)[~used].any(dim=1).all()
    model.codebook.data.copy_(before)
    model.reseed_unused_codes(images_BIHW, torch.Generator().manual_seed(3))
    assert torch.equal(model.codebook, first)
