"""Samples on disk: read back as they were written, streamed, the ADM evaluator's format, the same bytes each time."""

import zipfile

import numpy as np
import pytest
import torch

from ddops.evaluation.samples import open_samples, pick, write_samples
from ddops.models.errors import CheckpointError

IMAGES = torch.randint(256, (23, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(23) % 4


def written(path, images=IMAGES, labels=LABELS, batch=10):
    write_samples(path, iter(images.split(batch)), labels)
    return path


@pytest.mark.parametrize("batch", [1, 7, 23, 100])
def test_samples_come_back_whatever_the_batches(tmp_path, batch):
    samples = open_samples(written(tmp_path / "a.npz"))
    batches = list(samples.batches(batch))
    assert torch.equal(torch.cat(batches), IMAGES)
    assert max(map(len, batches)) <= batch
    assert torch.equal(samples.labels_N, LABELS)
    assert len(samples) == 23


def test_numpy_and_so_the_adm_evaluator_reads_the_file(tmp_path):
    """That evaluator wants ``arr_0``, uint8, (N, H, W, channels)."""
    with np.load(written(tmp_path / "a.npz")) as file:
        assert file["arr_0"].dtype == np.uint8
        assert np.array_equal(file["arr_0"], IMAGES.permute(0, 2, 3, 1).numpy())
        assert np.array_equal(file["arr_1"], LABELS.numpy())


def test_the_same_samples_are_the_same_bytes(tmp_path):
    assert written(tmp_path / "a.npz").read_bytes() == written(tmp_path / "b.npz", batch=3).read_bytes()


def test_an_adm_reference_batch_without_labels_is_read(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", arr_0=IMAGES.permute(0, 2, 3, 1).numpy(), mu=np.zeros(2))
    samples = open_samples(tmp_path / "a.npz")
    assert torch.equal(torch.cat(list(samples.batches(10))), IMAGES)
    assert samples.labels_N.tolist() == [-1] * 23


def test_images_are_streamed_to_the_file_and_a_broken_stream_leaves_none(tmp_path):
    def breaking():
        yield IMAGES[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_samples(tmp_path / "a.npz", breaking(), LABELS)
    with pytest.raises(ValueError, match="5 images for 23 labels"):
        write_samples(tmp_path / "a.npz", iter([IMAGES[:5]]), LABELS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "nonsense", "another"])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = written(tmp_path / "a.npz")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "nonsense":
        path.write_bytes(b"nonsense")
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme", "hello")
    with pytest.raises(CheckpointError, match=r"a\.npz: .* stage sample"):
        open_samples(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_images_that_were_altered_are_not_judged(tmp_path, compressed):
    """By the checksum; a compressed file, such as a reference batch, may not even unpack."""
    path, images = tmp_path / "a.npz", np.random.default_rng(0).integers(256, size=(50, 64, 64, 3), dtype=np.uint8)
    (np.savez_compressed if compressed else np.savez)(path, arr_0=images)
    content = bytearray(path.read_bytes())
    content[300_000:300_010] = bytes(byte ^ 255 for byte in content[300_000:300_010])
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.npz: damaged .*; run the stage sample again"):
        list(open_samples(path).batches(10))


def test_a_grid_holds_the_first_of_each_class_in_columns_and_white_where_there_are_none(tmp_path):
    samples = open_samples(written(tmp_path / "a.npz"))
    picked = pick(samples, [2, 0, 9], per_class=6, batch_size=4).unflatten(0, (6, 3))
    for column, label in enumerate([2, 0]):
        expected = IMAGES[label == LABELS][:6]
        assert torch.equal(picked[: len(expected), column], expected)
    assert (picked[5, 1] == IMAGES[20]).all()
    assert (picked[:, 2] == 255).all()
