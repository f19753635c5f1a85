"""The trainer: what an interruption costs, what it reports, what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mmad_cli.errors import DataError
from mmad_cli.methods.mapping.config import TrainerConfig
from mmad_cli.methods.mapping.trainer import CHECKPOINT, batches, train


class InterruptedTrainingError(Exception):
    pass


class Data:
    """Small random samples; ends the training after so many batches."""

    def __init__(self, count=5, after=None):
        self.samples = torch.randn(count, 8, generator=torch.Generator().manual_seed(0))
        self.after, self.seen = after, []

    def __len__(self):
        return len(self.samples)

    def batch(self, indices):
        if self.after is not None and len(self.seen) == self.after:
            raise InterruptedTrainingError
        self.seen.append(list(indices))
        return [self.samples[index] for index in indices]


class Learner:
    """Two networks with an optimiser each; one has dropout, one batch statistics."""

    def __init__(self, bad_step=None):
        torch.manual_seed(3)
        self.first = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 8))
        self.second = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
        self.steps, self.bad_step = 0, bad_step

    @property
    def groups(self):
        return {"first": self.first, "second": self.second}

    def backward(self, batch):
        rows = torch.stack([*batch, *batch])
        losses = {"first": ((self.first(rows) - rows) ** 2).mean(), "second": self.second(rows).abs().mean()}
        sum(losses.values()).backward()
        self.steps += 1
        if self.steps == self.bad_step:
            return {"first": {"square": math.nan}, "second": {"absolute": float(losses["second"].detach())}}
        return {
            "first": {"square": float(losses["first"].detach())},
            "second": {"absolute": float(losses["second"].detach())},
        }


def state(learner):
    return {
        f"{name}/{key}": value.clone()
        for name, module in learner.groups.items()
        for key, value in module.state_dict().items()
    }


CONFIG = TrainerConfig(epochs=4, batch_size=2)


@pytest.mark.parametrize("after", [1, 4, 7, 11])
def test_an_interrupted_training_goes_on_from_its_epoch(tmp_path, after):
    whole = Learner()
    expected = train(whole, Data(), CONFIG, seed=1)
    with pytest.raises(InterruptedTrainingError):
        train(Learner(), Data(after=after), CONFIG, seed=1, folder=tmp_path)
    rest, data = Learner(), Data()
    curves = train(rest, data, CONFIG, seed=1, folder=tmp_path)
    # three batches per epoch; only those of finished epochs are not repeated
    assert len(data.seen) == 12 - after // 3 * 3
    assert curves == expected
    assert all(torch.equal(value, state(rest)[name]) for name, value in state(whole).items())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change", [{"seed": 2}, {"identity": "other"}, {"config": TrainerConfig(epochs=4, batch_size=2, rate=0.1)}]
)
def test_a_checkpoint_of_another_training_is_not_taken(tmp_path, change):
    with pytest.raises(InterruptedTrainingError):
        train(Learner(), Data(after=7), CONFIG, seed=1, folder=tmp_path)
    data = Data()
    train(Learner(), data, change.pop("config", CONFIG), **{"seed": 1, **change}, folder=tmp_path)
    assert len(data.seen) == 12


def test_a_damaged_checkpoint_starts_the_training_afresh(tmp_path):
    with pytest.raises(InterruptedTrainingError):
        train(Learner(), Data(after=7), CONFIG, seed=1, folder=tmp_path)
    (tmp_path / CHECKPOINT).write_bytes((tmp_path / CHECKPOINT).read_bytes()[:100])
    data = Data()
    assert train(Learner(), data, CONFIG, seed=1, folder=tmp_path) == train(Learner(), Data(), CONFIG, seed=1)
    assert len(data.seen) == 12


def test_curves_are_means_per_epoch_and_fall():
    curves = train(Learner(), Data(20), TrainerConfig(epochs=30, batch_size=4, rate=1e-2), seed=0)
    assert set(curves) == {"first/square", "second/absolute"}
    assert all(len(values) == 30 for values in curves.values())
    assert curves["first/square"][-1] < 0.7 * curves["first/square"][0]


def test_each_epoch_sees_every_sample_once_in_an_order_of_its_own():
    epochs = [list(batches(7, 3, 5, epoch)) for epoch in range(3)]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [3, 3, 1]
        assert sorted(index for batch in epoch for index in batch) == list(range(7))
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] == list(batches(7, 3, 5, 0)) != list(batches(7, 3, 6, 0))


def test_the_global_random_stream_neither_matters_nor_moves():
    torch.manual_seed(11)
    expected = train(Learner(), Data(), CONFIG, seed=1)
    learner = Learner()
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert train(learner, Data(), CONFIG, seed=1) == expected
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_that_is_not_finite_stops_or_costs_that_step(tmp_path):
    with pytest.raises(DataError, match=r"first.*epoch 2.*square.*rate"):
        train(Learner(bad_step=4), Data(), CONFIG, seed=1)
    skip = TrainerConfig(epochs=2, batch_size=2, non_finite="skip")
    curves = train(Learner(bad_step=1), Data(), skip, seed=1)
    assert all(math.isfinite(value) for values in curves.values() for value in values)


def test_progress_ends_at_the_total():
    told = []
    train(Learner(), Data(), CONFIG, seed=0, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (12, 12)


def test_without_samples_there_is_no_training():
    with pytest.raises(DataError, match="training samples"):
        train(Learner(), Data(0), CONFIG, seed=0)


@pytest.mark.parametrize("field", ["epochs", "batch_size"])
def test_counts_must_be_positive(field):
    with pytest.raises(ValueError, match=field):
        TrainerConfig(**{field: 0})
