"""A Dask cluster as the place where tasks run: connecting to it, and making sure that its workers fit the work.

Everything else is Dask's: the scheduler runs the tasks of a lost worker again on another one. Tasks find their inputs
and leave their results in the store, so a second run of one finds what the first one finished.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from mmad_cli.errors import MmadError, StoreError, UsageError

if TYPE_CHECKING:
    from mmad_cli.store import Store

_CONNECT_SECONDS = 20
# for a cluster that is still starting its workers
_WORKERS_SECONDS = 60
# what a task may try again when it raises, for a store that did not answer; a lost worker is the scheduler's affair
_RETRIES = 2
# their versions are in keys or change numbers
_COMPARED = ("mmad-cli", "numpy", "torch", "timm", "open3d", "faiss", "scikit-learn")


Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Needs:
    """What a worker must have for the tasks of a command; `token` is a mark that the command leaves in its store."""

    store: str
    token: str
    data: str
    weights: tuple[tuple[str, str], ...]
    versions: tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class _Unfit:
    """What comes of a task at a worker that lacks something, instead of a result."""

    said: str


class TaskDroppedError(Exception):
    """Raised in a task that nobody waits for any more."""


# of a worker process: what it was found to have
_met: set[Needs] = set()


class ClusterExecutor(Executor):
    """Tasks of a Dask client as futures of the standard library; every call is a task of its own.

    A worker looks at itself before its first task: it may have joined after `Cluster.check`.

    In place of the executor that the client has (`Client.get_executor`): that one leaves a future open for ever when
    the result of a finished task dies with its worker, before it was fetched, and the task then fails.
    """

    def __init__(self, client: Any, needs: Sequence[Needs] = ()) -> None:
        self._client, self._needs = client, needs
        self._tasks: weakref.WeakSet[Any] = weakref.WeakSet()

    def submit(
        self, function: Callable[Parameters, Result], /, *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Future[Result]:
        """Send a call to the cluster."""
        task = self._client.submit(_call, tuple(self._needs), function, *args, pure=False, retries=_RETRIES, **kwargs)
        self._tasks.add(task)
        future: Future[Result] = Future()
        # one that the cluster dropped by itself is no longer pending
        future.add_done_callback(lambda done: task.cancel() if done.cancelled() and task.status == "pending" else None)
        self._client.loop.add_callback(_pass_on, task, future)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Drop what is not finished; nothing is waited for."""
        self._client.cancel(list(self._tasks))


async def _pass_on(task: Any, future: Future[Any]) -> None:
    """Give a future what its task on the cluster comes to; without scheduler it is cancelled."""
    result: Any = None
    failure: BaseException | None = None
    dropped = False
    try:
        result = await task.result()
    except ImportError as error:
        failure = UsageError(f"--dask: a worker cannot do this ({error}); install the same packages on all of them")
    except BaseException as error:  # noqa: BLE001
        # what is raised here ends nowhere: whoever waits for the future is told
        failure, dropped = error, task.status != "error"
    if isinstance(result, _Unfit):
        failure = UsageError(result.said)
    if dropped:
        future.cancel()
    if not future.set_running_or_notify_cancel():
        return
    if failure is not None:
        future.set_exception(failure)
    else:
        future.set_result(result)


class Cluster:
    """A connection to the scheduler of a Dask cluster. Raises UsageError naming --dask when there is none.

    tell: takes a line about workers that are waited for, or that leave while they have tasks.
    """

    def __init__(self, address: str, tell: Callable[[str], None] = lambda _: None) -> None:
        self.address = address
        self._tell = tell
        self._client: Any = _connect(address, tell)
        # a reconnecting client complains on standard error; what matters is told
        self._log_level = _set_level(logging.CRITICAL)
        self._present: set[str] = set(self._client.scheduler_info(n_workers=-1)["workers"])
        self._needs: list[Needs] = []
        self._marked: set[str] = set()
        self._leaving = contextlib.ExitStack()
        self._client.subscribe_topic("all", self._on_event)

    def executor(self) -> Executor:
        """Runs tasks on the workers; what was checked before is checked again on those that join later."""
        return ClusterExecutor(self._client, self._needs)

    def workers(self) -> int:
        """Workers at this moment, at least 1."""
        return max(1, len(self._client.scheduler_info(n_workers=-1)["workers"]))

    def _on_event(self, event: tuple[float, Mapping[str, Any]]) -> None:
        """Follow the workers; what the scheduler does about a lost one, it does by itself."""
        what = event[1]
        worker = str(what.get("worker"))
        if what.get("action") == "add-worker":
            self._present.add(worker)
        elif what.get("action") == "remove-worker":
            self._present.discard(worker)
            if what.get("processing-tasks"):
                self._tell(f"worker {worker} is gone; what it was doing goes to another one")
            if not self._present:
                self._tell("no worker is left; waiting for new ones (Ctrl-C ends; what was finished is kept)")

    def check(self, store: Store, data: Path, weights: Mapping[str, str]) -> None:
        """Make sure that every worker has the same versions and weights, and sees the dataset and the store.

        Raises UsageError naming the first worker that does not.
        """
        if store.address.startswith("memory:"):
            raise UsageError("--store memory://: is in one process only; workers need a shared folder or an address")
        token = f"cluster-check-{self._client.id}"
        if store.address not in self._marked:
            # pruning keeps a record as long as its folder is there
            folder = self._leaving.enter_context(TemporaryDirectory(prefix="mmad-cluster-"))
            store.write_run(token, {"folder": folder, "keys": []})
            self._marked.add(store.address)
            self._leaving.callback(store.remove_run, token)
        needs = Needs(store.address, token, str(data), tuple(sorted(weights.items())), tuple(_versions().items()))
        if needs in self._needs:
            return
        for worker, found in self._client.run(_lacking, needs, on_error="return").items():
            if isinstance(found, BaseException):
                raise UsageError(
                    f"--dask: worker {worker} cannot run mmad ({found}); install mmad there, the same version as here"
                )
            if found is not None:
                raise UsageError(_said(worker, found))
        self._needs.append(needs)

    def close(self) -> None:
        """Leave the cluster; what has not started is dropped."""
        with contextlib.suppress(Exception):
            # else the scheduler complains that it cannot tell this client of its own leaving; it may be gone already
            self._client.unsubscribe_topic("all")
        self._client.close()
        with contextlib.suppress(MmadError, OSError):
            self._leaving.close()
        _set_level(self._log_level)


