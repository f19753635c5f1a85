"""A Dask cluster as the place where tasks run: connecting to it, and making sure that its workers fit the work.

Everything else is Dask's: the scheduler runs the tasks of a lost worker again on another one. Tasks find their inputs
and leave their results in the store, so a second run of one finds what the first one finished.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from pathlib import Path
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


class ClusterExecutor(Executor):
    """Tasks of a Dask client as futures of the standard library; every call is a task of its own.

    In place of the executor that the client has (`Client.get_executor`): that one leaves a future open for ever when
    the result of a finished task dies with its worker, before it was fetched, and the task then fails.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._tasks: weakref.WeakSet[Any] = weakref.WeakSet()

    def submit(
        self, function: Callable[Parameters, Result], /, *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Future[Result]:
        """Send a call to the cluster."""
        task = self._client.submit(function, *args, pure=False, retries=_RETRIES, **kwargs)
        self._tasks.add(task)
        future: Future[Result] = Future()
        future.add_done_callback(lambda done: task.cancel() if done.cancelled() else None)
        self._client.loop.add_callback(_pass_on, task, future)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Drop what is not finished; nothing is waited for."""
        self._client.cancel(list(self._tasks))


async def _pass_on(task: Any, future: Future[Any]) -> None:
    """Give a future what its task on the cluster comes to; without scheduler it is cancelled."""
    result, failure, dropped = None, None, False
    try:
        result = await task.result()
    except BaseException as error:  # noqa: BLE001
        # what is raised here ends nowhere: whoever waits for the future is told
        failure, dropped = error, task.status != "error"
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
        self._client.subscribe_topic("all", self._on_event)

    def executor(self) -> Executor:
        """Runs tasks on the workers."""
        return ClusterExecutor(self._client)

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
        store.write_run(token, {"folder": "/nonexistent", "keys": []})
        own = _versions()
        try:
            answers = self._client.run(_look_around, store.address, str(data), dict(weights), token, on_error="return")
        finally:
            store.remove_run(token)
        for worker, found in answers.items():
            if isinstance(found, BaseException):
                raise UsageError(
                    f"--dask: worker {worker} cannot run mmad ({found}); install mmad there, the same version as here"
                )
            if found["problem"] is not None:
                raise UsageError(f"--dask: worker {worker}: {found['problem']}")
            for name, version in own.items():
                if found["versions"].get(name) != version:
                    raise UsageError(
                        f"--dask: worker {worker} has {name} {found['versions'].get(name)}, this command {version}; "
                        "install the same versions everywhere"
                    )

    def close(self) -> None:
        """Leave the cluster; what has not started is dropped."""
        with contextlib.suppress(Exception):
            # else the scheduler complains that it cannot tell this client of its own leaving; it may be gone already
            self._client.unsubscribe_topic("all")
        self._client.close()
        _set_level(self._log_level)


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


def _look_around(store: str, data: str, weights: dict[str, str], token: str) -> dict[str, Any]:
    """Runs on a worker: its versions, and what is wrong there."""
    return {"versions": _versions(), "problem": _problem(store, data, weights, token)}


def _problem(store: str, data: str, weights: dict[str, str], token: str) -> str | None:
    from mmad_cli.backbones.weights import resolve
    from mmad_cli.store import open_store

    if not Path(data).is_dir():
        return f"does not see the dataset {data}; it must lie at the same path on every machine"
    try:
        seen = open_store(store).has_run(token)
        different = [name for name, digest in weights.items() if resolve(name).sha256 != digest]
    except MmadError as error:
        return str(error)
    if not seen:
        return f"does not see the same store at {store}; name a shared folder or an object address with --store"
    return f"has another file for the weights {', '.join(different)}" if different else None
