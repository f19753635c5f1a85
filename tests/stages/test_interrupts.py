"""Real processes that are killed, interrupted, run side by side, or find the disk full: nothing is lost or wrong."""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmad_cli.results.schema import RunResult
from mmad_cli.stages import api
from mmad_cli.store import Store

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and process groups of POSIX")

METHOD = ("--method", "btf", "--variant", "raw")
COMMANDS = {
    "preprocess": ("--protocol", "m3dm"),
    "extract": METHOD,
    "evaluate": (*METHOD, "--device", "cpu", "--out", "run"),
}


def start(command: str, data: Path, store: Path, workers: int, cwd: Path, *options: str) -> subprocess.Popen[str]:
    arguments = [command, data, *COMMANDS[command], "--workers", workers, "--store", store, "--json", *options]
    return subprocess.Popen(
        [sys.executable, "-m", "mmad_cli", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(command: str, data: Path, store: Path, workers: int, cwd: Path, *options: str) -> Any:
    process = start(command, data, store, workers, cwd, *options)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out)


def in_group(group: int) -> list[int]:
    """Living processes of a process group, from /proc."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, belongs = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except (OSError, ValueError):
                continue
            if int(belongs) == group and state != "Z":
                found.append(int(entry.name))
    return found


def wait_until_empty(group: int, seconds: float = 10) -> list[int]:
    end = time.monotonic() + seconds
    while (left := in_group(group)) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def finished_files(store: Path) -> set[Path]:
    """Files under their final names, which are whole (verify reads them)."""
    assert Store(store).verify() == []
    return {p for p in store.rglob("*.safetensors") if not any(part.startswith(".tmp-") for part in p.parts)}


@pytest.fixture
def data(tiny_dataset: Path) -> Path:
    """A category with nine scans: enough tasks for a pool of two."""
    shutil.rmtree(tiny_dataset / "cube")
    return tiny_dataset


def wait_for_files(store: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Until a process has stored so many results: a moment that does not depend on the speed of the machine."""
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        if sum(1 for _ in store.rglob("[0-9a-f]*.safetensors")) >= count:
            return
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "way", "workers"),
    [
        ("preprocess", signal.SIGKILL, 2),
        ("preprocess", signal.SIGINT, 2),
        ("extract", signal.SIGKILL, 1),
        ("extract", signal.SIGINT, 2),
        ("evaluate", signal.SIGKILL, 2),
        ("evaluate", signal.SIGINT, 1),
    ],
)
def test_ended_at_any_moment_a_rerun_does_what_is_missing(
    data: Path, tmp_path: Path, command: str, way: signal.Signals, workers: int
) -> None:
    store = tmp_path / "store"
    chance = random.Random(f"{command}{way}{workers}")
    process = start(command, data, store, workers, tmp_path)
    wait_for_files(store, chance.randint(0, 6), process)
    time.sleep(chance.uniform(0, 0.05))
    assert process.poll() is None
    if way == signal.SIGINT:
        # as a terminal does: to every process of the group
        os.killpg(process.pid, way)
    else:
        process.kill()
    _, err = process.communicate(timeout=60)
    assert wait_until_empty(process.pid) == []
    if way == signal.SIGINT:
        assert process.returncode == 130
        assert err.strip().splitlines()[-1] == "interrupted; what was finished is kept, the same command resumes"
        assert "Traceback" not in err
    kept = finished_files(store)
    times = {path: path.stat().st_mtime_ns for path in kept}
    again = finish(command, data, store, workers, tmp_path)
    if command != "evaluate":
        (stages,) = [outcome["stages"] for outcome in again]
        for stage, report in stages.items():
            had = sum(path.is_relative_to(store / stage) for path in kept)
            assert report == {"total": 9, "computed": 9 - had, "failures": {}}
    assert {path: path.stat().st_mtime_ns for path in kept} == times
    assert finished_files(store) >= kept


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Holds the metrics of a run that nothing disturbed, computed by the first test that needs them."""
    return {"place": tmp_path_factory.mktemp("undisturbed")}


def expected_metrics(undisturbed: dict[str, Any], data: Path) -> dict[str, Any]:
    if "metrics" not in undisturbed:
        place = undisturbed["place"]
        result, _ = api.evaluate(
            data, method="btf", variant="raw", device="cpu", out=place / "run", store=place / "store"
        )
        undisturbed["metrics"] = metrics(result.model_dump(mode="json"))
    return undisturbed["metrics"]


def metrics(run: dict[str, Any]) -> dict[str, Any]:
    return {name: result["metrics"] for name, result in run["categories"].items()}


@pytest.mark.slow
def test_killed_again_and_again_it_gives_the_numbers_of_an_undisturbed_run(
    data: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    store = tmp_path / "store"
    chance = random.Random(1)
    for workers in (2, 1):
        process = start("evaluate", data, store, workers, tmp_path)
        time.sleep(chance.uniform(0.3, 2.0))
        process.kill()
        process.communicate()
        assert wait_until_empty(process.pid) == []
        finished_files(store)
    (store / "extract" / "block").mkdir(parents=True, exist_ok=True)
    (store / "extract" / "block" / ".tmp-abc").write_bytes(b"half")
    (store / "fit" / "block" / ".tmp-folder").mkdir(parents=True)
    assert metrics(finish("evaluate", data, store, 1, tmp_path)) == expected_metrics(undisturbed, data)
    assert (store / "extract" / "block" / ".tmp-abc").exists()


@pytest.mark.slow
def test_two_processes_on_one_store_give_the_same_numbers(
    data: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    store = tmp_path / "store"
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
    processes = [start("evaluate", data, store, 1, tmp_path / place) for place in ("a", "b")]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert metrics(json.loads(out)) == expected_metrics(undisturbed, data)
    finished_files(store)
    # the method uses no validation sample
    assert len(list((store / "preprocess" / "block").glob("*.safetensors"))) == 8


@pytest.mark.slow
def test_a_flipped_byte_is_named_and_computed_again(
    data: Path, tmp_path: Path, undisturbed: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    from mmad_cli.cli.app import run

    store = tmp_path / "store"
    arguments = ["evaluate", data, *METHOD, "--device", "cpu", "--workers", "1", "--store", store, "--json"]
    command = [str(argument) for argument in (*arguments, "--out", tmp_path / "run")]
    assert run(command) == 0
    chance = random.Random(2)
    # the first bytes give the length of the header, then comes the header, then the content
    for stage, place in (
        ("preprocess", 2),
        ("preprocess", 20),
        ("extract", 6),
        ("extract", -9),
        ("predict", 30),
        ("evaluate", 40),
    ):
        damaged = chance.choice(sorted(path for path in (store / stage).rglob("*") if path.is_file()))
        content = bytearray(damaged.read_bytes())
        content[place] ^= 4
        damaged.write_bytes(bytes(content))
        if stage != "evaluate":
            for later in {"fit", "predict", "evaluate"} - {stage}:
                shutil.rmtree(store / later)
        capfd.readouterr()
        assert run(command) == 0
        out, err = capfd.readouterr()
        assert str(damaged) in err
        assert "computed again" in err
        assert metrics(json.loads(out)) == expected_metrics(undisturbed, data)
        assert Store(store).verify() == []


def test_an_interrupted_rerun_does_not_forget_what_the_run_had(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmad_cli.stages import evaluate

    options: dict[str, Any] = {"method": "btf", "variant": "raw", "out": tmp_path / "run", "store": tmp_path / "store"}
    first, folder = api.evaluate(tiny_dataset, **options)
    original = evaluate.evaluate_category

    def stop_at_cube(session: Any, prepared: Any, plan: Any, *rest: Any) -> Any:
        if plan.samples.category == "cube":
            raise KeyboardInterrupt
        return original(session, prepared, plan, *rest)

    monkeypatch.setattr(evaluate, "evaluate_category", stop_at_cube)
    with pytest.raises(KeyboardInterrupt):
        api.evaluate(tiny_dataset, **options)
    assert RunResult.from_disk(folder).model_dump() == first.model_dump()
    # and the store knows that this run still needs the results of both
    removed, _ = Store(tmp_path / "store").prune(dry_run=True)
    assert removed == []


@pytest.mark.slow
@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGINT])
def test_rendering_that_is_ended_leaves_no_workers(tmp_path: Path, way: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "mmad_cli", "synth", "made", "--workers", "2"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 60
    while not list(tmp_path.rglob("*.tiff")) and time.monotonic() < end:
        time.sleep(0.01)
    if way == signal.SIGINT:
        os.killpg(process.pid, way)
    else:
        process.kill()
    _, err = process.communicate(timeout=60)
    assert wait_until_empty(process.pid) == []
    assert not (tmp_path / "made").exists()
    if way == signal.SIGINT:
        assert process.returncode == 130
        assert "Traceback" not in err
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_seen_in_the_words_of_a_library_that_writes_itself(
    tmp_path: Path, small_disk: Callable[[int], Path]
) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    from mmad_cli.errors import StoreError
    from mmad_cli.files import atomic_folder

    place = small_disk(40) / "fit"
    with pytest.raises(StoreError, match="no space left"), atomic_folder(place) as folder:
        save_file({"a": np.zeros(100_000)}, folder / "bank.safetensors")
    with pytest.raises(StoreError, match="no space left"), atomic_folder(place) as folder:
        np.save(folder / "bank.npy", np.zeros(100_000))
    assert list(place.parent.iterdir()) == []


# -- a disk that fills up ----------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts small file systems; their size can be changed by calling again."""
    place = tmp_path / "disk"
    place.mkdir()
    library = ctypes.CDLL(None, use_errno=True)
    mounted = False

    def mount(kilobytes: int) -> Path:
        nonlocal mounted
        remount = 32 if mounted else 0
        done = library.mount(b"tmpfs", os.fsencode(place), b"tmpfs", remount, f"size={kilobytes}k".encode())
        if done != 0:
            pytest.skip("file systems cannot be mounted here")
        mounted = True
        return place

    yield mount
    if mounted:
        library.umount2(os.fsencode(place), 2)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "workers"), [("preprocess", 2), ("preprocess", 1), ("evaluate", 1)])