def stop_if_dropped() -> None:
    """Raise TaskDroppedError in a task on a worker that was cancelled; elsewhere nothing happens."""
    try:
        from distributed import get_worker

        worker = get_worker()
    except (ImportError, ValueError):
        return
    task = worker.state.tasks.get(worker.get_current_task())
    if task is not None and task.state == "cancelled":
        raise TaskDroppedError


def _set_level(level: int) -> int:
    """Change what the client of Dask says by itself; gives the level before."""
    logger = logging.getLogger("distributed.client")
    before = logger.level
    logger.setLevel(level)
    return before


def _connect(address: str, tell: Callable[[str], None]) -> Any:
    try:
        import distributed
    except ImportError as error:
        raise UsageError("--dask: needs the package distributed; pip install 'mmad-cli[dask]'") from error
    try:
        make_client: Any = distributed.Client
        client = make_client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"--dask {address}: no scheduler answers there ({error or type(error).__name__}); "
            "start one with `dask scheduler` and give its address, such as tcp://host:8786"
        ) from error
    if not client.scheduler_info(n_workers=-1)["workers"]:
        tell(f"the cluster has no workers yet; waiting for them for up to {_WORKERS_SECONDS} s")
    try:
        client.wait_for_workers(1, timeout=_WORKERS_SECONDS)
    except TimeoutError as error:
        client.close()
        raise UsageError(
            f"--dask {address}: the cluster has no workers; start some with `dask worker {address} --nthreads 1`"
        ) from error
    return client


def is_lost_worker(error: BaseException) -> bool:
    """Whether the scheduler gave a task up because workers died over it again and again."""
    return type(error).__name__ == "KilledWorker"


def has_no_workers(error: BaseException) -> bool:
    """Whether the scheduler gave a task up because it had no worker for longer than it was set to wait."""
    return type(error).__name__ in ("NoWorkerError", "NoValidWorkerError")


def lost_cluster() -> StoreError:
    """What a user is told when tasks are dropped."""
    return StoreError(
        "the Dask cluster dropped the work (are the scheduler and workers still there?). What was finished is kept; "
        "run the same command again"
    )


def _versions() -> dict[str, str | None]:
    from mmad_cli._version import __version__
    from mmad_cli.store import library_versions

    return {**library_versions(name for name in _COMPARED if name != "mmad-cli"), "mmad-cli": __version__}


def _call(
    needs: tuple[Needs, ...],
    function: Callable[Parameters, Result],
    /,
    *args: Parameters.args,
    **kwargs: Parameters.kwargs,
) -> Result | _Unfit:
    """Runs on a worker: a task, or why this worker cannot do it."""
    for one in needs:
        lacking = _lacking(one)
        if lacking is not None:
            from distributed import get_worker

            return _Unfit(_said(get_worker().address, lacking))
    return function(*args, **kwargs)


def _said(worker: str, lacking: str) -> str:
    return f"--dask: worker {worker} {lacking}"


def _lacking(needs: Needs) -> str | None:
    """Runs on a worker: what is wrong there. It looks once."""
    if needs in _met:
        return None
    own = _versions()
    for name, version in needs.versions:
        if own.get(name) != version:
            return f"has {name} {own.get(name)}, this command {version}; install the same versions everywhere"
    problem = _problem(needs.store, needs.data, dict(needs.weights), needs.token)
    if problem is None:
        _met.add(needs)
    return problem


def _problem(store: str, data: str, weights: dict[str, str], token: str) -> str | None:
    from mmad_cli.backbones.weights import resolve
    from mmad_cli.store import open_store

    if not Path(data).is_dir():
        return f"does not see the dataset {data}; it must lie at the same path on every machine"
    try:
        seen = open_store(store).has_run(token)
        different = [name for name, digest in weights.items() if resolve(name).sha256 != digest]
    except MmadError as error:
        return f"cannot do this: {error}"
    if not seen:
        return f"does not see the same store at {store}; name a shared folder or an object address with --store"
    return f"has another file for the weights {', '.join(different)}" if different else None
