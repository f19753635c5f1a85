from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from mmad_cli.memory import (
    approximate_greedy_coreset,
    covering_radius,
    greedy_certificate,
    greedy_coreset,
    random_coreset,
)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def reference_greedy(rows: np.ndarray, count: int, first: np.ndarray | None = None) -> list[int]:
    """One pass over all rows per pick, in float64."""
    rows = rows.astype(np.float64)
    current = np.linalg.norm(rows - rows[0], axis=1) if first is None else first.astype(np.float64)
    picks = [0] if first is None else []
    while len(picks) < count:
        if picks:
            current = np.minimum(current, np.linalg.norm(rows - rows[picks[-1]], axis=1))
        picks.append(int(current.argmax()))
        current[picks[-1]] = 0
    return picks


def reference_half(rows: np.ndarray, count: int) -> list[int]:
    """The published arithmetic: first distances in the precision of the rows, all others in half precision."""
    table = torch.from_numpy(rows)
    current = torch.linalg.norm(table - table[:1], dim=1).half()
    table, picks = table.half(), [0]
    for _ in range(count - 1):
        current = torch.minimum(torch.linalg.norm(table - table[picks[-1]], dim=1), current)
        picks.append(int(current.argmax()))
        current[picks[-1]] = 0
    return picks


def special_cases() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    normal = rng.standard_normal
    cases = {
        "normal": normal((2000, 100)),
        "far from the origin": normal((2000, 100)) + 1000,
        "far outliers": np.concatenate([normal((1500, 100)), 1e4 * normal((3, 100))]),
        "tiny": 1e-6 * normal((1500, 100)),
        "two tight clusters": np.concatenate([1e-3 * normal((800, 90)) + 5, 1e-3 * normal((800, 90)) - 5]),
        "half the rows are zero": np.concatenate([np.zeros((800, 80)), normal((800, 80))])[rng.permutation(1600)],
        "few distinct rows": np.tile(normal((150, 100)), (10, 1)),
        "one distinct row": np.full((700, 70), 0.3),
        "integers with ties": rng.integers(0, 3, (2000, 6)).astype(float),
        "a line": np.repeat(np.arange(1000.0)[:, None], 2, axis=0),
    }
    return {name: rows.astype(np.float32) for name, rows in cases.items()}


CASES = special_cases()


def golden_rows(case: dict[str, np.ndarray]) -> np.ndarray:
    rows = case["X"].astype(np.float32)
    if "proj_data" not in case:
        return rows
    shape = (len(case["proj_indptr"]) - 1, rows.shape[1])
    matrix = csr_matrix((case["proj_data"], case["proj_indices"], case["proj_indptr"]), shape=shape)
    return np.ascontiguousarray((matrix @ rows.astype(np.float64).T).T)


