from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from sklearn.random_projection import SparseRandomProjection

from mmad_cli.memory import dense_projection, project, projected_dimension, sparse_projection


@pytest.mark.parametrize(("name", "channels"), [("b", 288), ("c", 256)])
def test_matrix_of_the_published_code(golden, name, channels):
    case = golden[f"coreset_{name}"]
    matrix = sparse_projection(int(case["projected_shape"][0]), channels, random_state=0)
    np.testing.assert_array_equal(matrix.indptr, case["proj_indptr"])
    np.testing.assert_array_equal(matrix.indices, case["proj_indices"])
    np.testing.assert_array_equal(matrix.data, case["proj_data"])


def test_projected_rows_of_the_published_code(golden):
    case = golden["coreset_c"]
    matrix = sparse_projection(1500, 256, random_state=0)
    projected = project(case["X"].astype(np.float32), matrix)
    assert projected.dtype == np.float32 and projected.shape == tuple(case["projected_shape"])
    step = -(-1500 // len(case["projected_sub"]))
    np.testing.assert_allclose(projected[::step], case["projected_sub"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("n", "channels"), [(500, 300), (2000, 250), (37, 1152), (2, 17), (3, 12000)])
def test_equals_scikit_learn(n, channels):
    reference = SparseRandomProjection(eps=0.9, random_state=7).fit(np.zeros((n, channels)))
    ours = sparse_projection(n, channels, random_state=7)
    assert (ours != csr_matrix(reference.components_)).nnz == 0


def test_scikit_learn_is_not_imported():
    script = (
        "import sys; from mmad_cli.memory import sparse_projection; sparse_projection(500, 300, random_state=0); "
        "sys.exit('sklearn' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_one_stream_for_several_banks():
    ours, theirs = np.random.RandomState(3), np.random.RandomState(3)
    for n, channels in ((500, 300), (400, 20), (600, 400)):
        matrix = sparse_projection(n, channels, random_state=ours)
        if matrix is None:
            assert channels == 20
            continue
        reference = SparseRandomProjection(eps=0.9, random_state=theirs).fit(np.zeros((n, channels)))
        assert (matrix != csr_matrix(reference.components_)).nnz == 0


def test_dimensions():
    assert projected_dimension(765184, 1152) == 334
    assert projected_dimension(191296, 768) == 300
    assert projected_dimension(175616, 33) is None
    assert projected_dimension(1, 768) is None
    # No array of this size exists: only the shape matters.
    assert sparse_projection(10**9, 1152, random_state=0).shape[1] == 1152


def test_project_without_a_matrix_copies():
    rows = np.ones((3, 4), dtype=np.float32)
    out = project(rows, None)
    out[:] = 0
    np.testing.assert_array_equal(rows, 1)


def test_dense_projection_is_a_fresh_linear_layer():
    torch.manual_seed(5)
    layer = torch.nn.Linear(1024, 128, bias=False)
    np.testing.assert_array_equal(dense_projection(1024, 128, seed=5), layer.weight.detach().numpy())


def test_errors():
    with pytest.raises(ValueError, match="eps"):
        sparse_projection(100, 10, eps=1.0)
    with pytest.raises(ValueError, match="n_rows"):
        sparse_projection(0, 10)
    with pytest.raises(ValueError, match="rows"):
        project(np.zeros((2, 3)), np.zeros((4, 5)))
