"""VAR's tokenizer against the released code's outputs (tests/golden), and what training asks of it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from ddops.config.models import AutoencoderConfig
from ddops.models.checkpoints_tokenizers import var_tokenizer_state
from ddops.models.errors import CheckpointError
from ddops.models.quantization import to_sequence
from ddops.models.var_tokenizer import VARTokenizer, phi_of_each_scale
from helpers.var_helpers import PUBLISHED, TINY, TOLERANCE, golden, with_prefix

SMALL = replace(
    TINY,
    image_size=8,
    image_channels=1,
    autoencoder=AutoencoderConfig(channels=32, channel_multipliers=(1, 2), res_blocks=1),
)


@pytest.fixture(scope="module")
def tensors():
    return golden("var_tokenizer")


@pytest.fixture
def published(tensors):
    return with_prefix(tensors, "sd.")


@pytest.fixture
def tokenizer(published):
    model = VARTokenizer(TINY)
    model.load_state_dict(var_tokenizer_state(published, TINY))
    return model.eval().requires_grad_(False)


@pytest.fixture
def ten_scale_tokenizer(published):
    """The same quantiser over the published ten scales; the autoencoder's weights do not depend on the schedule."""
    config = replace(TINY, patch_sizes=PUBLISHED.patch_sizes, image_size=256)
    model = VARTokenizer(config)
    model.load_state_dict(var_tokenizer_state(published, config))
    return model.eval().requires_grad_(False)


def scales(tensors, prefix, count=4):
    return [tensors[f"{prefix}_{level}"] for level in range(count)]


def embeddings(tokenizer, ids):
    return [F.embedding(ids_Bl, tokenizer.codebook_VC) for ids_Bl in ids]


def test_encoder_features(tokenizer, tensors):
    assert_close(tokenizer.features(tensors["in.img"]), tensors["out.img_f"], **TOLERANCE)


def test_encode(tokenizer, tensors):
    ids_BL = tokenizer.encode(tensors["in.img"])
    assert torch.equal(ids_BL, torch.cat(scales(tensors, "out.img_idx"), dim=1))


def test_every_scale_of_the_quantised_latent(tokenizer, tensors):
    _, f_hats = tokenizer.quantize(tensors["out.img_f"])
    for f_hat_BCgg, expected in zip(f_hats, scales(tensors, "out.img_fhat"), strict=True):
        assert_close(f_hat_BCgg, expected, **TOLERANCE)


def test_reconstruction(tokenizer, tensors):
    images_BIHW = tokenizer(tensors["in.img"]).reconstruction_BIHW
    assert_close(images_BIHW.clamp(-1, 1), tensors["out.img_to_reconstructed_img"], **TOLERANCE)


def test_decode_of_ids(tokenizer, tensors):
    q_BLC = torch.cat(embeddings(tokenizer, scales(tensors, "in.idx")), dim=1)
    assert_close(tokenizer.decode(q_BLC).clamp(-1, 1), tensors["out.idxBl_to_img"], **TOLERANCE)


def test_decode_of_a_continuous_latent_is_not_clamped(tokenizer, tensors):
    images_BIHW = tokenizer.decode_latent(tensors["in.f_hat"])
    assert images_BIHW.abs().max() > 1
    assert_close(images_BIHW.clamp(-1, 1), tensors["out.fhat_to_img"], **TOLERANCE)


@pytest.mark.parametrize(
    ("fixture", "ids", "out", "count"),
    [
        ("tokenizer", "in.idx", "out.step_{}.{}", 4),
        ("ten_scale_tokenizer", "in.s10_idx", "out.s10.{1}_{0}", 10),
    ],
)
def test_scale_by_scale(fixture, ids, out, count, tensors, request):
    tokenizer = request.getfixturevalue(fixture)
    q = embeddings(tokenizer, scales(tensors, ids, count))
    grid = tokenizer.config.grid
    f_hat_BCgg = torch.zeros(len(q[0]), 8, grid, grid)
    for level, q_BlC in enumerate(q):
        before = f_hat_BCgg.clone()
        new_BCgg, input_BlC = tokenizer.next_input(f_hat_BCgg, level, q_BlC)
        assert torch.equal(f_hat_BCgg, before)
        f_hat_BCgg = new_BCgg
        assert_close(f_hat_BCgg, tensors[out.format(level, "f_hat")], **TOLERANCE)
        assert_close(input_BlC, to_sequence(tensors[out.format(level, "next_input")]), **TOLERANCE)
    assert_close(tokenizer.accumulate(torch.cat(q, dim=1)), f_hat_BCgg, **TOLERANCE)


