"""Every wrong input and option: the exit code, a message that names it and says what to do, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

RAW = ("--method", "btf", "--variant", "raw", "--device", "cpu", "--workers", "1")


def cloud(data: Path) -> Path:
    return data / "block" / "test" / "dent" / "xyz" / "001.tiff"


def evaluate(mmad: Callable[..., Any], data: Path, *options: object) -> Any:
    return mmad("evaluate", data, *RAW, "--out", "run", *options)


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# -- folders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["check", "preprocess", "extract", "fit", "evaluate"])
@pytest.mark.parametrize("kind", ["nowhere", "file", "empty", "without layout"])
def test_a_folder_that_is_no_dataset(mmad: Any, tmp_path: Path, command: str, kind: str) -> None:
    data = tmp_path / "data"
    if kind == "file":
        data.write_text("x")
    elif kind != "nowhere":
        data.mkdir()
        if kind == "without layout":
            (data / "pictures").mkdir()
            (data / "pictures" / "a.png").write_bytes(b"x")
    options = () if command in ("check", "preprocess") else ("--method", "btf", "--variant", "raw")
    ended = mmad(command, data, *options)
    assert ended.code == 2
    assert str(data) in ended.err
    words = {"nowhere": "no such folder", "file": "is a file", "empty": "empty", "without layout": "looked for"}
    assert words[kind] in ended.err
    assert ended.out == ""
    assert "Traceback" not in ended.err
    assert not files_of(Path.cwd())


# -- scans -------------------------------------------------------------------------------------------------------


def _truncate(data: Path) -> None:
    cloud(data).write_bytes(cloud(data).read_bytes()[:2000])


def _empty(data: Path) -> None:
    cloud(data).write_bytes(b"")


def _one_channel(data: Path) -> None:
    tifffile.imwrite(cloud(data), np.ones((100, 100), np.float32))


def _double(data: Path) -> None:
    tifffile.imwrite(cloud(data), np.ones((100, 100, 3), np.float64), photometric="rgb")


def _integer(data: Path) -> None:
    tifffile.imwrite(cloud(data), np.ones((100, 100, 3), np.int32), photometric="rgb")


def _change(data: Path, value: float) -> None:
    xyz = tifffile.imread(cloud(data))
    xyz[3, 4] = value
    tifffile.imwrite(cloud(data), xyz, photometric="rgb")


def _nan(data: Path) -> None:
    _change(data, np.nan)


def _infinite(data: Path) -> None:
    _change(data, np.inf)


def _no_points(data: Path) -> None:
    tifffile.imwrite(cloud(data), np.zeros((100, 100, 3), np.float32), photometric="rgb")


def _other_size(data: Path) -> None:
    path = data / "block" / "test" / "dent" / "rgb" / "001.png"
    Image.new("RGB", (90, 100)).save(path)


def _no_partner(data: Path) -> None:
    cloud(data).unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_truncate, ("dent/xyz/001.tiff", "cut off", "again")),
        (_empty, ("dent/xyz/001.tiff", "cannot be read", "again")),
        (_one_channel, ("dent/xyz/001.tiff", "(100, 100)", "(H, W, 3)")),
        (_double, ("dent/xyz/001.tiff", "float64", "float32")),
        (_integer, ("dent/xyz/001.tiff", "int32", "float32")),
        (_nan, ("dent/xyz/001.tiff", "1 pixels", "(0, 0, 0)")),
        (_infinite, ("dent/xyz/001.tiff", "1 pixels", "(0, 0, 0)")),
        (_no_points, ("dent/xyz/001.tiff", "no valid point", "remove the sample")),
        (_other_size, ("dent/rgb/001.png", "100 x 90", "one size")),
        (_no_partner, ("block/test/dent", "xyz/001.tiff is missing", "add what is missing")),
    ],
)
def test_a_bad_scan_fails_its_category_only(mmad: Any, tiny_dataset: Path, damage: Any, words: Any) -> None:
    damage(tiny_dataset)
    checked = mmad("check", tiny_dataset, "--workers", "1")
    assert checked.code == 3
    assert all(word in checked.out for word in words)

    ended = mmad("preprocess", tiny_dataset, "--workers", "1")
    assert ended.code == 3
    assert all(word in ended.err for word in words)
    assert "Traceback" not in ended.err

    ended = evaluate(mmad, tiny_dataset, "--json")
    assert ended.code == 3
    assert all(word in ended.err for word in words)
    categories = json.loads(ended.out)["categories"]
    assert {name: value["status"] for name, value in categories.items()} == {"block": "failed", "cube": "ok"}
    assert all(word in categories["block"]["error"] for word in words)
    assert files_of(Path("run")) == {"summary.json", "cube/scores.csv"}


def test_category_without_test_or_train(mmad: Any, tiny_dataset: Path) -> None:
    shutil.rmtree(tiny_dataset / "block" / "test")
    shutil.rmtree(tiny_dataset / "cube" / "train")
    ended = evaluate(mmad, tiny_dataset)
    assert ended.code == 3
    assert str(tiny_dataset / "block" / "test") in ended.err
    assert str(tiny_dataset / "cube" / "train" / "good") in ended.err
    assert files_of(Path("run")) == {"summary.json"}


def test_undefined_metrics_are_null_with_a_reason_and_no_failure(mmad: Any, tiny_dataset: Path) -> None:
    shutil.rmtree(tiny_dataset / "block" / "test" / "dent")
    shutil.rmtree(tiny_dataset / "cube" / "test" / "good")
    ended = evaluate(mmad, tiny_dataset, "--json")
    assert ended.code == 0
    for result in json.loads(ended.out)["categories"].values():
        assert result["metrics"]["i_auroc"] is None
        assert result["metrics_null_reasons"]["i_auroc"]
    assert "n/a" in mmad("report", "run").out


# -- names and values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("evaluate", "DATA", "--method", "btff"), ("--method", "'btff'", "did you mean 'btf'")),
        (("fit", "DATA", "--method", "btff"), ("--method", "'btff'", "did you mean 'btf'")),
        (("extract", "DATA", "--method", "btff"), ("--method", "'btff'", "did you mean 'btf'")),
        (("list", "variants", "--method", "btff"), ("--method", "'btff'", "did you mean 'btf'")),
        (("evaluate", "DATA", "--method", "btf", "--variant", "fpf"), ("--variant", "'fpf'", "'fpfh'")),
        (("evaluate", "DATA", *RAW, "--category", "blok"), ("--category", "'blok'", "'block'")),
        (("check", "DATA", "--category", "blok"), ("--category", "'blok'", "'block'")),
        (("preprocess", "DATA", "--category", "blok"), ("--category", "'blok'", "'block'")),
        (("evaluate", "DATA", *RAW, "--recipe", "offical"), ("--recipe", "'offical'", "'official'")),
        (("evaluate", "DATA", *RAW, "--set", "coreset_fractoin=1"), ("--set", "coreset_fractoin", "coreset_fraction")),
        (("evaluate", "DATA", *RAW, "--set", "coreset_fraction"), ("--set", "key=value")),
        (("evaluate", "DATA", *RAW, "--set", "=3"), ("--set", "key=value")),
        (("evaluate", "DATA", *RAW, "--set", "coreset_fraction=many"), ("--set", "coreset_fraction", "many")),
        (("evaluate", "DATA", *RAW, "--set", "coreset_fraction=7"), ("--set", "coreset_fraction", "7")),
        (("evaluate", "DATA", *RAW, "--protocol", "m3d"), ("--protocol", "m3d", "'m3dm'")),
        (("preprocess", "DATA", "--debris", "much"), ("--debris", "much", "'components'")),
        (("preprocess", "DATA", "--rgb-background", "red"), ("--rgb-background", "red", "'zero'")),
        (("evaluate", "DATA", *RAW, "--shots", "0"), ("--shots 0", "at least 1")),
        (("evaluate", "DATA", *RAW, "--limit", "0"), ("--limit 0", "at least 1")),
        (("preprocess", "DATA", "--limit", "-3"), ("--limit -3", "at least 1")),
        (("evaluate", "DATA", *RAW, "--limit", "few"), ("--limit", "integer")),
        (("evaluate", "DATA", *RAW, "--seed", "-1"), ("--seed -1", "0 to 4294967295")),
        (("synth", "new", "--seed", "-1"), ("--seed", "-1")),
        (("evaluate", "DATA", *RAW, "--seed", "4294967296"), ("--seed 4294967296", "0 to 4294967295")),
        (("evaluate", "DATA", *RAW, "--workers", "0"), ("--workers 0", "at least 1")),
        (("preprocess", "DATA", "--workers", "0"), ("--workers 0", "at least 1")),
        (("check", "DATA", "--workers", "0"), ("--workers 0", "at least 1")),
        (("synth", "new", "--workers", "0"), ("--workers 0", "at least 1")),
        (("evaluate", "DATA", *RAW, "--device", "gpu"), ("--device gpu", "cuda")),
        (("evaluate", "DATA", "-m", "btf", "-m", "patchcore", "--variant", "raw"), ("--variant", "one --method")),
        (("evaluate", "DATA", *RAW, "--full-resolutoin"), ("--full-resolutoin", "--full-resolution")),
        (("evaluate", "DATA"), ("--method",)),
        (("extract", "DATA"), ("--method", "--backbone")),
        (("extract", "DATA", "--backbone", "resnt18.tv_in1k"), ("'resnt18.tv_in1k'", "'resnet18.tv_in1k'")),
        (("extract", "DATA", "--backbone", "fpfh", "--set", "feature_radus=1"), ("--set", "'feature_radius'")),
        (("evalute", "DATA"), ("evalute",)),
        (("weights", "fetch", "resnt18.tv_in1k"), ("'resnt18.tv_in1k'", "'resnet18.tv_in1k'")),
        (("weights", "import", "resnet18.tv_in1k", "nowhere.pth"), ("nowhere.pth", "no such file")),
        (("synth", "new", "--category", "biscit"), ("--category", "'biscit'", "'biscuit'")),
        (("synth", "new", "--size", "0"), ("--size", "0")),
        (("synth", "new", "--train", "-1"), ("--train", "-1")),
        (("synth", "DATA"), ("not empty",)),
        (("report", "nowhere"), ("nowhere", "summary.json")),
        (("report",), ("no run found", "mmad evaluate")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_usage(mmad: Any, tiny_dataset: Path, arguments: Any, words: Any) -> None:
    before = files_of(tiny_dataset)
    ended = mmad(*(tiny_dataset if argument == "DATA" else argument for argument in arguments))
    assert ended.code == 2
    assert all(word in ended.err for word in words), ended.err
    assert ended.out == ""
    assert "Traceback" not in ended.err
    assert not files_of(Path.cwd())
    assert files_of(tiny_dataset) == before


def test_cuda_without_cuda(mmad: Any, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ended = mmad("evaluate", tiny_dataset, "--method", "btf", "--device", "cuda")
    assert ended.code == 2
    assert "--device cuda" in ended.err
    assert "--device cpu" in ended.err


def test_missing_weights_say_how_to_get_them(mmad: Any, tiny_dataset: Path) -> None:
    ended = mmad("evaluate", tiny_dataset, "--method", "patchcore", "--out", "run")
    assert ended.code == 2
    assert "mmad weights fetch wide_resnet50_2" in ended.err
    assert "mmad weights import wide_resnet50_2" in ended.err
    assert not Path("run").exists()


def test_a_long_list_of_names_is_cut(mmad: Any) -> None:
    ended = mmad("weights", "fetch", "0000")
    assert ended.code == 2
    assert len(ended.err) < 2000


# -- places ------------------------------------------------------------------------------------------------------


def test_out_and_store_that_are_files(mmad: Any, tiny_dataset: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    ended = mmad("evaluate", tiny_dataset, *RAW, "--out", file)
    assert (ended.code, "--out" in ended.err, str(file) in ended.err) == (2, True, True)
    for command in (("preprocess", tiny_dataset), ("cache", "info"), ("cache", "verify"), ("cache", "prune")):
        ended = mmad(*command, "--store", file)
        assert (ended.code, "--store" in ended.err, str(file) in ended.err) == (2, True, True)
    ended = mmad("preprocess", tiny_dataset, "--store", file / "below")
    assert ended.code == 3
    assert "--store" in ended.err
    assert str(file) in ended.err
    assert file.read_text() == "mine"


def test_a_dataset_is_never_written_to(mmad: Any, tiny_dataset: Path, tmp_path: Path) -> None:
    before = files_of(tiny_dataset)
    link = tmp_path / "link"
    link.symlink_to(tiny_dataset)
    for out in (tiny_dataset, tiny_dataset / "block", tiny_dataset / "cube" / "runs" / "1", link / "block"):
        ended = mmad("evaluate", tiny_dataset, *RAW, "--out", out)
        assert (ended.code, "--out" in ended.err, "only read" in ended.err) == (2, True, True)
    assert files_of(tiny_dataset) == before


@pytest.mark.parametrize("content", ["", "{", '{"schema": "mmad.run/2"}', '{"schema": "mmad.run/1"}', "[]", "\udc80"])
def test_report_on_a_damaged_summary(mmad: Any, content: str) -> None:
    Path("run").mkdir()
    Path("run/summary.json").write_bytes(content.encode(errors="surrogateescape"))
    for arguments in (("report", "run"), ("list", "runs", ".")):
        ended = mmad(*arguments)
        assert ended.code == 2
        assert "run/summary.json" in ended.err
        assert "Traceback" not in ended.err


# -- with a finished run -----------------------------------------------------------------------------------------


def test_report_options_and_exit_codes(mmad: Any, tiny_dataset: Path) -> None:
    assert evaluate(mmad, tiny_dataset, "--category", "cube").code == 0
    earlier = json.loads(Path("run/summary.json").read_text())
    assert mmad("report", "run", "--against", "run").code == 0
    moved = {"categories": {"cube": {"p_auroc": earlier["categories"]["cube"]["metrics"]["p_auroc"] + 0.02}}}
    Path("moved.json").write_text(json.dumps(moved))
    absent = {"categories": {"bagel": {"p_auroc": 0.9}}}
    Path("absent.json").write_text(json.dumps(absent))
    assert mmad("report", "run", "--against", "moved.json", "--tolerance", "0.01").code == 1
    assert mmad("report", "run", "--against", "moved.json", "--tolerance", "p_auroc=0.03").code == 0
    assert mmad("report", "run", "--against", "absent.json").code == 3
    for arguments, words in (
        (("--tolerance", "0.1"), ("--tolerance", "--against")),
        (("--category", "cube"), ("--category", "--against")),
        (("--against", "run", "--tolerance", "nonsense"), ("--tolerance nonsense", "number")),
        (("--against", "run", "--tolerance", "i_auroc=x"), ("--tolerance i_auroc=x", "number")),
        (("--against", "run", "--tolerance", "-1"), ("--tolerance -1", "number")),
        (("--against", "run", "--tolerance", "i_aurc=0.1"), ("i_aurc", "i_auroc")),
        (("--against", "btf-readm"), ("--against", "'btf-readm'", "'btf-readme'")),
        (("--against", "nowhere/run"), ("--against", "nowhere/run")),
        (("--metric", "i_aurc"), ("--metric", "'i_aurc'", "'i_auroc'")),
        (("--format", "tabel"), ("--format", "'tabel'", "'table'")),
        (("--output", "run"), ("--output run", "name a file")),
    ):
        ended = mmad("report", "run", *arguments)
        assert ended.code == 2, arguments
        assert all(word in ended.err for word in words), ended.err
        assert ended.out == ""


def test_machine_readable_output_is_alone_on_standard_output(mmad: Any, tiny_dataset: Path) -> None:
    data = tiny_dataset
    for arguments, code in (
        (("check", data), 0),
        (("preprocess", data), 0),
        (("extract", data, "--method", "btf", "--variant", "raw"), 0),
        (("fit", data, "--method", "btf", "--variant", "raw"), 0),
        (("evaluate", data, *RAW, "--dry-run"), 0),
        (("evaluate", data, *RAW, "--out", "run"), 0),
        (("evaluate", data, *RAW, "--variant", "fpfh", "--out", "two", "--dry-run"), 0),
        (("list", "methods"), 0),
        (("list", "variants"), 0),
        (("list", "backbones"), 0),
        (("list", "datasets"), 0),
        (("list", "references"), 0),
        (("list", "runs", "."), 0),
        (("list", "runs", "nowhere"), 0),
        (("weights", "list"), 0),
        (("weights", "verify"), 0),
        (("cache", "info"), 0),
        (("cache", "verify"), 0),
        (("cache", "prune", "--dry-run"), 0),
    ):
        ended = mmad(*arguments, "--json")
        assert ended.code == code, (arguments, ended.err)
        json.loads(ended.out)
    assert json.loads(mmad("report", "run", "--format", "json").out)["runs"]
    assert mmad("report", "run", "--format", "csv").out.startswith("run_id,")
    # without being asked for, nothing that a program would read: stages that show no table print nothing
    assert mmad("preprocess", data).out == ""


def test_an_unforeseen_error_is_not_taken_for_a_moved_number(mmad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmad_cli.datasets import describe_datasets

    def fail() -> None:
        raise AttributeError("out of luck")

    monkeypatch.setattr(f"{describe_datasets.__module__}.describe_datasets", fail)
    ended = mmad("list", "datasets")
    assert ended.code == 3
    assert "Traceback" in ended.err
    assert "out of luck" in ended.err
    assert "please report" in ended.err


def test_an_unforeseen_error_in_one_scan_costs_that_scan_only(
    mmad: Any, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mmad_cli.preprocessing as room

    original = room.preprocess

    def fail_on_one(sample: Any, config: Any) -> Any:
        if sample.id == "train/good/002":
            raise RuntimeError("out of luck")
        return original(sample, config)

    monkeypatch.setattr(room, "preprocess", fail_on_one)
    ended = mmad("preprocess", tiny_dataset, "--workers", "1", "--json")
    assert ended.code == 3
    report = json.loads(ended.out)[0]["stages"]["preprocess"]
    assert list(report["failures"]) == ["train/good/002"]
    assert "out of luck" in report["failures"]["train/good/002"]
    assert "train/good/xyz/002.tiff" in report["failures"]["train/good/002"]
    assert report["computed"] == report["total"] - 1


@pytest.mark.parametrize(
    "options",
    [("btff",), ("btf", "--variant", "fpf"), ("btf", "--set", "blurr=1"), ("m3dm",), ("btf", "--method", "x")],
)
def test_wrong_usage_is_told_before_the_default_dataset_is_rendered(mmad, monkeypatch, options):
    monkeypatch.delenv("MMAD_DATA", raising=False)
    ended = mmad("evaluate", "--method", *options)
    assert ended.code == 2 and "rendering" not in ended.err and "synthetic dataset" not in ended.err
    assert not list(Path(os.environ["MMAD_STORE"]).glob("datasets/*/*"))


def test_the_last_of_several_runs_is_refused_before_the_first_is_made(mmad, tiny_dataset):
    ended = mmad("evaluate", tiny_dataset, "--method", "btf", "--method", "m3dm", "--device", "cpu", "--workers", "1")
    assert ended.code == 2 and "weights are missing" in ended.err
    assert not Path("runs").exists() and not list(Path(os.environ["MMAD_STORE"]).glob("preprocess/*"))
