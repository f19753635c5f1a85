"""A Dask cluster of two worker processes: same numbers as in one process, and a killed worker costs its task only."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmad_cli.errors import StoreError, UsageError
from mmad_cli.results.runs import read_scores
from mmad_cli.stages.cluster import Cluster, _pass_on
from mmad_cli.stages.evaluate import evaluate_all
from mmad_cli.stages.executor import run_tasks
from mmad_cli.stages.grid import CategoryTask, WorkerReporter, fit_task
from mmad_cli.stages.pipeline import fit
from mmad_cli.stages.plan import Selection
from mmad_cli.stages.progress import Collector
from mmad_cli.stages.request import EvaluateRequest
from mmad_cli.stages.session import Session
from mmad_cli.stages.tasks import ExtractTask
from mmad_cli.store import ObjectStore, Store, open_store

pytest.importorskip("distributed")

Numbers = dict[str, object]

MEMORY = 10**11

LOOPBACK: list[list[str]] = [[], []]


class WorkerProcesses:
    """A scheduler and two workers, all processes of their own; `before` is put in front of each worker's command."""

    def __init__(
        self,
        folder: Path,
        host: str = "127.0.0.1",
        before: list[list[str]] = LOOPBACK,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.folder, self.file = folder, folder / "scheduler.json"
        self.environment = environment or {}
        folder.mkdir()
        self.scheduler = self._start(
            [], "dask_scheduler", "--host", host, "--port", "0", "--no-dashboard", "--scheduler-file", str(self.file)
        )
        _wait(lambda: self.file.is_file() and bool(self.file.read_text()))
        self.address = json.loads(self.file.read_text())["address"]
        self.workers = [self.add_worker(command) for command in before]

    def add_worker(self, before: list[str], *options: str) -> subprocess.Popen[bytes]:
        options = ("--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", str(self.folder), *options)
        return self._start(before, "dask_worker", self.address, *options)

    def replace_dead_workers(self) -> None:
        for number, worker in enumerate(self.workers):
            if worker.poll() is not None:
                self.workers[number] = self.add_worker([])

    def _start(self, before: list[str], what: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [*before, sys.executable, "-m", f"distributed.cli.{what}", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **self.environment}
        log = (self.folder / f"{what}-{time.monotonic_ns()}.log").open("wb")
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def stop(self) -> None:
        for process in (*self.workers, self.scheduler):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def serial(_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The numbers of one process."""
    folder = tmp_path_factory.mktemp("serial")
    evaluate_on(None, _tiny, folder / "store", folder / "out")
    return numbers(folder / "out")


@pytest.fixture(scope="module")
def processes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcesses]:
    """One cluster for all tests: starting processes costs more than what most of them do there."""
    folder = tmp_path_factory.mktemp("cluster")
    environment = {"XDG_CACHE_HOME": str(folder / "cache"), "MMAD_WEIGHTS": str(folder / "weights")}
    if find_spec("moto") is not None:
        environment.update(request.getfixturevalue("object_server"))
    started = WorkerProcesses(folder / "processes", environment=environment)
    yield started
    started.stop()


@pytest.fixture
def cluster(processes: WorkerProcesses) -> Iterator[WorkerProcesses]:
    yield processes
    processes.replace_dead_workers()


def requests(data: Path, out: Path) -> list[EvaluateRequest]:
    """The grid: one method, two seeds, all categories."""
    return [EvaluateRequest(data, "btf", "raw", selection=Selection(seed=seed), out=out / str(seed)) for seed in (0, 1)]


def numbers(folder: Path) -> dict[str, object]:
    """Metrics and scores of all runs below a folder."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("summary.json")):
        summary = json.loads(path.read_text())
        for name, category in summary["categories"].items():
            scores = read_scores(path.parent / name / "scores.csv")
            found[f"{path.parent.name}/{name}"] = (category["status"], category["metrics"], scores)
    return found


def evaluate_on(address: str | None, data: Path, store: str | Path, out: Path) -> list[str]:
    reporter = Collector()
    workers = 1 if address is None else None
    with Session(open_store(store), workers=workers, device="cpu", dask=address, reporter=reporter) as session:
        evaluate_all(session, requests(data, out))
    return reporter.notices


def test_two_worker_processes_give_the_serial_numbers(
    cluster: WorkerProcesses, serial: Numbers, tiny_dataset: Path, tmp_path: Path
) -> None:
    said = evaluate_on(cluster.address, tiny_dataset, tmp_path / "store", tmp_path / "out")
    # the workers may still be starting
    assert [line for line in said if "no workers yet" not in line] == []
    assert numbers(tmp_path / "out") == serial
    assert len(numbers(tmp_path / "out")) == 4
    assert not list((tmp_path / "store" / "runs").glob("cluster-check*"))


def test_workers_on_an_object_address_give_the_serial_numbers(
    cluster: WorkerProcesses, serial: Numbers, tiny_dataset: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("s3fs")
    address = request.getfixturevalue("bucket")
    evaluate_on(cluster.address, tiny_dataset, address, tmp_path / "out")
    assert numbers(tmp_path / "out") == serial
    store = open_store(address)
    assert isinstance(store, ObjectStore)
    names = list(store._objects())
    assert len([name for name in names if name.startswith("fit/")]) == 4
    assert not any("cluster-check" in name for name in names)


@pytest.mark.slow
def test_networks_on_workers_give_the_serial_numbers(
    cluster: WorkerProcesses, tiny_dataset: Path, tmp_path: Path
) -> None:
    found = []
    for address in (None, cluster.address):
        folder = tmp_path / str(address is None)
        workers = 1 if address is None else None
        one = Selection(categories=("block",))
        request = EvaluateRequest(tiny_dataset, "m3dm", backbones="builtin", selection=one, out=folder / "out")
        with Session(Store(folder / "store"), workers=workers, device="cpu", dask=address) as session:
            evaluate_all(session, [request])
        found.append(numbers(folder / "out"))
    assert found[0] == found[1]
    assert [value[0] for value in found[0].values()] == ["ok"]


@pytest.mark.slow
def test_an_interrupt_and_a_killed_worker_cost_what_was_being_done_only(
    cluster: WorkerProcesses, serial: Numbers, tiny_dataset: Path, tmp_path: Path
) -> None:
    """The command is interrupted, and goes on; then a worker dies in the middle, and the other one does the rest."""
    store = tmp_path / "store"
    command = [sys.executable, "-m", "mmad_cli", "evaluate", str(tiny_dataset), "--method", "btf", "--variant", "raw"]
    options = ["--seed", "0", "--seed", "1", "--store", str(store), "--out", str(tmp_path / "out")]

    def finished() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (store / "preprocess").rglob("*.safetensors")}

    def until(count: int) -> subprocess.Popen[str]:
        running = subprocess.Popen(
            [*command, *options, "--device", "cpu", "--dask", cluster.address],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        # some scans are clean, not all: the cluster is in the middle
        _wait(lambda: len(finished()) >= count)
        return running

    interrupted = until(2)
    interrupted.send_signal(signal.SIGINT)
    assert "the same command resumes" in interrupted.communicate(timeout=60)[1]
    assert interrupted.returncode == 130
    before = finished()
    running = until(len(before) + 1)
    before = finished()
    os.killpg(cluster.workers[0].pid, signal.SIGKILL)
    said = running.communicate(timeout=240)[1]
    assert running.returncode == 0, said
    assert "Traceback" not in said
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert list(numbers(tmp_path / "out").values()) == list(serial.values())


@pytest.mark.slow
def test_a_failing_sample_fails_its_category_as_in_one_process(
    cluster: WorkerProcesses, tiny_dataset: Path, tmp_path: Path
) -> None:
    broken = tiny_dataset / "cube" / "train" / "good" / "xyz" / "001.tiff"
    broken.write_bytes(b"no scan")
    evaluate_on(cluster.address, tiny_dataset, tmp_path / "store", tmp_path / "out")
    found = {key: value[0] for key, value in _statuses(tmp_path / "out").items()}
    assert found == {"0/block": "ok", "0/cube": "failed", "1/block": "ok", "1/cube": "failed"}
    assert all(str(broken) in value[1] for key, value in _statuses(tmp_path / "out").items() if "cube" in key)


def _statuses(folder: Path) -> dict[str, tuple[str, str]]:
    return {
        f"{path.parent.name}/{name}": (category["status"], category["error"] or "")
        for path in sorted(folder.rglob("summary.json"))
        for name, category in json.loads(path.read_text())["categories"].items()
    }


def test_what_is_wrong_with_the_cluster_is_said(cluster: WorkerProcesses, tiny_dataset: Path, tmp_path: Path) -> None:
    connection = Cluster(cluster.address)
    with pytest.raises(UsageError, match=r"does not see the dataset /nowhere"):
        connection.check(Store(tmp_path / "store"), Path("/nowhere"), {})
    with pytest.raises(UsageError, match=r"worker tcp://.*resnet18\.tv_in1k"):
        connection.check(Store(tmp_path / "store"), tiny_dataset, {"resnet18.tv_in1k": "0" * 64})
    connection.close()
    with pytest.raises(UsageError, match=r"--workers: the cluster of --dask"):
        Session(Store(tmp_path / "store"), workers=2, dask=cluster.address)


def test_a_worker_that_joins_later_is_looked_at(cluster: WorkerProcesses, tiny_dataset: Path, tmp_path: Path) -> None:
    connection = Cluster(cluster.address)
    connection.check(Store(tmp_path / "store"), tiny_dataset, {})
    executor = connection.executor()
    # those that were looked at go on; to the new one it was never there
    tiny_dataset.rename(tmp_path / "elsewhere")
    assert executor.submit(abs, -1).result(timeout=60) == 1
    late = cluster.add_worker([])
    try:
        _wait(lambda: connection.workers() == 3)
        tasks = [executor.submit(time.sleep, 0.1) for _ in range(30)]
        with pytest.raises(UsageError, match=rf"worker tcp://.* does not see the dataset {tiny_dataset}"):
            for task in tasks:
                task.result(timeout=60)
    finally:
        executor.shutdown()
        connection.close()
        os.killpg(late.pid, signal.SIGKILL)
        late.wait()
    assert not list((tmp_path / "store" / "runs").iterdir())


def test_tasks_of_an_interrupted_command_end(cluster: WorkerProcesses, tmp_path: Path) -> None:
    """What waits never starts; what runs ends at its next progress."""

    def task(number: int) -> None:
        (tmp_path / f"begun-{number}").touch()
        reporter = WorkerReporter()
        try:
            with reporter.task("training", 600) as advance:
                for step in range(600):
                    time.sleep(0.05)
                    advance(step, 600)
        finally:
            (tmp_path / f"left-{number}-{step}").touch()

    connection = Cluster(cluster.address)
    executor = connection.executor()
    tasks = [executor.submit(task, number) for number in range(8)]
    _wait(lambda: len(list(tmp_path.glob("begun-*"))) == connection.workers())
    begun = sorted(tmp_path.glob("begun-*"))
    executor.shutdown()
    connection.close()
    _wait(lambda: len(list(tmp_path.glob("left-*"))) == len(begun))
    assert all(int(path.name.split("-")[2]) < 599 for path in tmp_path.glob("left-*"))
    another = Cluster(cluster.address)
    assert another.executor().submit(abs, -1).result(timeout=60) == 1
    another.close()
    assert sorted(tmp_path.glob("begun-*")) == begun
    assert all(one.cancelled() for one in tasks)


def test_no_scheduler_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmad_cli.stages.cluster._CONNECT_SECONDS", 1)
    with pytest.raises(UsageError, match=r"--dask tcp://127\.0\.0\.1:9: no scheduler answers"):
        Cluster("tcp://127.0.0.1:9")


def fit_raw(data: Path, store: Path, reporter: Collector | None = None) -> dict[str, Any]:
    with Session(Store(store), None, "cpu", "tcp://inside", MEMORY, reporter or Collector()) as session:
        return {one.category: one for one in fit(session, EvaluateRequest(data, "btf", "raw"))}


def test_a_category_that_kills_workers_costs_only_itself(inside: Any, tiny_dataset: Path, tmp_path: Path) -> None:
    inside(lambda _, job: isinstance(job, CategoryTask) and job.plan.samples.category == "cube")
    found = fit_raw(tiny_dataset, tmp_path / "store")
    assert found["block"].ok
    assert not found["cube"].ok
    assert "every worker of the cluster that tried it died" in str(found["cube"].error)
    evaluate_on("tcp://inside", tiny_dataset, tmp_path / "store", tmp_path / "out")
    found = {key: value[0] for key, value in _statuses(tmp_path / "out").items()}
    assert found == {"0/block": "ok", "0/cube": "failed", "1/block": "ok", "1/cube": "failed"}


def test_a_sample_that_kills_workers_is_not_tried_again_in_its_category(
    inside: Any, tiny_dataset: Path, tmp_path: Path
) -> None:
    def deadly(_: Any, job: Any) -> bool:
        first = job.jobs[0] if isinstance(job, ExtractTask) else None
        return first is not None and (first.clean.ref.id, first.clean.artefact.category) == ("train/good/001", "cube")

    used = inside(deadly)
    found = fit_raw(tiny_dataset, tmp_path / "store")
    assert found["block"].ok
    assert "train/good/001" in str(found["cube"].error)
    fitted = [job.plan.samples.category for job in used.tried if isinstance(job, CategoryTask)]
    assert fitted == ["block"]


def test_counts_are_those_of_all_tasks_and_workers_know_the_memory_limit(
    inside: Any, tiny_dataset: Path, tmp_path: Path
) -> None:
    used = inside(lambda *_: False)
    for computed in (True, False):
        for one in fit_raw(tiny_dataset, tmp_path / "store").values():
            for report in one.reports.values():
                assert report.computed == (report.total if computed else 0)
    assert {job.place.memory_limit for job in used.tried if isinstance(job, CategoryTask)} == {MEMORY}


def test_jobs_that_were_at_a_killed_worker_are_tried_again_alone(inside: Any) -> None:
    """The scheduler blames all that waited at a worker that died; only what kills one by itself is lost."""
    first: list[int] = []

    def deadly(_: Any, job: int) -> bool:
        first.append(job)
        return job == 2 or (job == 3 and first.count(3) == 1)

    used = inside(deadly)
    found = dict(run_tasks(used, lambda job: job * 10, [1, 2, 3], lost=lambda job: -job))
    assert found == {0: 10, 1: -2, 2: 30}
    assert (used.tried[:3], sorted(used.tried[3:])) == ([1, 2, 3], [2, 3])


@pytest.mark.parametrize("status", ["error", "finished", "cancelled"])
def test_a_future_always_ends(status: str) -> None:
    """A task that failed raises; one whose result cannot be fetched any more is dropped, so that nobody waits."""

    async def result() -> None:
        raise ValueError

    future: Future[Any] = Future()
    asyncio.run(_pass_on(SimpleNamespace(status=status, result=result), future))
    with pytest.raises(ValueError if status == "error" else CancelledError):
        future.result(timeout=1)


def test_a_package_that_a_worker_lacks_is_said() -> None:
    async def result() -> None:
        raise ModuleNotFoundError("No module named 'faiss'")

    future: Future[Any] = Future()
    asyncio.run(_pass_on(SimpleNamespace(status="error", result=result), future))
    with pytest.raises(UsageError, match=r"a worker cannot do this \(No module named 'faiss'\).*same packages"):
        future.result(timeout=1)


def test_a_scheduler_without_workers_ends_the_command() -> None:
    class NoWorkerError(Exception):
        """As the scheduler raises it after `no-workers-timeout`."""

    future: Future[Any] = Future()
    future.set_exception(NoWorkerError())
    executor = SimpleNamespace(submit=lambda *_: future)
    with pytest.raises(StoreError, match="dropped the work"):
        list(run_tasks(executor, fit_task, [1]))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="network namespaces need root")
def test_workers_in_two_network_namespaces(serial: Numbers, tiny_dataset: Path, tmp_path: Path) -> None:
    """Each worker sees the scheduler through a virtual network of its own, as on another machine."""
    names = [f"mmad{os.getpid()}{letter}" for letter in "ab"]
    try:
        for number, name in enumerate(names):
            _make_namespace(name, number)
    except (OSError, subprocess.CalledProcessError) as error:
        _drop_namespaces(names)
        pytest.skip(f"network namespaces cannot be made here: {error}")
    started = None
    try:
        before = [["ip", "netns", "exec", name] for name in names]
        started = WorkerProcesses(tmp_path / "cluster", "0.0.0.0", [])
        port = started.address.rsplit(":", 1)[1]
        for number, command in enumerate(before):
            started.address = f"tcp://10.231.{number}.1:{port}"
            started.workers.append(started.add_worker(command))
        address = f"tcp://127.0.0.1:{port}"
        with_both = Cluster(address)
        _wait(lambda: with_both.workers() == 2)
        hosts = {worker.split("//")[1].split(":")[0] for worker in with_both._client.scheduler_info()["workers"]}
        assert hosts == {"10.231.0.2", "10.231.1.2"}
        with_both.close()
        evaluate_on(address, tiny_dataset, tmp_path / "store", tmp_path / "out")
        assert numbers(tmp_path / "out") == serial
    finally:
        if started is not None:
            started.stop()
        _drop_namespaces(names)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _make_namespace(name: str, number: int) -> None:
    """A namespace joined to this one by a pair of virtual Ethernet devices, 10.231.<number>.1 here and .2 there."""
    here, there = f"mm{os.getpid()}h{number}", f"mm{os.getpid()}t{number}"
    _ip("netns", "add", name)
    _ip("link", "add", here, "type", "veth", "peer", "name", there)
    _ip("link", "set", there, "netns", name)
    _ip("addr", "add", f"10.231.{number}.1/24", "dev", here)
    _ip("link", "set", here, "up")
    _ip("-n", name, "addr", "add", f"10.231.{number}.2/24", "dev", there)
    for device in (there, "lo"):
        _ip("-n", name, "link", "set", device, "up")
    _ip("-n", name, "route", "add", "default", "via", f"10.231.{number}.1")


def _drop_namespaces(names: list[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
