from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from pydantic import ValidationError

from mmad_cli.memory import (
    BankConfig,
    MemoryBank,
    greedy_coreset,
    project,
    random_coreset,
    scalar_moments,
    sparse_projection,
)


def in_blocks(rows: np.ndarray, size: int = 700):
    return lambda: (rows[i : i + size] for i in range(0, len(rows), size))


@pytest.fixture(scope="module")
def rows(clustered) -> np.ndarray:
    return clustered(2500, 320)


def test_greedy_bank_keeps_unprojected_rows_in_order_of_choice(rows):
    bank = MemoryBank().fit(in_blocks(rows), *rows.shape, random_state=0)
    projected = project(rows, sparse_projection(*rows.shape, random_state=0))
    np.testing.assert_array_equal(bank.picks_, greedy_coreset(projected, 250))
    np.testing.assert_array_equal(bank.rows_, rows[bank.picks_])


@pytest.mark.parametrize("coreset", ["greedy", "approximate", "random", "all"])
@pytest.mark.parametrize("projection", ["sparse", "dense", "none"])
def test_every_way_to_select(rows, coreset, projection):
    config = BankConfig(coreset=coreset, projection=projection, count=60)
    banks = [MemoryBank(config).fit(in_blocks(rows, s), *rows.shape, random_state=3) for s in (700, 911)]
    assert len(banks[0].rows_) == (len(rows) if coreset == "all" else 60)
    np.testing.assert_array_equal(banks[0].rows_, rows[banks[0].picks_])
    np.testing.assert_array_equal(banks[0].picks_, banks[1].picks_)


def test_one_random_stream_over_two_banks(rows):
    stream = np.random.RandomState(0)
    MemoryBank().fit(in_blocks(rows), *rows.shape, random_state=stream)
    second = MemoryBank(BankConfig(coreset="random")).fit(in_blocks(rows), *rows.shape, random_state=stream)
    again = np.random.RandomState(0)
    sparse_projection(*rows.shape, random_state=again)
    np.testing.assert_array_equal(second.picks_, random_coreset(2500, 250, again))


def test_normalisation_is_applied_to_blocks_and_queries(rows):
    mean, std = scalar_moments(in_blocks(rows))
    assert mean == pytest.approx(rows.astype(np.float64).mean(), rel=1e-9)
    assert std == pytest.approx(rows.astype(np.float64).std(ddof=1), rel=1e-9)
    bank = MemoryBank().fit(in_blocks(rows), *rows.shape, random_state=0, mean=mean, std=std)
    np.testing.assert_array_equal(bank.rows_, bank.normalise(rows)[bank.picks_])
    assert (bank.nearest(bank.normalise(rows[bank.picks_[:20]]))[0] == 0).all()


def test_half_precision_and_start(rows):
    bank = MemoryBank(BankConfig(coreset_dtype="float16", start=5)).fit(in_blocks(rows), *rows.shape, random_state=0)
    assert bank.picks_[0] == 5


def test_save_and_load(rows, tmp_path):
    config = BankConfig(count=40, eps=0.8)
    bank = MemoryBank(config).fit(in_blocks(rows), *rows.shape, random_state=1, mean=0.5, std=2.0)
    bank.save(tmp_path / "bank.safetensors")
    other = MemoryBank.load(tmp_path / "bank.safetensors")
    assert other.config == config and (other.mean_, other.std_) == (0.5, 2.0)
    np.testing.assert_array_equal(other.rows_, bank.rows_)
    np.testing.assert_array_equal(other.picks_, bank.picks_)
    for left, right in zip(other.nearest(rows[:9], 3), bank.nearest(rows[:9], 3), strict=True):
        np.testing.assert_array_equal(left, right)


def test_load_refuses_another_file(tmp_path):
    from safetensors.numpy import save_file

    save_file({"rows": np.zeros((2, 2))}, str(tmp_path / "x.safetensors"))
    with pytest.raises(ValueError, match="path"):
        MemoryBank.load(tmp_path / "x.safetensors")


def test_from_rows(rows):
    bank = MemoryBank.from_rows(rows[:10], mean=1.0)
    np.testing.assert_array_equal(bank.nearest(rows[:10])[1][:, 0], np.arange(10))
    assert bank.mean_ == 1.0


@pytest.mark.parametrize(
    ("config", "n", "kept"),
    [
        ({}, 765184, 76518),
        ({}, 5, 1),
        ({"count": 7651}, 191296, 7651),
        ({"count": 50}, 20, 20),
        ({"fraction": 1.0}, 9, 9),
        ({"coreset": "all"}, 9, 9),
    ],
)
def test_number_of_rows(config, n, kept):
    assert BankConfig(**config).rows_to_keep(n) == kept


def test_errors(rows):
    with pytest.raises(ValidationError):
        BankConfig(fraction=0)
    with pytest.raises(ValidationError):
        BankConfig(franction=0.5)
    for n, message in ((2400, "more"), (2600, "2500")):
        with pytest.raises(ValueError, match=message):
            MemoryBank().fit(in_blocks(rows), n, 320)
    with pytest.raises(ValueError, match="blocks"):
        MemoryBank().fit(in_blocks(rows), 2500, 321)
    with pytest.raises(ValueError, match="std"):
        MemoryBank().fit(in_blocks(rows), *rows.shape, std=0.0)
    with pytest.raises(ValueError, match="blocks"):
        scalar_moments(in_blocks(rows[:0]))


def test_package_import_is_light():
    code = "import sys, mmad_cli.memory; print(sorted({'torch', 'faiss', 'sklearn', 'scipy'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
