"""Reading ahead: the same batches in the same order, whatever the threads do and wherever training starts."""

import threading
from functools import partial

import pytest
import torch

from ddops.training.replicas import own_share, replicas
from ddops.training.schedule import batch_indices
from ddops.trajectories.dataset import TrajectoryBatch
from ddops.trajectories.reader import ReadAhead

SIZE, BATCH = 50, 8


class Slow:
    """A data set whose earlier batches take longer than the later ones, and which counts."""

    def __init__(self):
        self.calls, self.lock = [], threading.Lock()

    def batch(self, indices_B):
        with self.lock:
            self.calls.append(indices_B.tolist())
            wait = 0.02 if len(self.calls) % 2 else 0.0
        threading.Event().wait(wait)
        return TrajectoryBatch(indices_B, indices_B.float()[:, None, None], indices_B[:, None])


schedule = partial(batch_indices, 3, batch_size=BATCH, dataset_size=SIZE)


@pytest.mark.parametrize("first", [0, 4, 17], ids=["from the start", "in mid-epoch", "in the third epoch"])
def test_every_step_gets_its_own_samples_each_read_once(first):
    dataset = Slow()
    reader = ReadAhead(dataset, schedule, workers=3, ahead=4)
    steps = range(first, first + 20)
    for step in steps:
        labels_B, noise_BLC, ids_BL = reader.batch(schedule(step), step)
        assert torch.equal(labels_B, schedule(step))
        assert torch.equal(noise_BLC[:, 0, 0], labels_B.float())
        assert torch.equal(ids_BL[:, 0], labels_B)
    reader.close()
    assert all(dataset.calls.count(schedule(step).tolist()) == 1 for step in steps)


def test_the_next_batches_are_under_way_when_one_is_handed_out():
    dataset = Slow()
    reader = ReadAhead(dataset, schedule, workers=1, ahead=3)
    reader.batch(schedule(0), 0)
    deadline = threading.Event()
    for _ in range(200):
        if len(dataset.calls) == 4:
            break
        deadline.wait(0.01)
    assert dataset.calls == [schedule(step).tolist() for step in range(4)]
    reader.close()


def test_processes_that_share_a_batch_each_read_their_share():
    reader = ReadAhead(Slow(), lambda step: own_share(schedule(step)))
    with replicas(2) as group:
        for step in range(5):
            share = schedule(step)[group.rank :: group.size]
            assert len(share) == BATCH // 2
            labels_B = reader.batch(share, step).labels_B
            assert torch.equal(labels_B, share)
            seen = torch.zeros(SIZE)
            seen[labels_B] = 2.0
            group.average([seen])
            assert torch.equal(seen.nonzero()[:, 0], schedule(step).sort().values), "together they read the batch"
        reader.close()


def test_a_step_may_be_left_out():
    """As after a resume: what was read for steps that are past is dropped."""
    reader = ReadAhead(Slow(), schedule)
    reader.batch(schedule(0), 0)
    assert torch.equal(reader.batch(schedule(9), 9).labels_B, schedule(9))
    reader.close()


def test_other_samples_than_announced_are_refused():
    reader = ReadAhead(Slow(), schedule)
    with pytest.raises(ValueError, match="step 1 reads other samples than those announced"):
        reader.batch(schedule(0), 1)


def test_a_failure_in_a_thread_is_the_readers():
    class Broken:
        def batch(self, indices_B):
            raise OSError("the disk is gone")

    reader = ReadAhead(Broken(), schedule)
    with pytest.raises(OSError, match="the disk is gone"):
        reader.batch(schedule(0), 0)
    reader.close()