def test_a_full_store_keeps_what_is_complete_and_a_rerun_completes(
    data: Path, tmp_path: Path, small_disk: Callable[[int], Path], command: str, workers: int
) -> None:
    store = small_disk(400 if command == "preprocess" else 2300) / "store"
    process = start(command, data, store, workers, tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert "no space left" in err
    assert "cache prune" in err
    assert str(store) in err
    assert "Traceback" not in err
    kept = finished_files(store)
    assert kept
    assert not list(store.rglob(".tmp-*"))
    times = {path: path.stat().st_mtime_ns for path in kept}
    small_disk(50_000)
    finish(command, data, store, workers, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in kept} == times


@pytest.mark.slow
def test_a_full_disk_under_the_run_folder_and_under_a_new_dataset(
    data: Path, tmp_path: Path, small_disk: Callable[[int], Path]
) -> None:
    store, disk = tmp_path / "store", small_disk(16)
    process = start("evaluate", data, store, 1, tmp_path, "--out", str(disk / "run"), "--save-maps")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert "no space left" in err
    assert "--out" in err
    assert "Traceback" not in err
    assert not list(disk.rglob(".tmp-*"))
    small_disk(50_000)
    finish("evaluate", data, store, 1, tmp_path, "--out", str(disk / "run"), "--save-maps")
    assert RunResult.from_disk(disk / "run").failed_categories == []

    shutil.rmtree(disk / "run")
    small_disk(300)
    done = subprocess.run(
        [sys.executable, "-m", "mmad_cli", "synth", disk / "made", "--category", "biscuit", "--workers", "1"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "check space" in done.stderr
    assert list(disk.iterdir()) == []