@pytest.mark.parametrize("name", ["a", "c", "d"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_radius_of_the_published_selection(golden, name, dtype):
    case = golden[f"coreset_{name}"]
    rows = golden_rows(case)
    picks = greedy_coreset(rows, int(case["n"]), dtype=dtype)
    expected = case[f"f{dtype[5:]}_radius_proj"]
    np.testing.assert_allclose(covering_radius(rows, picks, case["k_grid"]), expected, rtol=0.01, atol=1e-9)


@pytest.mark.parametrize("name", ["a", "c", "d"])
def test_half_precision_selects_the_published_rows(golden, name):
    case = golden[f"coreset_{name}"]
    picks = greedy_coreset(golden_rows(case), int(case["n"]), dtype="float16")
    np.testing.assert_array_equal(picks, case["f16_idx"])


@pytest.mark.parametrize("name", ["a", "d"])
def test_single_precision_selects_the_published_rows_where_nothing_ties(golden, name):
    case = golden[f"coreset_{name}"]
    picks = greedy_coreset(golden_rows(case), int(case["n"]))
    if name == "d":
        # Two rows at equal distance change places; as sets the selections are one.
        assert set(picks) == set(case["f32_idx"])
        np.testing.assert_array_equal(picks[57:], 0)
    else:
        np.testing.assert_array_equal(picks, case["f32_idx"])


@pytest.mark.parametrize("name", CASES)
def test_every_pick_is_the_farthest_row(name):
    rows = CASES[name]
    picks = greedy_coreset(rows, 300)
    assert greedy_certificate(rows, picks) <= 1e-4
    expected = reference_greedy(rows, 300)
    assert len(set(picks)) == len(set(expected))
    if name in ("integers with ties", "a line", "normal", "far from the origin", "one distinct row"):
        np.testing.assert_array_equal(picks, expected)


@pytest.mark.parametrize("name", CASES)
def test_half_precision_equals_the_plain_loop(name):
    rows = CASES[name]
    if np.abs(rows).max() > 1e4:
        rows = rows / 10
    np.testing.assert_array_equal(greedy_coreset(rows, 250, dtype="float16"), reference_half(rows, 250))


@pytest.mark.parametrize("channels", [1, 3, 33, 65, 200])
@pytest.mark.parametrize("seed", [0, 1])
def test_random_rows(clustered, channels, seed):
    rows = clustered(3000, channels, seed)
    picks = greedy_coreset(rows, 700, start=17)
    assert picks.dtype == np.int64 and picks.shape == (700,) and picks[0] == 17
    assert greedy_certificate(rows, picks) <= 1e-4
    assert len(set(picks)) == 700


def test_a_wrong_pick_fails_the_certificate(clustered):
    rows = clustered(1000, 40)
    picks = greedy_coreset(rows, 100)
    assert greedy_certificate(rows, picks) <= 1e-4
    assert greedy_certificate(rows, np.concatenate([picks[:10], picks[50:]])) > 1e-2


def test_certificate_and_radius_against_all_distances(clustered):
    rows = clustered(400, 20)
    picks = random_coreset(400, 50, seed=3)
    between = np.linalg.norm(rows[:, None].astype(np.float64) - rows[picks], axis=2)
    running = np.minimum.accumulate(between, axis=1)
    np.testing.assert_allclose(covering_radius(rows, picks, np.arange(1, 51)), running.max(0), rtol=1e-9)
    gaps = [1 - running[picks[k], k - 1] / running[:, k - 1].max() for k in range(1, 50)]
    assert greedy_certificate(rows, picks) == pytest.approx(max(gaps), rel=1e-9)


def test_all_rows_can_be_picked(clustered):
    rows = clustered(500, 30)
    assert sorted(greedy_coreset(rows, 500)) == list(range(500))
    assert greedy_coreset(rows[:1], 1).tolist() == [0]


def test_inputs_of_other_kinds_give_the_same_picks(clustered):
    rows = clustered(1500, 50)
    expected = greedy_coreset(rows, 150)
    read_only = rows.copy()
    read_only.setflags(write=False)
    for other in (read_only, torch.from_numpy(rows), np.asfortranarray(rows), rows.astype(np.float64)):
        before = other.copy() if isinstance(other, np.ndarray) else other.clone()
        np.testing.assert_array_equal(greedy_coreset(other, 150), expected)
        assert bool((other == before).all())


def test_approximate_greedy_starts_from_the_mean_distance(clustered):
    rows = clustered(2000, 128)
    picks = approximate_greedy_coreset(rows, 200, n_starts=10, seed=4)
    starts = np.random.RandomState(4).choice(2000, 10, replace=False)
    mean = np.mean([np.linalg.norm(rows - rows[s], axis=1) for s in starts], axis=0)
    np.testing.assert_array_equal(picks, reference_greedy(rows, 200, first=mean))


def test_random_coreset_has_no_duplicates():
    picks = random_coreset(100, 100, seed=0)
    assert sorted(picks) == list(range(100)) and picks.dtype == np.int64
    np.testing.assert_array_equal(random_coreset(100, 7, seed=1), random_coreset(100, 7, seed=1))


def test_progress_is_rare_and_complete(clustered):
    calls: list[tuple[int, int]] = []
    begin = time.monotonic()
    greedy_coreset(clustered(3000, 80), 600, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (600, 600)
    assert len(calls) <= 2 + 2 * (time.monotonic() - begin)


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (np.zeros((4, 2)), {"count": 0}, "count"),
        (np.zeros((4, 2)), {"count": 5}, "count"),
        (np.zeros((4, 2)), {"count": 2, "start": 4}, "start"),
        (np.zeros((4, 2)), {"count": 2, "dtype": "float8"}, "dtype"),
        (np.zeros(4), {"count": 2}, "rows"),
        (np.zeros((0, 3)), {"count": 1}, "rows"),
        (np.array([[0.0], [np.nan]]), {"count": 1}, "rows"),
        (np.array([[0.0], [1e5]]), {"count": 1, "dtype": "float16"}, "rows.*float16"),
    ],
)
def test_errors_name_the_argument(rows, arguments, message):
    with pytest.raises(ValueError, match=message):
        greedy_coreset(rows, **arguments)


MEMORY_PROBE = """
import sys
from pathlib import Path
import numpy as np
from mmad_cli.memory import greedy_coreset

def field(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024

rng = np.random.default_rng(0)
rows = rng.standard_normal((40000, 40), dtype=np.float32) @ rng.standard_normal((40, 334), dtype=np.float32)
greedy_coreset(rows[:3000].copy(), 50)
Path("/proc/self/clear_refs").write_text("5")
before = field("VmRSS")
greedy_coreset(rows, 1500)
print((field("VmHWM") - before) / rows.nbytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_memory_beyond_the_rows():
    run = subprocess.run([sys.executable, "-c", MEMORY_PROBE], capture_output=True, text=True, check=False)
    if "clear_refs" in run.stderr:
        pytest.skip("the peak cannot be reset here")
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) <= 1.3


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("channels", [33, 200])
def test_cuda_gives_a_valid_selection(clustered, channels):
    rows = clustered(5000, channels)
    picks = greedy_coreset(rows, 500, device="cuda")
    assert greedy_certificate(rows, picks) <= 1e-4
    half = greedy_coreset(rows, 500, device="cuda", dtype="float16")
    grid = np.array([100, 300, 500])
    expected = covering_radius(rows, greedy_coreset(rows, 500, dtype="float16"), grid)
    np.testing.assert_allclose(covering_radius(rows, half, grid), expected, rtol=0.01)
