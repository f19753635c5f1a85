"""Pipes, terminals, languages, permissions, moved folders, strange names, start-up time."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pty
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmad_cli.stages import api
from mmad_cli.store import Store

RAW = ("--method", "btf", "--variant", "raw", "--device", "cpu", "--workers", "1")
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2


@pytest.fixture
def data(tiny_dataset: Path) -> Path:
    """One category of nine scans."""
    shutil.rmtree(tiny_dataset / "cube")
    return tiny_dataset


def evaluate(data: Path, place: Path, **options: Any) -> Any:
    options = {"method": "btf", "variant": "raw", "device": "cpu", "out": place / "run", **options}
    return api.evaluate(data, store=place / "store", **options)[0]


def metrics(result: Any) -> dict[str, Any]:
    return {name: category.metrics for name, category in result.categories.items()}


def unprivileged() -> None:
    """Give up root's right to read and write everything; permissions then hold as for anybody."""
    library = ctypes.CDLL(None, use_errno=True)
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        library.prctl(24, capability, 0, 0, 0)


@pytest.fixture
def permissions_hold(tmp_path: Path) -> None:
    """Skips where even a process without privileges reads what it must not."""
    secret = tmp_path / "secret"
    secret.write_text("x")
    secret.chmod(0)
    command = [sys.executable, "-c", f"open({str(secret)!r})"]
    if subprocess.run(command, preexec_fn=unprivileged, capture_output=True, check=False).returncode == 0:
        pytest.skip("permissions cannot be tested here")


# -- pipes and terminals -----------------------------------------------------------------------------------------


def _closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("arguments", [("--help",), ("list", "references"), ("list", "references", "--json")])
def test_a_reader_that_leaves_is_no_error(mmad_process: Any, arguments: tuple[str, ...]) -> None:
    ended = mmad_process(*arguments, capture_output=False, stdout=_closed_pipe(), stderr=subprocess.PIPE)
    assert ended.returncode == 0
    assert ended.stderr == ""


@pytest.mark.slow
def test_a_reader_that_leaves_does_not_hide_a_moved_number(mmad_process: Any, data: Path, tmp_path: Path) -> None:
    result = evaluate(data, tmp_path)
    moved = tmp_path / "moved.json"
    moved.write_text(json.dumps({"categories": {"block": {"p_auroc": metrics(result)["block"]["p_auroc"] - 0.1}}}))
    for form in ("table", "json"):
        ended = mmad_process(
            "report", tmp_path / "run", "--against", moved, "--format", form,
            capture_output=False, stdout=_closed_pipe(), stderr=subprocess.PIPE,
        )  # fmt: skip
        assert ended.returncode == 1
        assert ended.stderr == ""


def test_a_log_reader_that_leaves_does_not_stop_the_work(mmad_process: Any, data: Path, tmp_path: Path) -> None:
    pipe = _closed_pipe()
    ended = mmad_process(
        "evaluate", data, *RAW, "--out", tmp_path / "run", capture_output=False, stdout=pipe, stderr=pipe
    )
    assert ended.returncode == 0
    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("arguments", [("list", "references"), ("list", "references", "--json"), ("--help",)])