@pytest.mark.parametrize(
    ("fixture", "ids", "out", "count"),
    [
        ("tokenizer", "in.idx", "out.var_input", 4),
        ("ten_scale_tokenizer", "in.s10_idx", "out.s10.var_input", 10),
    ],
)
def test_teacher_forcing_input(fixture, ids, out, count, tensors, request):
    tokenizer = request.getfixturevalue(fixture)
    q_BLC = torch.cat(embeddings(tokenizer, scales(tensors, ids, count)), dim=1)
    assert_close(tokenizer.teacher_forcing_input(q_BLC), tensors[out], **TOLERANCE)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (4, (0, 1, 2, 3)),
        (5, (0, 1, 2, 2, 3)),
        (6, (0, 0, 1, 2, 3, 3)),
        (10, (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)),
    ],
)
def test_which_phi_serves_a_scale(count, expected):
    assert phi_of_each_scale(count, 4) == expected


def test_published_size():
    """The decoder of ``vae_ch160v4096z32.pth`` has 64.7 M parameters."""
    with torch.device("meta"):
        model = VARTokenizer(PUBLISHED)
    decoder = [*model.decoder.parameters(), *model.post_quant_conv.parameters()]
    assert round(sum(weight.numel() for weight in decoder) / 1e6, 1) == 64.7


def test_a_missing_key_is_named_with_its_shape(published):
    del published["decoder.up.1.upsample.conv.weight"]
    with pytest.raises(CheckpointError, match=r"lacks decoder\.up\.1\.upsample\.conv\.weight .*\(32, 32, 3, 3\)"):
        var_tokenizer_state(published, TINY)


def test_an_unexpected_key_is_named(published):
    published["decoder.up.9.block.0.conv1.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"unexpected decoder\.up\.9\.block\.0\.conv1\.bias \(3,\)"):
        var_tokenizer_state(published, TINY)


def test_a_misshapen_key_is_named_with_both_shapes(published):
    with pytest.raises(CheckpointError, match=r"quantize\.embedding\.weight \(64, 8\), expected \(128, 8\)"):
        var_tokenizer_state(published, replace(TINY, codebook_size=128))


def test_the_usage_counts_of_training_may_be_absent(published):
    del published["quantize.ema_vocab_hit_SV"]
    assert var_tokenizer_state(published, TINY)


def test_the_training_pass_reaches_every_weight():
    torch.manual_seed(0)
    model = VARTokenizer(SMALL)
    images_BIHW = torch.randn(16, 1, 8, 8).clamp(-1, 1)
    model.reseed_unused_codes(images_BIHW)
    output = model(images_BIHW)
    (F.mse_loss(output.reconstruction_BIHW, images_BIHW) + output.codebook_loss).backward()
    assert output.reconstruction_BIHW.shape == images_BIHW.shape
    assert torch.equal(output.ids_BL, model.encode(images_BIHW))
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name


def test_codebook_loss_is_the_mean_over_the_scales(tokenizer, tensors):
    output = tokenizer(tensors["in.img"])
    f_BCgg = tensors["out.img_f"]
    errors = [F.mse_loss(f_hat_BCgg, f_BCgg) for f_hat_BCgg in scales(tensors, "out.img_fhat")]
    assert_close(output.codebook_loss, 1.25 * torch.stack(errors).mean(), **TOLERANCE)


def test_reconstruction_gradients_pass_straight_through_the_quantiser():
    torch.manual_seed(0)
    model = VARTokenizer(SMALL)
    model(torch.randn(2, 1, 8, 8)).reconstruction_BIHW.square().mean().backward()
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0
    assert model.codebook.grad is None


def test_reseeding_moves_unused_codes_only_and_is_reproducible():
    torch.manual_seed(0)
    images_BIHW = torch.randn(64, 1, 8, 8).clamp(-1, 1)
    model = VARTokenizer(SMALL)
    before = model.codebook.detach().clone()
    used = torch.bincount(model.encode(images_BIHW).flatten(), minlength=64) > 0
    moved = model.reseed_unused_codes(images_BIHW, torch.Generator().manual_seed(3))
    first = model.codebook.detach().clone()
    assert moved == int((~used).sum()) > 0
    assert torch.equal(first[used], before[used])
    assert (first != before)[~used].any(dim=1).all()
    model.codebook.data.copy_(before)
    model.reseed_unused_codes(images_BIHW, torch.Generator().manual_seed(3))
    assert torch.equal(model.codebook, first)
