"""What all stages of one command share: the store, the workers, the device, the reporter."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from mmad_cli.errors import UsageError
from mmad_cli.memory.limit import set_memory_limit, workers_that_fit
from mmad_cli.stages.cluster import Cluster
from mmad_cli.stages.executor import close_pool, make_pool, resolve_workers
from mmad_cli.stages.progress import Reporter, SilentReporter
from mmad_cli.store import Store, Timings

DEVICES = ("auto", "cpu", "cuda")
_ASKED = "asked for with --device"


@dataclass
class Session:
    """One command's resources. Use it as a context manager so that workers end."""

    store: Store = field(default_factory=Store)
    workers: int | None = None
    device: str = "auto"
    dask: str | None = None
    memory_limit: int | None = None
    reporter: Reporter = field(default_factory=SilentReporter)
    timings: Timings = field(init=False, repr=False)
    cluster: Cluster | None = field(default=None, init=False, repr=False)
    _executor: Executor | None = field(default=None, init=False, repr=False)
    _resolved_device: tuple[str, str] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        resolve_workers(self.workers)
        set_memory_limit(self.memory_limit, self.store.root / "work")
        if self.dask is not None and self.workers is not None:
            raise UsageError("--workers: the cluster of --dask has its own workers; leave one of the two out")
        self.timings = Timings(self.store.root)
        if self.device not in DEVICES:
            raise UsageError(f"--device {self.device}: choose one of {', '.join(DEVICES)}")
        if self.dask is not None:
            self.cluster = Cluster(self.dask, self.reporter.notice)
        elif self.device == "cuda":
            self.resolve_device()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        set_memory_limit(None)
        close_pool(self._executor)
        self._executor = None
        if self.cluster is not None:
            self.cluster.close()
        self.timings.save()

    def pool(self, tasks: int) -> Executor | None:
        """The process pool, started when first worth it: starting workers costs more than a few small tasks."""
        if self.cluster is not None:
            if self._executor is None:
                self._executor = self.cluster.executor()
            return self._executor
        count = self.pool_workers(tasks)
        if count <= 1:
            return None
        if self._executor is None:
            self._executor = make_pool(count)
        return self._executor

    def pool_workers(self, tasks: int) -> int:
        """How many processes so many tasks would be shared out to; 1 for work in this process."""
        if self.cluster is not None:
            return self.cluster.workers()
        count = workers_that_fit(resolve_workers(self.workers), self.memory_limit)
        return count if tasks >= 2 * count else 1

    def check_cluster(self, data: Path, weights: Mapping[str, str]) -> None:
        """Raises UsageError when a worker of the cluster cannot do the work; without a cluster nothing is to check."""
        if self.cluster is not None:
            self.cluster.check(self.store, data, weights)

    def resolve_device(self) -> str:
        """`cpu` or `cuda`. Raises UsageError when cuda is asked for and there is none."""
        return self._choose_device()[0]

    def device_reason(self) -> str:
        """Why it is that device."""
        return self._choose_device()[1]

    def _choose_device(self) -> tuple[str, str]:
        if self._resolved_device is None:
            self._resolved_device = resolve_device(self.device)
            if self.device == "auto":
                self.reporter.notice("device: {} ({})".format(*self._resolved_device))
        return self._resolved_device


def resolve_device(device: str) -> tuple[str, str]:
    """`cpu` or `cuda` for what was asked, and why. Raises UsageError when cuda is asked for and there is none."""
    if device == "cpu":
        return "cpu", _ASKED
    import torch

    if torch.cuda.is_available():
        return "cuda", _ASKED if device == "cuda" else f"torch sees {torch.cuda.get_device_name()}"
    reason = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
    if device == "cuda":
        raise UsageError(f"--device cuda: {reason}; use --device cpu or auto, and see `mmad doctor`")
    return "cpu", reason
