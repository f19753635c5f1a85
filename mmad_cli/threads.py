"""One place that decides how many threads numeric libraries use.

torch, FAISS, Open3D and scikit-learn each bring an OpenMP pool of their own; several pools of all cores at once run
slower than one. The environment variables act on libraries that are not loaded yet, threadpoolctl on those that are.
"""

from __future__ import annotations

import os
import sys

_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def limit_threads(count: int, share: int | None = None) -> None:
    """Let every numeric library of this process use `count` threads; a worker passes its number as `share`.

    Open3D heeds none of the variables, only the cores that a process may use, so each worker gets a share of them.
    """
    if share is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        first = share * count % len(cores)
        os.sched_setaffinity(0, cores[first : first + count] or cores)
    for variable in _VARIABLES:
        os.environ[variable] = str(count)
    if "numpy" in sys.modules:
        from threadpoolctl import threadpool_limits

        threadpool_limits(count)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(count)


def default_threads() -> None:
    """Respect what the user has set; otherwise all available cores, stated so that all libraries agree."""
    if not any(variable in os.environ for variable in _VARIABLES):
        limit_threads(available_cores())