def test_output_onto_a_full_disk_is_said(mmad_process: Any, arguments: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        ended = mmad_process(*arguments, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert ended.returncode == 3
    assert "No space left" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_closed_standard_output(mmad_process: Any) -> None:
    ended = mmad_process("list", "references", preexec_fn=lambda: os.close(1))
    assert ended.returncode == 0
    assert "Traceback" not in ended.stderr


def test_on_a_terminal_bars_are_drawn_and_output_stays_clean(mmad_process: Any, data: Path) -> None:
    terminal, side = pty.openpty()
    drawn: list[bytes] = []

    def drain() -> None:
        # ends with an error (EIO) when nobody holds the other side any more
        with contextlib.suppress(OSError):
            while piece := os.read(terminal, 4096):
                drawn.append(piece)

    reader = threading.Thread(target=drain)
    reader.start()
    ended = mmad_process(
        "preprocess", data, "--workers", "1", "--json",
        capture_output=False, stdout=subprocess.PIPE, stderr=side, env={"TERM": "xterm", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(side)
    reader.join(10)
    os.close(terminal)
    assert ended.returncode == 0
    assert json.loads(ended.stdout)[0]["stages"]["preprocess"]["computed"] == 9
    # the cursor is hidden while bars are drawn, and comes back
    assert b"\x1b[?25l" in b"".join(drawn)
    assert b"\x1b[?25h" in b"".join(drawn)


# -- languages and names -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("env", [{"LC_ALL": "C", "LANG": "C"}, {"PYTHONIOENCODING": "ascii"}, {"PYTHONUTF8": "0"}])
def test_any_language_takes_any_category_name(
    mmad_process: Any, data: Path, tmp_path: Path, env: dict[str, str]
) -> None:
    (data / "block").rename(data / "Tür grün")
    for form in ((), ("--json",)):
        ended = mmad_process("evaluate", data, *RAW, "--out", tmp_path / "run", *form, env=env)
        assert ended.returncode == 0, ended.stderr
    assert list(json.loads(ended.stdout)["categories"]) == ["Tür grün"]
    for form in ("table", "markdown", "csv"):
        assert mmad_process("report", tmp_path / "run", "--format", form, env=env).returncode == 0


NAMES = ["two words", "x..y", "a%2fb", "täßt", "x" * 240, "ü" * 120, "[red]b[bold]", "-x", "a,b'c\"", "line\nbreak"]


@pytest.mark.parametrize("name", [*NAMES, os.fsdecode(b"caf\xe9")])
def test_strange_category_names(mmad: Any, data: Path, name: str) -> None:
    try:
        (data / "block").rename(data / name)
    except OSError:
        pytest.skip("this file system does not take the name")
    ended = mmad("evaluate", data, *RAW, "--out", "run", f"--category={name}", "--json")
    assert ended.code == 0, ended.err
    # JSON has no form for bytes that are no text; they are replaced there
    assert len(json.loads(ended.out)["categories"]) == 1
    assert (name in json.loads(ended.out)["categories"]) == name.isprintable() or "\n" in name
    assert len(list(Path("run").glob("*/scores.csv"))) == 1
    assert mmad("report", "run").code == 0
    assert mmad("cache", "verify").code == 0
    assert mmad("check", data, "--workers", "1").code == 0
    assert {path.name for path in Path().iterdir()} == {"run"}


# -- places ------------------------------------------------------------------------------------------------------


def test_moved_and_linked_datasets_are_known_by_their_content(mmad: Any, data: Path, tmp_path: Path) -> None:
    def computed(folder: Path) -> int:
        ended = mmad("preprocess", folder, "--workers", "1", "--json")
        assert ended.code == 0
        return int(sum(outcome["stages"]["preprocess"]["computed"] for outcome in json.loads(ended.out)))

    assert computed(data) == 9
    link = tmp_path / "link"
    link.symlink_to(data)
    assert computed(link) == 0
    moved = data.rename(tmp_path / "elsewhere")
    assert computed(moved) == 0
    assert computed(Path(os.path.relpath(moved))) == 0
    linked_files = tmp_path / "linked"
    shutil.copytree(moved, linked_files, copy_function=lambda source, target: Path(target).symlink_to(source))
    assert computed(linked_files) == 0


@pytest.mark.slow
def test_read_only_dataset_and_other_working_directory(
    mmad_process: Any, data: Path, tmp_path: Path, permissions_hold: None
) -> None:
    for path in (data, *data.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    (tmp_path / "work").mkdir()
    ended = mmad_process(
        "evaluate", os.path.relpath(data, tmp_path / "work"), *RAW, "--json",
        cwd=tmp_path / "work", preexec_fn=unprivileged,
    )  # fmt: skip
    for path in (data, *data.rglob("*")):
        path.chmod(0o755)
    assert ended.returncode == 0, ended.stderr
    run = json.loads(ended.stdout)["run_id"]
    assert (tmp_path / "work" / "runs" / run / "summary.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["file", "category"])
def test_unreadable_raw_data_is_named(
    mmad_process: Any, tiny_dataset: Path, tmp_path: Path, permissions_hold: None, what: str
) -> None:
    bad = tiny_dataset / "block" / "train"
    bad = bad / "good" / "xyz" / "001.tiff" if what == "file" else bad / "good"
    bad.chmod(0)
    ended = mmad_process("evaluate", tiny_dataset, *RAW, "--out", tmp_path / "run", "--json", preexec_fn=unprivileged)
    checked = mmad_process("check", tiny_dataset, preexec_fn=unprivileged)
    bad.chmod(0o755)
    # what cannot even be listed is refused as a whole
    assert ended.returncode == (3 if what == "file" else 2), ended.stderr
    assert str(bad) in ended.stderr
    assert "ermission" in ended.stderr
    assert "Traceback" not in ended.stderr + checked.stderr
    assert checked.returncode in (2, 3)
    assert str(bad) in checked.stdout + checked.stderr
    if what == "category":
        return
    assert {n: c["status"] for n, c in json.loads(ended.stdout)["categories"].items()} == {
        "block": "failed", "cube": "ok"
    }  # fmt: skip


@pytest.mark.parametrize("option", ["--out", "--store"])
def test_a_place_that_may_not_be_written(
    mmad_process: Any, data: Path, tmp_path: Path, permissions_hold: None, option: str
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    ended = mmad_process("evaluate", data, *RAW, option, locked / "new", cwd=tmp_path, preexec_fn=unprivileged)
    locked.chmod(0o755)
    assert ended.returncode == 3
    assert str(locked / "new") in ended.stderr
    assert option in ended.stderr
    assert "write permission" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(locked.iterdir()) == []


def test_no_home_folder(tmp_path: Path) -> None:
    script = (
        "import pwd, sys\n"
        "def nobody(number): raise KeyError(number)\n"
        "pwd.getpwuid = nobody\n"
        "sys.argv = ['mmad', 'cache', 'info']\n"
        "from mmad_cli.cli import main\n"
        "main()\n"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "MMAD_STORE") and not k.startswith("XDG_")}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "--store" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "~").exists()


def test_nothing_of_posix_is_needed_to_load_and_evaluate(data: Path, tmp_path: Path) -> None:
    script = (
        "import sys, os, signal\n"
        "for name in ('fcntl', 'resource', 'pwd', 'grp', 'termios', 'pty', 'tty'): sys.modules[name] = None\n"
        "for name in ('sched_getaffinity', 'sched_setaffinity', 'getuid', 'geteuid'): delattr(os, name)\n"
        "del signal.pthread_sigmask\n"
        "from mmad_cli.stages.executor import run_tasks\n"
        "from mmad_cli.cli.app import run\n"
        f"sys.exit(run(['evaluate', {str(data)!r}, *{RAW!r}, '--out', {str(tmp_path / 'run')!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_optimised_python_gives_the_same(mmad_process: Any, data: Path, tmp_path: Path) -> None:
    expected = evaluate(data, tmp_path / "plain")
    ended = mmad_process("evaluate", data, *RAW, "--out", tmp_path / "run", "--json", prefix=[sys.executable, "-O"])
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["categories"]["block"]["metrics"] == metrics(expected)["block"]


# -- what the store must not mix up ------------------------------------------------------------------------------


def test_a_scan_that_moves_to_good_loses_its_mask(data: Path, tmp_path: Path) -> None:
    def masks() -> dict[str, int]:
        samples = api.load_preprocessed(data, "none", store=tmp_path / "store")
        return {sample.id: int(sample.mask.sum()) for sample in samples}

    assert masks()["test/dent/001"] > 0
    for role in ("rgb", "xyz", "gt"):
        name = "001.png" if role != "xyz" else "001.tiff"
        new = data / "block" / "test" / "good" / role / name.replace("001", "900")
        (data / "block" / "test" / "dent" / role / name).rename(new)
    assert masks()["test/good/900"] == 0
    assert Image.open(data / "block" / "test" / "good" / "gt" / "900.png").getextrema()[1] > 0


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    mmad: Any, data: Path, scan_maker: Any, scan_writer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmad_cli.datasets.mvtec3d import Mvtec3dDataset

    original = Mvtec3dDataset.read

    def read_then_change(self: Any, ref: Any) -> Any:
        if ref.id == "train/good/001":
            scan_writer(data / "block" / "train" / "good", "001", scan_maker(77), False)
        return original(self, ref)

    with monkeypatch.context() as patch:
        patch.setattr(Mvtec3dDataset, "read", read_then_change)
        ended = mmad("preprocess", data, "--workers", "1", "--json")
    assert ended.code == 3
    (message,) = json.loads(ended.out)[0]["stages"]["preprocess"]["failures"].values()
    assert "block/train/good" in message
    assert "changed" in message
    ended = mmad("preprocess", data, "--workers", "1", "--json")
    assert (ended.code, json.loads(ended.out)[0]["stages"]["preprocess"]["computed"]) == (0, 1)


def test_a_damaged_index_of_raw_files_is_not_believed(data: Path, tmp_path: Path) -> None:
    first = evaluate(data, tmp_path)
    (index,) = (tmp_path / "store" / "raw").iterdir()
    text = index.read_text()
    digest = next(iter(json.loads(text)["files"].values()))[-1]
    changed = digest.replace(digest[0], "0" if digest[0] != "0" else "1", 1)
    index.write_text(text.replace(digest, changed))
    again = evaluate(data, tmp_path)
    assert (again.run_id, again.dataset.digest) == (first.run_id, first.dataset.digest)


def test_pruning_while_a_run_is_under_way_costs_nothing_but_time(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmad_cli.methods.btf import BTF

    expected = evaluate(data, tmp_path / "undisturbed")
    original = BTF.predict
    store = Store(tmp_path / "store")
    removed: list[Path] = []

    def prune_first(self: Any, sample: Any) -> Any:
        removed.extend(store.prune()[0])
        return original(self, sample)

    with monkeypatch.context() as patch:
        patch.setattr(BTF, "predict", prune_first)
        assert metrics(evaluate(data, tmp_path)) == metrics(expected)
    # all that the run needs was announced before it was computed
    assert removed == []

    def forget_everything(self: Any, sample: Any) -> Any:
        for stage in ("preprocess", "extract"):
            shutil.rmtree(store.root / stage, ignore_errors=True)
        return original(self, sample)

    for stage in ("predict", "evaluate"):
        shutil.rmtree(store.root / stage)
    monkeypatch.setattr(BTF, "predict", forget_everything)
    assert metrics(evaluate(data, tmp_path)) == metrics(expected)


def test_a_run_that_takes_over_a_folder_frees_what_the_earlier_one_needed(
    mmad: Any, data: Path, tmp_path: Path
) -> None:
    assert mmad("evaluate", data, *RAW, "--out", "run").code == 0
    ended = mmad("evaluate", data, *RAW, "--out", "run", "--recipe", "corrected")
    assert ended.code == 0
    assert "replaces" in ended.err
    freed = json.loads(mmad("cache", "prune", "--json").out)["files"]
    assert {Path(path).relative_to(os.environ["MMAD_STORE"]).parts[0] for path in freed} >= {"fit", "evaluate"}
    assert mmad("evaluate", data, *RAW, "--out", "run", "--recipe", "corrected", "--dry-run", "--json").code == 0
    assert not list(Path(os.environ["MMAD_STORE"]).rglob("*.lock"))


def test_a_held_lock_survives_pruning(tmp_path: Path) -> None:
    from mmad_cli.store import Artefact

    store = Store(tmp_path / "store")
    with store.lock(Artefact("fit", "block", "ab" * 20)):
        store.prune()
        assert len(list(store.root.rglob("*.lock"))) == 1
    store.prune()
    assert list(store.root.rglob("*.lock")) == []


def test_a_folder_that_is_pruned_between_its_making_and_the_first_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmad_cli import files

    original = files.tempfile.mkstemp
    calls: list[int] = []

    def pruned_once(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            (tmp_path / "folder").rmdir()
        return original(*arguments, **options)

    monkeypatch.setattr(files.tempfile, "mkstemp", pruned_once)
    files.atomic_write(tmp_path / "folder" / "file", b"1")
    assert (tmp_path / "folder" / "file").read_bytes() == b"1"


# -- how long it takes -------------------------------------------------------------------------------------------


def _seconds(command: list[str], repeats: int = 3) -> float:
    """Least wall time of a command: the machine may be busy with other things."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        best = min(best, time.perf_counter() - start)
    return best


def test_help_is_quick() -> None:
    # measured: 10 times a bare interpreter (0.25 s against 0.025 s); importing torch would make it 80
    bare = _seconds([sys.executable, "-c", "pass"])
    assert _seconds([sys.executable, "-m", "mmad_cli", "--help"]) < max(0.5, 30 * bare)


def test_a_known_result_is_quick(data: Path, tmp_path: Path, mmad_process: Callable[..., Any]) -> None:
    evaluate(data, tmp_path)
    bare = _seconds([sys.executable, "-c", "import numpy, pydantic"])
    command = ["evaluate", data, *RAW, "--out", tmp_path / "run", "--store", tmp_path / "store"]
    # measured: 0.7 s against 0.2 s for numpy and pydantic alone
    again = _seconds([sys.executable, "-m", "mmad_cli", *map(str, command)])
    assert again < max(3.0, 15 * bare)
