"""What all stages of one command share: the store, the workers, the device, the reporter."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass, field
from types import TracebackType

from mmad_cli.errors import UsageError
from mmad_cli.stages.executor import close_pool, make_pool, resolve_workers
from mmad_cli.stages.progress import Reporter, SilentReporter
from mmad_cli.store import Store, Timings

DEVICES = ("auto", "cpu", "cuda")


@dataclass
class Session:
    """One command's resources. Use it as a context manager so that workers end."""

    store: Store = field(default_factory=Store)
    workers: int | None = None
    device: str = "auto"
    reporter: Reporter = field(default_factory=SilentReporter)
    timings: Timings = field(init=False, repr=False)
    _executor: Executor | None = field(default=None, init=False, repr=False)
    _resolved_device: str | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        resolve_workers(self.workers)
        self.timings = Timings(self.store.root)
        if self.device not in DEVICES:
            raise UsageError(f"--device {self.device}: choose one of {', '.join(DEVICES)}")
        if self.device == "cuda":
            self.resolve_device()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        close_pool(self._executor)
        self._executor = None
        self.timings.save()

    def pool(self, tasks: int) -> Executor | None:
        """The process pool, started when first worth it: starting workers costs more than a few small tasks."""
        count = self.pool_workers(tasks)
        if count <= 1:
            return None
        if self._executor is None:
            self._executor = make_pool(count)
        return self._executor

    def pool_workers(self, tasks: int) -> int:
        """How many processes so many tasks would be shared out to; 1 for work in this process."""
        count = resolve_workers(self.workers)
        return count if tasks >= 2 * count else 1

    def resolve_device(self) -> str:
        """`cpu` or `cuda`. Raises UsageError when cuda is asked for and there is none."""
        if self._resolved_device is None:
            self._resolved_device = _resolve_device(self.device)
        return self._resolved_device


def _resolve_device(device: str) -> str:
    if device == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if device == "cuda":
        built = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        raise UsageError(f"--device cuda: {built}; use --device cpu or auto, and see `mmad doctor`")
    return "cpu"
